"""One stage (exactly what is hashed), the task that an attempt is given, and what it gives back.

Task: written by the engine, read by the trainer. Result, Progress, Exit: the other way round.
"""

import hashlib
import json
from enum import IntEnum, StrEnum
from functools import cached_property
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from btx_api.spec import (
    Average,
    BTXRunSpec,
    Count,
    Evaluate,
    Finetune,
    Mix,
    Model,
    Phase,
    Prepare,
    Real,
    Scheduling,
    Source,
    SourceShape,
    Stitch,
    Storage,
    TaskShape,
    Train,
)

TASK_SCHEMA = 1
"""Raised only when an older trainer would misread a Task."""


MICRO_BATCH_TOKENS = 16_384
"""Of a training stage's forward pass, unless scheduling says how many sequences."""
ROUTER_TOKENS = 65_536
"""Of each expert's data, for a router that starts from it; never more than one batch."""


class Kind(StrEnum):
    """What a stage does; also the name of its spec block, recipe and trainer module."""

    PREPARE = "prepare"
    TRAIN = "train"
    AVERAGE = "average"
    MIX = "mix"
    STITCH = "stitch"
    FINETUNE = "finetune"
    EVALUATE = "evaluate"


VERSIONS: dict[Kind, int] = dict.fromkeys(Kind, 1)
"""Raised only when a kind's results change; a default belongs to its kind's version."""


class Content(Model):
    """An input from outside, by content."""

    fingerprint: str


class Output(Model):
    """An input that another stage makes."""

    digest: str


Input = Content | Output


class PrepareRecipe(Prepare):
    """inputs: (domain, tokenizer unless it is `bytes`). `tokenizer` is `bytes` or `file`."""

    tokenizer: str = "file"
    sources: tuple[SourceShape, ...]


class TrainRecipe(Train):
    """inputs: (seed, prepared domains...). Phases name domains by the index of their input."""

    data: tuple[Phase, ...]


class AverageRecipe(Average):
    """inputs: (seed, members...)."""

    include_seed: bool = True


class MixRecipe(Mix):
    """inputs: (seed, members...); expert i is member i, the seed (if included) is the last."""

    top_k: int


class FinetuneRecipe(Finetune):
    """inputs: (mixed model, prepared domains...). Phases name domains by input index."""

    experts: tuple[int, ...] = ()
    """For DomainMean: per expert the input with its domain, 0 where it has none."""


class EvaluatedModel(Model):
    """One model of the table."""

    label: str
    """Name in the table: an expert's name, or its role."""
    role: str
    """seed, expert, soup, mixed or final."""
    input: int
    """Index of the stage's input."""


class EvaluatedDomain(Model):
    """One column of the table."""

    name: str
    """Name in the table."""
    input: int
    """Index of the stage's input."""


class EvaluatedTask(TaskShape):
    """One task of the table."""

    input: int
    """Index of the stage's input."""


class EvaluateRecipe(Evaluate):
    """inputs: (models..., prepared domains..., files of tasks...)."""

    models: tuple[EvaluatedModel, ...]
    columns: tuple[EvaluatedDomain, ...]
    questions: tuple[EvaluatedTask, ...] = ()
    routing: str = ""
    """Routing method of the mixed and final model; empty for a dense run."""


RECIPES: dict[Kind, type[Model]] = {
    Kind.PREPARE: PrepareRecipe,
    Kind.TRAIN: TrainRecipe,
    Kind.AVERAGE: AverageRecipe,
    Kind.MIX: MixRecipe,
    Kind.STITCH: Stitch,
    Kind.FINETUNE: FinetuneRecipe,
    Kind.EVALUATE: EvaluateRecipe,
}


