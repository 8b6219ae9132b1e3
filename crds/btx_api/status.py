"""What the engine answers: `.status` of a BTXRun. Written by the engine only, read by people, `btx
status` and the engine's next step, which remembers nothing else.

Compact JSON stays below 10 kB at 16 experts and 32 kB at 64 (tests/operator/test_bounds.py).
"""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from btx_api.methods import Members
from btx_api.spec import Model, Real
from btx_api.stage import PROBLEM_LENGTH, Kind, Resolved

PREFLIGHT = "preflight"
"""Name of the errand's row and attempts."""
MESSAGE_LENGTH, SHORT_LENGTH = 96, 44
"""Of a row's message once given up, and while the stage is to be tried again (all at once may)."""
STAGE_LENGTH = 48


def brief(text: str, length: int = MESSAGE_LENGTH) -> str:
    """`text` on one line, cut to a length."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."


def _unix(value: object) -> object:
    return int(datetime.fromisoformat(value).timestamp()) if isinstance(value, str) else value


def _rfc3339(value: int) -> str:
    return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


Time = Annotated[
    int, BeforeValidator(_unix), PlainSerializer(_rfc3339, return_type=str, when_used="json")
]
"""Whole unix seconds in Python, RFC 3339 in UTC as JSON: what is read is what was written."""


class State(StrEnum):
    """Where a stage is."""

    PENDING = "Pending"
    """Its inputs are not there yet, or its turn has not come."""
    WAITING = "WaitingFor"
    """Another run, or another stage of this one, makes the same artifact; see `waitsFor`."""
    STARTING = "Starting"
    """The attempt is decided (an intent, until `handle` is set) or its process not begun."""
    QUEUED = "Queued"
    """The attempt is held by a queue outside of the engine; deadlines pause."""
    RUNNING = "Running"
    """The attempt's process runs."""
    STOPPING = "Stopping"
    """The engine asked the attempt to stop; what it leaves is not counted."""
    BACK_OFF = "BackOff"
    """The last attempt failed or was lost; the next one begins at `retryTime`."""
    COMPLETE = "Complete"
    """The artifact is committed; with attempt 0 it was there before this run."""
    FAILED = "Failed"
    """Given up, until `btx retry` or an accepted edit."""
    LATE = "Late"
    """An expert that missed `policy.expertDeadlineSeconds` and is left out."""


ACTIVE = (State.STARTING, State.QUEUED, State.RUNNING)
"""States with an attempt that the engine wants."""


class Invalid(Model):
    """A corrupt copy of a stage's artifact."""

    tag: Annotated[str, Field(max_length=80)]
    """Of the manifest that the next attempt ignores and replaces."""
    count: int
    """Times that the artifact was found corrupt; the third time the stage fails."""


class Row(Model):
    """One stage, or the preflight errand. What a finished attempt leaves is here, nowhere else."""

    name: Annotated[str, Field(max_length=30)]
    """Unique in the run: `<kind>`, `<kind>-<domain or expert>`, or `preflight`."""
    digest: Annotated[str, Field(max_length=32)]
    """Of the stage; of preflight: of what it is asked."""
    state: State = State.PENDING
    """Where the stage is."""
    attempt: int = 0
    """Number of the latest attempt, from 1; 0: never tried in this run."""
    handle: Annotated[str, Field(max_length=36)] = ""
    """The backend's name for the attempt (Job uid, process id) once seen; empty when it ended."""
    start_time: Time | None = None
    """Since when the attempt's process runs."""
    seconds: int = 0
    """Running time of the attempts that ended, in seconds."""
    failures: int = 0
    """Attempts that failed and count against `policy.maxRetries`."""
    preemptions: int = 0
    """Attempts that were preempted after a checkpoint; never counted as failures."""
    replaced: int = 0
    """Of these, processes of the latest attempt that its backend began again by itself."""
    lost: int = 0
    """Attempts that vanished without a result; never counted as failures."""
    exit: int | None = None
    """Exit code of the last attempt if it failed; empty while the next one is active."""
    retry_time: Time | None = None
    """Earliest start of the next attempt."""
    check: bool = False
    """The last attempt ended well but its Result was lost: the next one only looks for it."""
    waits_for: Annotated[str, Field(max_length=110)] = ""
    """`<run>/<stage>` or `<stage>` that makes the same artifact."""
    invalid: Invalid | None = None
    """Set once a reader found the artifact corrupt; stays after the repair."""
    gain: Real | None = None
    """Of a complete train stage: own held-out loss before minus after, in nats per token."""
    token: Annotated[str, Field(max_length=16)] = ""
    """Attempt folder of the artifact, as far as known; prepare rows do without."""
    dead_experts: Annotated[str, Field(max_length=SHORT_LENGTH)] = ""
    """`<count>: <layer>.<expert>, ...` that next to no tokens reach; cut; empty: none."""
    message: Annotated[str, Field(max_length=MESSAGE_LENGTH)] = ""
    """Why the last attempt ended badly; empty while the next one is active."""

    @property
    def kind(self) -> Kind:
        """Of the stage; the name begins with it."""
        return Kind(self.name.split("-")[0])


