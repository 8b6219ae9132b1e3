"""Exceptions of the engine and its command line; raised by backends and cli, caught in two places.

Conflict           somebody else wrote the status: reconcile looks again and does nothing else
UserError          for the person at the keyboard; cli prints its lines and exits with its code
+-- ManifestError    the manifest or an overlay is wrong
+-- ErrandError      a trainer process that was asked for an answer gave none
+-- NotFoundError    no such run on this machine
+-- LockedError      another process works on the run
"""

from pathlib import Path

from btx_api.stage import Exit


class Conflict(Exception):
    """The status that the decision rests on is no longer the stored one."""


class UserError(Exception):
    """Its text is one line that names the field or the object."""

    exit: int = Exit.CONFIGURATION


class ManifestError(UserError):
    """The one with several lines: one per problem, each naming its field."""

    exit = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ErrandError(UserError):
    """Carries the exit code of the trainer's process."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit = code


class NotFoundError(UserError):
    """Names the run and where it was looked for."""

    def __init__(self, name: str, root: Path) -> None:
        super().__init__(f"run {name!r}: not found in {root}")


class LockedError(UserError):
    """Names the process that has the run."""

    def __init__(self, name: str, pid: int) -> None:
        super().__init__(f"run {name!r}: process {pid} works on it; stop that one first")
        self.pid = pid
