"""The values between the engine and a backend: what it sees, and what it wants done.

A backend makes Observed and carries out Decision; decide.py turns the one into the other.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from btx_api.spec import BTXRunSpec
from btx_api.stage import Result, Task
from btx_api.status import Release, Row, Status


class Phase(StrEnum):
    """Where an attempt is, as far as its backend knows."""

    PENDING = "Pending"
    """Created; its process has not begun."""
    QUEUED = "Queued"
    """Suspended by somebody else (Kueue)."""
    RUNNING = "Running"
    ENDED = "Ended"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One Job or process of the run, of whatever stage and number."""

    stage: str
    """Name of the row that it was started for."""
    number: int
    digest: str
    """Of that row at the time."""
    handle: str
    """The backend's own name for it (Job uid, process id)."""
    phase: Phase
    since: float | None = None
    """Unix time at which the clock of the phase began; None while it stands (no deadline)."""
    stopping: bool = False
    """It was asked to stop."""
    exit: int | None = None
    """Exit code once ended; None of an ended attempt: it vanished."""
    result: Result | None = None
    """What it left; None when there is nothing readable."""
    seconds: float = 0.0
    """Running time once ended."""
    dead_experts: tuple[str, ...] | None = None
    """`layer.expert` of each that it says is dead now; None while it says nothing of experts."""
    trouble: str = ""
    """Why it does not begin, with the field to mend; empty: nothing is wrong."""
    obsolete: bool = False
    """It cannot go on as it is, and another one could: stop it, and do not count it."""
    replaced: int = 0
    """Processes of this attempt that were preempted and begun again by the backend itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A row of another run over the same storage, with one of our digests."""

    run: str
    uid: str
    created: float
    """Unix time of the other run's creation."""
    row: Row


def index(claims: Iterable[Claim]) -> dict[str, tuple[Claim, ...]]:
    """Claims by digest."""
    found: dict[str, tuple[Claim, ...]] = {}
    for claim in claims:
        found[claim.row.digest] = (*found.get(claim.row.digest, ()), claim)
    return found


def storage_key(spec: BTXRunSpec) -> tuple[str, str]:
    """Runs with the same key (and namespace) share artifacts, and see each other's claims."""
    return place_of(spec.storage.endpoint, spec.storage.uri)


def place_of(endpoint: str | None, uri: str) -> tuple[str, str]:
    """The storage_key of these two fields."""
    return endpoint or "", uri.rstrip("/")


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """Every fact that one decision rests on."""

    name: str
    uid: str
    created: float
    generation: int
    spec: BTXRunSpec | None
    """None when it cannot be read; then `problems` says why."""
    status: Status
    """As it was last written."""
    release: Release
    """What a run accepted now would get."""
    problems: tuple[str, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    """All that exist, of any number, ended ones too."""
    claims: Mapping[str, tuple[Claim, ...]] = field(default_factory=dict)
    """By digest: rows of other runs of this namespace and storage."""
    refresh: str = ""
    """The refresh annotation; a backend that looks again at each start puts that start into it."""
    retry: str = ""
    """The retry annotation."""
    verify: bool = False
    """Preflight reads every byte of every complete stage."""
    closing: bool = False
    """The engine's process wants to end: as if the run were suspended."""
    progress: str = ""
    eta: str = ""
    """For display, of the stages that run; changed by the backend every now and then only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Begin an attempt, or do nothing if it exists; its row says so already."""

    name: str
    """Of the row."""
    attempt: int
    digest: str
    task: Task
    """The backend completes listen, scratch, result and, where unset, threads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that a person wants to be told once."""

    reason: str
    """A Reason or an EventReason."""
    message: str
    warning: bool = False
    stage: str = ""
    """Of the attempt that failed, so that a backend can add what it printed last."""
    attempt: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What to do, in this order: write the status, stop, start, tell."""

    status: Status
    stops: tuple[Attempt, ...] = ()
    starts: tuple[Start, ...] = ()
    events: tuple[Event, ...] = ()
    again_after: float | None = None
    """Seconds until time alone may change the decision; None: only a new fact can."""