class ConditionType(StrEnum):
    """Every condition is present from the first look on."""

    ACCEPTED = "Accepted"
    """True: the engine works to the spec as it stands."""
    QUEUED = "Queued"
    """True: nothing runs because something outside of this run has to come first."""
    RUNNING = "Running"
    """True: at least one stage's process runs."""
    SUSPENDED = "Suspended"
    """True: the user stopped the run; its checkpoints are kept."""
    SUCCEEDED = "Succeeded"
    """The summary: True or False once the run has ended, Unknown before."""


class Reason(StrEnum):
    """Reasons of conditions, and of the events that tell of their change."""

    ACCEPTED = "Accepted"
    """Accepted=True."""
    PREFLIGHT = "Preflight"
    """Accepted=Unknown: the inputs of a new run are being looked at."""
    EDIT_PENDING = "EditPending"
    """Accepted=Unknown: the inputs of a changed run are; attempts go on, nothing starts."""
    INVALID_SPEC = "InvalidSpec"
    """Accepted=False: the spec cannot be read; see `problems`."""
    IMMUTABLE = "Immutable"
    """Accepted=False: method, seed or storage.uri changed."""
    PROBLEMS_FOUND = "ProblemsFound"
    """Accepted=False: preflight found something to mend; see `problems`. Looked at again."""
    PREFLIGHT_FAILED = "PreflightFailed"
    """Accepted=False: preflight itself failed more than maxRetries times. Tried again."""
    DUPLICATE_EXPERTS = "DuplicateExperts"
    """Accepted=False: two experts are one and the same model."""
    WOULD_RETRAIN = "WouldRetrain"
    """Accepted=False: trained experts would be trained again, without policy.allowRetrain."""
    IMAGE_TOO_OLD = "ImageTooOld"
    """Accepted=False: the run keeps a trainer image that this engine cannot talk to."""
    QUEUED = "Queued"
    """Queued=True: a queue that the user named holds the attempts."""
    EXTERNALLY_SUSPENDED = "ExternallySuspended"
    """Queued=True: somebody suspended the attempts, and no queue was named."""
    WAITING_FOR = "WaitingFor"
    """Queued=True: another run makes the artifact that this one needs next."""
    NOT_QUEUED = "NotQueued"
    """Queued=False."""
    STAGES_RUNNING = "StagesRunning"
    """Running=True; the message names them."""
    BLOCKED = "Blocked"
    """Running=False: an attempt cannot begin; the message says why, and which field to mend."""
    NOTHING_RUNNING = "NothingRunning"
    """Running=False."""
    SUSPENDED = "Suspended"
    """Suspended=True: `spec.suspend`."""
    INTERRUPTED = "Interrupted"
    """Suspended=True: `btx run` was interrupted."""
    NOT_SUSPENDED = "NotSuspended"
    """Suspended=False."""
    IN_PROGRESS = "InProgress"
    """Succeeded=Unknown."""
    COMPLETE = "Complete"
    """Succeeded=True: every stage that the result needs is complete."""
    EXPERT_FAILED = "ExpertFailed"
    """Succeeded=False: an expert failed under failurePolicy FailRun."""
    TOO_FEW_EXPERTS = "TooFewExperts"
    """Succeeded=False: fewer than minExperts can still take part."""
    STAGE_FAILED = "StageFailed"
    """Succeeded=False: a stage that the result needs failed."""


class EventReason(StrEnum):
    """Reasons of events about attempts; conditions' reasons are events too."""

    ATTEMPT_STARTED = "AttemptStarted"
    ATTEMPT_FAILED = "AttemptFailed"
    ATTEMPT_PREEMPTED = "AttemptPreempted"
    ATTEMPT_LOST = "AttemptLost"
    ATTEMPT_BLOCKED = "AttemptBlocked"
    ATTEMPT_STOPPED = "AttemptStopped"
    STAGE_COMPLETE = "StageComplete"
    STAGES_REUSED = "StagesReused"
    STAGE_FAILED = "StageGivenUp"
    ARTIFACT_CORRUPT = "ArtifactCorrupt"
    EXPERT_LATE = "ExpertLate"
    EXPERT_DEAD = "ExpertDead"
    EXPERT_ALIVE = "ExpertAlive"
    MEMBERS_DECIDED = "MembersDecided"


