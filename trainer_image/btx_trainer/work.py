"""What a stage is given and what it gives back; the signature of every `stages/<kind>.py`.

Built by __main__, which looks for the committed artifact first and commits `out` afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from btx_api.spec import Model
from btx_api.stage import Progress, Stage, TaskExecution

from btx_trainer.artifacts import Artifact, Attempt, Outside
from btx_trainer.storage import Store


@dataclass(frozen=True, kw_only=True)
class Work:
    """One attempt at one stage."""

    stage: Stage
    recipe: Model
    """`RECIPES[stage.kind]`, parsed."""
    execution: TaskExecution
    inputs: tuple[Artifact | Outside, ...]
    """Same order as `stage.inputs`."""
    out: Attempt
    """Where the artifact's files go."""
    store: Store
    """The run's storage prefix, for checkpoints."""
    scratch: Path
    """An existing, private folder; gone after the attempt."""
    publish: Callable[[Progress], None]
    stopping: Callable[[], bool]
    """True after SIGTERM or SIGINT: save what is worth keeping and raise PreemptedError."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a finished stage says of itself; its files are in `Work.out`."""

    metrics: dict[str, float]
    """At most `MAX_METRICS` headline numbers, finite."""
    deviations: tuple[str, ...] = ()
    """See Manifest."""
    resumed_step: int = 0
    """Step of the checkpoint that this attempt began from."""