def canonical(value: Any) -> Any:
    """JSON value with integral floats as integers, so that 1 and 1.0 hash alike."""
    if isinstance(value, dict):
        return {key: canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def recipe_of(block: Model) -> dict[str, Any]:
    """What of a block is hashed: fields that differ from their default, canonical."""
    plain: dict[str, Any] = canonical(block.model_dump(mode="json", exclude_defaults=True))
    return plain


class Stage(Model):
    """One node of the graph."""

    kind: Kind
    version: int
    recipe: dict[str, Any]
    """See `recipe_of`; refers to inputs by index."""
    inputs: tuple[Input, ...]
    """In spec order, never sorted: order is the expert's index."""
    salt: str = ""
    """The run's uid under `policy.reuse: Never`."""

    @cached_property
    def digest(self) -> str:
        """First 32 hex digits of sha256 over canonical JSON; the artifact's address."""
        plain = canonical(self.model_dump(mode="json", exclude_defaults=True))
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class Location(Model):
    """Where one input of a stage is now; never hashed."""

    uri: str = ""
    """Of a model or tokenizer from outside."""
    sources: tuple[Source, ...] = ()
    """Of a domain."""
    kind: Kind | None = None
    """Of another stage's output: its kind (the digest is in the stage's inputs)."""


class TaskExecution(Model):
    """How one attempt runs. The engine writes it, the backend completes listen, scratch, result."""

    storage: Storage
    name: str = ""
    """Stage name within the run, for logs and metrics."""
    run: str = ""
    """Name of the run, for logs, metrics and the manifest."""
    uid: str = ""
    """The run's uid."""
    attempt: int = 1
    inputs: tuple[Location, ...] = ()
    """Same order as the stage's inputs."""
    scheduling: Scheduling = Scheduling()
    replaces: str = ""
    """Tag of a manifest to ignore and replace, after a reader found its artifact corrupt."""
    must_exist: bool = False
    """Return the Result from the manifest or exit Missing; never compute."""
    verify: bool = False
    """Read every byte of an artifact that is there already, and make it again if one is wrong."""
    no_progress_seconds: int = 1800
    listen: str = ""
    """host:port of /metrics and /progress; empty: none. Port 0: chosen and logged."""
    scratch: str = ""
    """Folder for temporary files; empty: a fresh one under TMPDIR."""
    result: str = ""
    """File for the Result; empty: standard output only."""
    image: str = ""
    """Image that runs the attempt, for the manifest."""


class Preflight(Model):
    """Errand: resolve seed and domains, check architecture, tokenizer, storage, completeness."""

    spec: BTXRunSpec
    uid: str
    """The run's uid; salt of its stages under `policy.reuse: Never`."""
    members: tuple[str, ...] | None = None
    """The run's members once decided."""
    without: tuple[str, ...] = ()
    """Their lost domains (methods.Members)."""
    versions: dict[Kind, int] = VERSIONS
    verify: bool = False
    """Read every byte of every complete stage."""
    record: bool = True
    """Write the run's record; False: only asking."""


class ReportRun(Model):
    """One run of a report."""

    name: str
    digest: str
    """Of its evaluate stage."""


class Report(Model):
    """Errand: several runs side by side."""

    runs: tuple[ReportRun, ...]
    folder: str
    """Local folder for report.html and report.json."""


class Export(Model):
    """Errand: copy a model out of storage, every byte verified."""

    kind: Kind
    digest: str
    folder: str
    """Local folder, made new or empty."""
    card: str = ""
    """Digest of the evaluate stage whose model card comes along, as README.md."""


class Gc(Model):
    """Errand: delete artifacts that no run wants: none that is not done, none of the last days."""

    keep_days: int
    dry_run: bool = True
    abandoned_days: int | None = None
    """Runs that are not done are given up when nothing moved for so long; None: never."""
    force: bool = False
    """Also where no run has a record."""


class Task(Model):
    """One stage or errand plus how to run it: what a trainer process is given."""

    schema_version: int = TASK_SCHEMA
    stage: Stage | None = None
    preflight: Preflight | None = None
    report: Report | None = None
    export: Export | None = None
    gc: Gc | None = None
    execution: TaskExecution

    @property
    def work(self) -> Stage | Preflight | Report | Export | Gc:
        """The one of the five that is set."""
        work = self.stage or self.preflight or self.report or self.export or self.gc
        assert work is not None
        return work


class Exit(IntEnum):
    """How a trainer process ends. `decide` acts on the code, never on the log."""

    OK = 0
    """Done: the Result is valid."""
    FAILED = 1
    """Anything else, a signal too: counted, tried again after a back-off."""
    CORRUPT = 65
    """An input's bytes are not what its manifest says: its producer runs again, then this."""
    MISSING = 66
    """`mustExist` was asked and there is no artifact: the stage was not run."""
    STALLED = 70
    """No step for `noProgressSeconds`: counted as a failure."""
    DIVERGED = 71
    """Loss or gradient is not finite: counted as a failure."""
    PREEMPTED = 75
    """SIGTERM, checkpoint written: the next attempt resumes, not counted."""
    CONFIGURATION = 78
    """The input or the recipe is wrong: never tried again until the user changes something."""


GRAVITY = (
    Exit.CONFIGURATION, Exit.CORRUPT, Exit.MISSING, Exit.DIVERGED, Exit.STALLED, Exit.FAILED,
    Exit.PREEMPTED, Exit.OK,
)  # fmt: skip
"""Of several ranks' codes the process exits with the first of these."""


def _fitted(limit: int, *, ends: bool = False) -> AfterValidator:
    """Makes a text one line of at most `limit` bytes as JSON: a Result is bounded by its type.

    `ends`: what is too long loses its middle, so that a field's name and the reason stay.
    """

    def size(line: str) -> int:
        return len(json.dumps(line, ensure_ascii=False).encode()) - 2

    def fit(text: str) -> str:
        line = "".join(c if c.isprintable() else " " for c in text)
        if ends and size(line) > limit:
            head, line = line[: limit // 3] + "…", line[limit // 3 :]
            while size(head + line) > limit and line:
                line = line[max(1, (len(line) - limit // 4) // 8) :]
            line = head + line
        while size(line) > limit:
            line = line[: -max(1, (len(line) - limit // 4) // 8)]
        return line

    return AfterValidator(fit)


PROBLEM_LENGTH = 160
"""Of each line of what preflight has found, in a Result and in a status."""


class Problem(Model):
    """Why an attempt failed, for a person."""

    field: Annotated[str, _fitted(200)] = ""
    """Field path of the spec, or the object (file, tensor, key)."""
    message: Annotated[str, _fitted(800)]
    """One line."""


class Corrupt(Model):
    """Which artifact a reader found corrupt."""

    kind: Kind
    digest: Annotated[str, Field(max_length=32)]
    tag: Annotated[str, Field(max_length=80)]
    """Identity of the manifest that was read (sha256 of its bytes, 32 hex digits)."""


class Parameters(Model):
    """Parameter counts, for plan and report."""

    dense: int = 0
    """Of the seed."""
    total: int = 0
    """Of the mixed model with all experts."""
    active: int = 0
    """Used per token of the mixed model."""
    head: int = 0
    """Of these, parameters of embeddings that take part in no multiplication."""
    embedding: int = 0
    """Of one embedding: vocabulary x width, which is what the loss head multiplies."""
    experts: int = 0
    """Of `active`, parameters of the experts themselves."""
    layers: int = 0
    hidden: int = 0
    """Width of attention (heads x head_dim), for the attention part of FLOPs."""


class Resolved(Model):
    """Preflight's answer; fits a termination message at 64 experts (property test)."""

    seed: Annotated[str, Field(max_length=22)] = ""
    """22 base64url characters of sha256, as every fingerprint here."""
    tokenizer: Annotated[str, Field(max_length=22)] = ""
    """Of the tokenizer.json that prepare uses; empty for `bytes`."""
    domains: Annotated[tuple[Annotated[str, Field(max_length=22)], ...], Field(max_length=96)] = ()
    """In the order of `spec.domains()`."""
    models: Annotated[tuple[Annotated[str, Field(max_length=22)], ...], Field(max_length=64)] = ()
    """Ready experts, in spec order."""
    tasks: Annotated[tuple[Annotated[str, Field(max_length=22)], ...], Field(max_length=32)] = ()
    """Files of `evaluate.tasks`, in spec order."""
    complete: Annotated[str, Field(max_length=64)] = ""
    """Hexadecimal bitmap over the graph's stages in order: bit i set = stage i is complete."""
    gains: Annotated[tuple[Real | None, ...], Field(max_length=64)] = ()
    """Per expert in spec order: own held-out loss before minus after, rounded to 4 digits."""
    token: Annotated[str, Field(max_length=16)] = ""
    """Attempt folder of the final model, if complete."""
    parameters: Parameters = Parameters()
    corrupt: Annotated[tuple[Corrupt, ...], Field(max_length=4)] = ()
    """Complete stages whose bytes are wrong (`verify`)."""
    problems: Annotated[
        tuple[Annotated[str, _fitted(PROBLEM_LENGTH, ends=True)], ...], Field(max_length=8)
    ] = ()
    """What the user must mend; empty: accepted."""


MAX_METRICS = 16


class Result(Model):
    """What an attempt leaves; as compact JSON never over 4,096 bytes, by the bounds above."""

    digest: Annotated[str, Field(max_length=32)] = ""
    token: Annotated[str, Field(max_length=16)] = ""
    """The attempt folder that the manifest names."""
    tag: Annotated[str, Field(max_length=80)] = ""
    reused: bool = False
    """The artifact was there before this attempt."""
    resumed_step: int = 0
    """Step of the checkpoint that the attempt began from."""
    seconds: Real = 0.0
    """Of this attempt."""
    metrics: dict[Annotated[str, Field(max_length=40)], Real] = Field(
        default_factory=dict, max_length=MAX_METRICS
    )
    """Headline numbers (loss, gain, tokens); the same as in the manifest."""
    problem: Problem | None = None
    corrupt: Corrupt | None = None
    resolved: Resolved | None = None
    text: Annotated[str, _fitted(600)] = ""
    """An errand's answer in words."""

    def line(self) -> str:
        """Compact JSON."""
        return self.model_dump_json(exclude_defaults=True)


class Progress(Model):
    """The only value a running stage publishes; telemetry renders it (log, /metrics, /progress)."""

    kind: Kind | None = None
    phase: str = ""
    """What it does now, in a word: loading, training, evaluating, committing."""
    step: int = 0
    steps: int = 0
    """Steps in all; for stages without steps: units of work (bytes, tensors, batches)."""
    tokens: Count = 0
    tokens_per_second: Real = 0.0
    loss: Real | None = None
    balance: Real | None = None
    """Balancing loss divided by layers * alpha: 1 at balance."""
    grad_norm: Real | None = None
    lr: Real | None = None
    eta_seconds: Real | None = None
    checkpoint_step: int = 0
    checkpoint_time: Real = 0.0
    """Unix time of the last committed checkpoint; 0: none."""
    expert_load: tuple[Real, ...] = ()
    """Share of slots per expert, mean over layers."""
    dead_experts: tuple[str, ...] = ()
    """`layer.expert` of each expert that is dead now."""
    time: Real = 0.0
    """Unix time of this value."""