Truth = Literal["True", "False", "Unknown"]


class Condition(Model):
    """As metav1.Condition."""

    type: ConditionType
    """Unique in the list."""
    status: Truth
    """True, False or Unknown."""
    reason: Reason
    """Why, in one word."""
    message: Annotated[str, Field(max_length=200)] = ""
    """Why, for a person."""
    last_transition_time: Time
    """When `status` last changed."""
    observed_generation: int = 0
    """Generation of the spec that this is about."""


class Release(Model):
    """What a run was accepted with and keeps. No defaults: they would change with an upgrade."""

    image: Annotated[str, Field(max_length=253)]
    """Trainer image, unless spec.execution.image names one; empty for local processes."""
    task: int
    """Version of Task that this image reads."""
    kinds: dict[Kind, int]
    """Version of each kind of stage."""


class Status(Model):
    """`.status` of a BTXRun."""

    observed_generation: int = 0
    """Generation of the spec that the engine last looked at."""
    generation: int = 0
    """Generation that was accepted last; 0: none yet."""
    # For display only: the columns of `kubectl get btx`. No code reads them.
    state: Annotated[str, Field(max_length=16)] = ""
    """A word made of the conditions."""
    stage: Annotated[str, Field(max_length=STAGE_LENGTH)] = ""
    """Kinds of the stages with an attempt: `finetune`, `prepare, train x3`; empty: none."""
    experts: Annotated[str, Field(max_length=16)] = ""
    """Train stages that are complete, of all: `3/4`; empty while there are none."""
    progress: Annotated[str, Field(max_length=16)] = ""
    """Steps done of the slowest stage that runs: `42%`; empty: unknown."""
    eta: Annotated[str, Field(max_length=16)] = ""
    """Time until that stage ends: `1h10m`; empty: unknown."""
    conditions: Annotated[tuple[Condition, ...], Field(max_length=5)] = ()
    """One per ConditionType, in that order."""
    problems: Annotated[
        tuple[Annotated[str, Field(max_length=PROBLEM_LENGTH)], ...], Field(max_length=8)
    ] = ()
    """What the user must mend before the spec is accepted."""
    model: Annotated[str, Field(max_length=1200)] = ""
    """URI of the final model's folder, once complete."""
    members: Members | None = None
    """Experts in the mix; set before it starts, decided again only when `membersKey` changes."""
    stages: Annotated[tuple[Row, ...], Field(max_length=180)] = ()
    """One row per stage, in the order of the graph."""
    preflight: Row | None = None
    """The errand that resolves the inputs; its digest covers spec and `refresh`."""
    resolved: Resolved | None = None
    """Its last answer; what only acceptance needs is dropped there."""
    inputs: Annotated[tuple[str, ...], Field(max_length=164)] = ()
    """Per fingerprint of `resolved` a hash of its URIs, so that it is kept while they stay."""
    key: str = ""
    """Digest of the preflight whose answer was accepted."""
    release: Release | None = None
    """Set at the first acceptance, then kept."""
    identity: Annotated[tuple[str, ...], Field(max_length=3)] = ()
    """Hashes of the immutable fields: method, seed.uri, storage.uri."""
    members_key: str = ""
    """Hash of expert set, minExperts and expertDeadlineSeconds."""
    expert_seconds: int = 0
    """Time on the clock of expertDeadlineSeconds when it was last paused."""
    expert_since: Time | None = None
    """Since when that clock runs; absent while paused, and once the members are decided."""
    refresh: str = ""
    """Value of the refresh annotation that `resolved` answers."""
    retry: str = ""
    """Value of the retry annotation that was acted on."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """Of every stage, and of preflight at the end."""
        return self.stages if self.preflight is None else (*self.stages, self.preflight)

    def condition(self, kind: ConditionType) -> Condition | None:
        """The condition of a type; None before the first look."""
        return next((c for c in self.conditions if c.type is kind), None)

    @property
    def over(self) -> bool:
        """The run has succeeded or failed."""
        found = self.condition(ConditionType.SUCCEEDED)
        return found is not None and found.status != "Unknown"

    def row(self, name: str) -> Row | None:
        """The row of a stage."""
        return next((row for row in self.stages if row.name == name), None)

    def line(self) -> str:
        """Compact JSON."""
        return self.model_dump_json(exclude_defaults=True)
