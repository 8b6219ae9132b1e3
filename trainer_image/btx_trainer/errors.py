"""Every way an attempt can end badly, and the exit code of each; raised anywhere in the trainer.

TrainerError
+-- ConfigurationError   the input or the recipe is wrong; names the field or object
+-- CorruptInputError    an artifact's bytes are not what its manifest says
+-- MissingError         `mustExist` was asked and there is nothing
+-- StalledError         no step for `noProgressSeconds`
+-- DivergedError        loss or gradient is not finite
+-- PreemptedError       SIGTERM; the checkpoint is written
Anything else that escapes (no disk space, a bug) is Exit.FAILED: tried again.
"""

from btx_api.stage import Corrupt, Exit, Kind, Problem


class TrainerError(Exception):
    """Base: carries its exit code and what goes into the Result."""

    exit = Exit.FAILED
    corrupt: Corrupt | None = None

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.problem = Problem(field=field, message=message)


class ConfigurationError(TrainerError):
    """`field` is a path of the spec or the object (file, tensor, key) that is wrong."""

    exit = Exit.CONFIGURATION


class CorruptInputError(TrainerError):
    """Names the artifact, so that the engine can have it made again."""

    exit = Exit.CORRUPT

    def __init__(self, kind: Kind, digest: str, tag: str, message: str) -> None:
        super().__init__(f"stages/{kind}/{digest}", message)
        self.corrupt = Corrupt(kind=kind, digest=digest, tag=tag)


class MissingError(TrainerError):
    """There is no artifact of this stage."""

    exit = Exit.MISSING


class StalledError(TrainerError):
    """No progress for too long."""

    exit = Exit.STALLED


class DivergedError(TrainerError):
    """Loss or gradient is not finite."""

    exit = Exit.DIVERGED


class PreemptedError(TrainerError):
    """Asked to stop; everything worth keeping is stored."""

    exit = Exit.PREEMPTED
