"""What a user may ask for: `.spec` of a BTXRun, one block per kind of stage.

A block is that stage's recipe: the engine turns it into stages (methods.py), the trainer gets it.
Written by the user only; a field may change after creation unless its docstring says immutable.
"""

import json
import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails

POWERS = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}
COUNT_LENGTH = 32
COUNT_PATTERN = (
    r"^[0-9]+(\.0+|"
    + "|".join(rf"(\.[0-9]{{1,{n}}}0*)?{unit}" for unit, n in POWERS.items() if n)
    + ")?$"
)
"""Strings that parse_count reads: no more digits after the point than the unit makes whole."""
NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
URI_PATTERN = r"^(file|s3|hf)://.+$"
GENERAL = "general"
MAX_DOMAINS = 96
"""Preflight's answer has room for so many fingerprints."""


def parse_count(value: object) -> int:
    """Integer or string such as `210B` (powers of ten: K, M, B, T) -> int; ValueError otherwise."""
    value = _integer(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = value if isinstance(value, str) and len(value) <= COUNT_LENGTH else ""
    match = re.fullmatch(r"([0-9]+)(?:\.([0-9]+))?([KMBT]?)", text)
    if not match:
        raise ValueError("a count is an integer or a string such as '210B' (K, M, B, T)")
    whole, fraction, power = match[1], (match[2] or "").rstrip("0"), POWERS[match[3]]
    if len(fraction) > power:
        raise ValueError(f"{value!r} is not a whole number")
    return int(whole + fraction.ljust(power, "0"))


def _integer(value: object) -> object:
    # The API server hands 2.0 back as 2; both readers must agree on what an integer is.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Count = Annotated[
    int, BeforeValidator(parse_count), Field(ge=0, le=10**18, json_schema_extra={"count": True})
]
Integer = Annotated[int, BeforeValidator(_integer), Field(strict=True)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Seconds = Annotated[Integer, Field(ge=1, le=10**9)]
Weight = Annotated[Real, Field(ge=0, le=1e12)]
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=20)]
Uri = Annotated[str, Field(pattern=URI_PATTERN, max_length=1024)]
Text = Annotated[str, Field(min_length=1, max_length=253)]


def _json(value: dict[str, Any]) -> dict[str, Any]:
    # YAML has more: infinite numbers, half characters. What is passed on as JSON must be JSON.
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    return value


KubernetesObject = Annotated[dict[str, Any], AfterValidator(_json)]
"""An object that Kubernetes owns and checks (a toleration, an affinity); carried as it is."""


class Model(BaseModel):
    """Base of every type of the contract: frozen, camelCase outside, unknown fields refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        serialize_by_alias=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    @classmethod
    def parse(cls, value: object) -> Self:
        """Reads outside data (camelCase only); raises pydantic.ValidationError, see `explain`."""
        return cls.model_validate(value, by_name=False, by_alias=True)

    def plain(self) -> dict[str, Any]:
        """JSON-ready mapping with camelCase keys; None and unset optional values left out."""
        return self.model_dump(mode="json", exclude_none=True)


M = TypeVar("M", bound="Model")


class Method(StrEnum):
    """Functions from a spec to stages (methods.py)."""

    BTX = "BTX"
    DENSE = "Dense"
    UPCYCLING = "Upcycling"
    BTM = "BTM"
    BTS = "BTS"


class SourceFormat(StrEnum):
    AUTO = "Auto"
    JSONL = "JSONL"
    PARQUET = "Parquet"
    TEXT = "text"


class Precision(StrEnum):
    BF16 = "bf16"
    FP32 = "fp32"


class RouterInit(StrEnum):
    RANDOM = "Random"
    ZERO = "Zero"


class DataInit(StrEnum):
    KEEP = "Keep"
    DOMAIN_MEAN = "DomainMean"


class RoutingMethod(StrEnum):
    TOP_K = "TopK"
    SWITCH = "Switch"
    SAMPLE_TOP1 = "SampleTop1"
    SOFT = "Soft"


class Trainable(StrEnum):
    ALL = "All"
    ALL_BUT_EXPERTS = "AllButExperts"
    ROUTER = "Router"


class AverageWeights(StrEnum):
    UNIFORM = "Uniform"
    POSTERIOR = "Posterior"


class TaskKind(StrEnum):
    MULTIPLE_CHOICE = "MultipleChoice"
    EXACT_MATCH = "ExactMatch"


class FailurePolicy(StrEnum):
    FAIL_RUN = "FailRun"
    QUORUM = "Quorum"


class OnNoGain(StrEnum):
    KEEP = "Keep"
    DROP = "Drop"


class Reuse(StrEnum):
    VERIFIED = "Verified"
    NEVER = "Never"


# What this release serves; every other value of these enums is refused by name.
SERVED: tuple[StrEnum, ...] = (
    Method.BTX, Method.DENSE, RoutingMethod.TOP_K, RoutingMethod.SOFT, AverageWeights.UNIFORM,
)  # fmt: skip


def _check_served(field: str, value: StrEnum) -> None:
    if value not in SERVED:
        served = ", ".join(v.value for v in SERVED if type(v) is type(value))
        raise ValueError(f"{field}: {value.value} is not served by this release (served: {served})")


class SecretRef(Model):
    """A Secret of the run's namespace."""

    name: Text
    """Name of the Secret; its keys become environment variables of the trainer."""


class Storage(Model):
    """Where every artifact of the run lives. The prefix is the trust boundary between tenants."""

    uri: Uri
    """`file://folder` (relative to the working directory) or `s3://bucket/prefix`. Immutable."""
    endpoint: Annotated[str, Field(pattern=r"^https?://.+$", max_length=512)] | None = None
    """URL of an S3-compatible server; default: the cloud's own."""
    region: Text | None = None
    """S3 region; default: the client's default chain."""
    path_style: Flag = False
    """Bucket in the path, not in the host name; most self-hosted servers need it."""
    credentials_secret_ref: SecretRef | None = None
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; default: the client's chain."""
    ca_bundle: Text | None = None
    """File with certificate authorities (on a cluster: a ConfigMap's name, key ca.crt)."""

    @model_validator(mode="after")
    def _scheme(self) -> Self:
        if self.uri.startswith("hf://"):
            raise ValueError("uri: storage is file:// or s3://")
        return self


class Seed(Model):
    """The model that is branched."""

    uri: Uri
    """Folder in Hugging Face layout: file://, s3://, or hf://repo@commit. Immutable."""
    token_secret_ref: SecretRef | None = None
    """Secret with HF_TOKEN for gated repositories."""


class SourceShape(Model):
    """How a source's records are read: the part of a source that its prepare stage hashes."""

    format: SourceFormat = SourceFormat.AUTO
    """Auto goes by the ending: .jsonl, .json -> JSONL, .parquet -> Parquet, else text."""
    field: Annotated[str, Field(min_length=1, max_length=128)] = "text"
    """JSONL field or Parquet column that holds the text; not read for format text."""
    weight: Weight = 1.0
    """Relative probability of a token of this domain to come from here (methods.md 1.6)."""


class Source(SourceShape):
    """One URI pattern with format and weight."""

    uri: Uri
    """File, prefix ending in `/`, or glob (`*`, `**`)."""


Sources = Annotated[tuple[Source, ...], Field(max_length=256)]


class Optimizer(Model):
    """AdamW, linear warm-up, one cosine over all phases (BTX paper section 4.1)."""

    lr: Annotated[Real, Field(ge=1e-12, le=10)] = 1e-4
    """Peak learning rate."""
    warmup_steps: Annotated[Integer, Field(ge=0, le=10**7)] = 100
    """Steps of linear warm-up."""
    min_lr_ratio: Annotated[Real, Field(ge=0, le=1)] = 0.1
    """Learning rate at the end, as a share of the peak."""
    weight_decay: Annotated[Real, Field(ge=0, le=10)] = 0.1
    """Decoupled decay of matrices; norms and biases are not decayed."""
    beta1: Annotated[Real, Field(ge=0, le=0.99999)] = 0.9
    """First moment's decay (Llama-2; the BTX paper gives none)."""
    beta2: Annotated[Real, Field(ge=0, le=0.99999)] = 0.95
    """Second moment's decay (Llama-2; the BTX paper gives none)."""
    eps: Annotated[Real, Field(ge=1e-15, le=1)] = 1e-8
    """Added to the root of the second moment."""
    clip: Annotated[Real, Field(ge=0, le=1e6)] = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches it off."""


class Prepare(Model):
    """Turns a domain's sources into token shards and a held-out split, on CPU."""

    tokenizer: Annotated[str, Field(pattern=r"^(seed|bytes|(file|s3|hf)://.+)$")] = "seed"
    """`seed` (its tokenizer.json), `bytes` (built in: 256 bytes + 4 specials), or a URI of one."""
    held_out: Annotated[Real, Field(ge=0, le=0.5)] = 0.01
    """Share of documents, chosen by their content, that no training sees."""
    max_record_bytes: Count = 16_777_216
    """Longer records are counted as oversized and left out."""


class Train(Model):
    """Continues pretraining of the seed (an expert, or the dense baseline)."""

    sequence_length: Annotated[Integer, Field(ge=8, le=1_048_576)] = 4096
    """Tokens per packed sequence."""
    batch_tokens: Count = 4_194_304
    """Tokens per optimizer step over all ranks; a multiple of sequenceLength."""
    precision: Precision = Precision.BF16
    """Compute dtype; master weights and moments are always fp32."""
    random_seed: Annotated[Integer, Field(ge=0, le=2**31 - 1)] = 0
    """Seeds the data order and every random draw."""
    held_out_tokens: Count = 131_072
    """At most so many held-out tokens per domain for the loss before step 0 and at the end."""
    optimizer: Optimizer = Optimizer()
    """The optimizer and its schedule; starts afresh in every stage."""


class Phase(Model):
    """A stretch of training with one mixture of domains."""

    tokens: Count
    """Tokens drawn in this phase; rounded up to whole steps."""
    domains: Annotated[
        dict[Annotated[str, Field(max_length=20)], Weight], Field(max_length=MAX_DOMAINS)
    ]
    """Relative token probability per domain name (in a stage's recipe: per input index)."""

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if not any(self.domains.values()):
            raise ValueError("domains: needs at least one weight above 0")
        return self


Phases = Annotated[tuple[Phase, ...], Field(max_length=16)]


class Average(Model):
    """The uniform soup of the mixed models: a baseline, and Branch-Train-Merge's model."""

    weights: AverageWeights = AverageWeights.UNIFORM
    """Uniform, or by domain posterior (BTM)."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        _check_served("weights", self.weights)
        return self


class Mix(Model):
    """Builds the Mixture-of-Experts model (BTX paper section 3.2); never runs a model."""

    include_seed: Flag = True
    """The untouched seed is one more expert (the last) and part of every average."""
    router_init: RouterInit = RouterInit.RANDOM
    """Random: normal with routerStd; Zero."""
    router_std: Annotated[Real, Field(ge=0, le=10)] = 0.02
    """Standard deviation of a random router."""
    random_seed: Annotated[Integer, Field(ge=0, le=2**31 - 1)] = 0
    """Seeds the random router."""


class Stitch(Train):
    """Branch-Train-Stitch: trains stitch layers between frozen experts. Not served yet."""

    layers: Annotated[Integer, Field(ge=1, le=1024)] = 4
    """Number of stitch layers, the last after the last block (BTS paper section 3)."""
    data: Phases = ()
    """Phases of domains."""


class Routing(Model):
    """How tokens choose experts, and how that is trained (BTX paper section 3.3)."""

    method: RoutingMethod = RoutingMethod.TOP_K
    """TopK: softmax over the k largest logits. Soft: all experts."""
    k: Annotated[Integer, Field(ge=1, le=256)] = 2
    """Experts per token; at least 2 with TopK, whose router gets no gradient at 1."""
    alpha: Annotated[Real, Field(ge=0, le=100)] = 0.01
    """Weight of the balancing loss, per layer (methods.md 1.3)."""
    init: DataInit = DataInit.KEEP
    """Keep the mix's router, or set its rows to each domain's mean hidden state first."""
    capacity_factor: Annotated[Real, Field(ge=0.1, le=100)] = 1.5
    """Switch only: tokens an expert takes, as a multiple of its even share."""
    anneal_rate: Annotated[Real, Field(ge=0, le=1)] = 1e-4
    """SampleTop1 only: r in tau = max(minTemperature, exp(-r t))."""
    min_temperature: Annotated[Real, Field(ge=0.01, le=10)] = 0.5
    """SampleTop1 only: the floor of tau."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        _check_served("method", self.method)
        if self.method is RoutingMethod.TOP_K and self.k == 1:
            raise ValueError(
                "k: 1 with TopK gives the router no gradient; use method Switch or SampleTop1"
            )
        readers = {"capacity_factor": "Switch", "anneal_rate": "SampleTop1",
                   "min_temperature": "SampleTop1"}  # fmt: skip
        for name, reader in readers.items():
            # A defaulting API server sets the field too, so only another value is a wish.
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{to_camel(name)}: is read by method {reader} only")
        return self

    def top_k(self, experts: int) -> int:
        """How many of so many experts a token uses."""
        return experts if self.method is RoutingMethod.SOFT else min(self.k, experts)


class Finetune(Train):
    """Trains the mixed model; its router learns here."""

    trainable: Trainable = Trainable.ALL
    """All parameters, all but the experts, or the router alone."""
    routing: Routing = Routing()
    """The routing rule and its losses."""
    data: Phases = ()
    """One phase (BTX). Default: each expert's domain by its tokens, and general at 20 %."""


class EvaluationDomain(Model):
    """A domain that every model is measured on."""

    name: Name
    """An expert's name, `general`, or a new name with its own data."""
    data: Sources = ()
    """Sources of a domain that nobody trains on; empty for a domain of the run."""


class TaskShape(Model):
    """How a task is asked: the part of it that the evaluation hashes."""

    name: Name
    """Label in the report; no domain of the evaluation has it."""
    kind: TaskKind = TaskKind.MULTIPLE_CHOICE
    """MultipleChoice: by log-likelihood of the choices. ExactMatch: greedy decoding of a line."""
    shots: Annotated[Integer, Field(ge=0, le=64)] = 0
    """Answered records put before each question: the file's first ones, which are not scored."""
    max_new_tokens: Annotated[Integer, Field(ge=1, le=4096)] = 64
    """ExactMatch only: an answer without an end of line ends after so many tokens."""


class EvaluationTask(TaskShape):
    """Questions from the user's JSONL: `question`, `answer`, and `choices` of a MultipleChoice.

    {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}; the answer is the index of a
    choice, from 0, or its text. Of an ExactMatch it is a text, or a list of all that are right.
    """

    uri: Annotated[str, Field(pattern=r"^(file|s3)://.+$", max_length=1024)]
    """JSONL file, prefix ending in `/`, or glob (`*`, `**`): file:// or s3://."""


class Evaluate(Model):
    """Measures seed, experts, soup and final model on every domain."""

    domains: Annotated[tuple[EvaluationDomain, ...], Field(max_length=MAX_DOMAINS)] = ()
    """Default: every expert's domain and general."""
    tokens: Count = 1_048_576
    """At most so many held-out tokens per domain and model."""
    sequence_length: Annotated[Integer, Field(ge=8, le=1_048_576)] = 4096
    """Tokens of context at the most."""
    precision: Precision = Precision.BF16
    """Compute dtype."""
    tasks: Annotated[tuple[EvaluationTask, ...], Field(max_length=32)] = ()
    """Downstream tasks, from the user's files."""


class Policy(Model):
    """When to try again, when to give up, who takes part. Never hashed; acts at once."""

    max_retries: Annotated[Integer, Field(ge=0, le=100)] = 2
    """Failed attempts of a stage that are followed by another; preemptions do not count."""
    backoff_seconds: Annotated[Integer, Field(ge=0, le=86_400)] = 10
    """Wait after the first failure; doubles with each, 10 minutes at the most."""
    active_deadline_seconds: Seconds | None = None
    """Running time of one stage over all its attempts, in seconds."""
    pending_deadline_seconds: Seconds | None = None
    """Time an attempt may wait for its pod to start while not suspended."""
    no_progress_seconds: Annotated[Integer, Field(ge=10, le=10**9)] = 1800
    """A stage without a step for so long exits as stalled (judged in the trainer)."""
    failure_policy: FailurePolicy = FailurePolicy.FAIL_RUN
    """FailRun: one failed expert fails the run. Quorum: it counts as missing."""
    min_experts: Annotated[Integer, Field(ge=1, le=64)] | None = None
    """Least experts to mix under Quorum or after expertDeadlineSeconds; default: all."""
    expert_deadline_seconds: Seconds | None = None
    """From acceptance; experts not complete by then are late and left out. Pauses with the run."""
    max_parallel_experts: Annotated[Integer, Field(ge=1, le=64)] | None = None
    """Limits how many train stages run at once."""
    on_no_gain: OnNoGain = OnNoGain.KEEP
    """What to do with an expert whose own held-out loss did not fall below the seed's."""
    reuse: Reuse = Reuse.VERIFIED
    """Never: every stage is computed for this run alone."""
    allow_retrain: Flag = False
    """Lets an edit change the recipe or data of an expert that is already trained."""


class Scheduling(Model):
    """How the processes of a kind run; never hashed, never changes a result's meaning."""

    threads: Annotated[Integer, Field(ge=1, le=1024)] | None = None
    """CPU threads per process; default: the cores that the stage has for itself."""
    micro_batch: Annotated[Integer, Field(ge=1, le=65_536)] | None = None
    """Sequences per forward pass and rank; default: what fits."""
    compile: Flag = False
    """torch.compile the model."""
    checkpoint_seconds: Annotated[Integer, Field(ge=1, le=86_400)] = 900
    """Time between checkpoints."""
    dead_expert_steps: Annotated[Integer, Field(ge=1, le=10**6)] = 100
    """Steps with a share of slots below 0.1 k/N after which an expert is reported dead."""
    processes: Annotated[Integer, Field(ge=1, le=64)] | None = None
    """Ranks per node of train, finetune and stitch; default: one per GPU, else one."""
    nodes: Annotated[Integer, Field(ge=1, le=1024)] = 1
    """Nodes per attempt. Cluster only, as all that follow."""
    gpus: Annotated[Integer, Field(ge=0, le=16)] = 0
    """GPUs per node."""
    resources: KubernetesObject | None = None
    """Container resources (requests, limits)."""
    node_selector: dict[str, str] | None = None
    """Labels a node must have."""
    tolerations: tuple[KubernetesObject, ...] = ()
    """Pod tolerations."""
    affinity: KubernetesObject | None = None
    """Pod affinity."""
    priority_class_name: Text | None = None
    """Pod priority class."""
    runtime_class_name: Text | None = None
    """Pod runtime class."""
    queue_name: Text | None = None
    """Kueue local queue."""
    service_account_name: Text | None = None
    """One of the service accounts that the chart lists."""
    env: tuple[KubernetesObject, ...] = ()
    """Environment variables of the trainer."""
    volumes: tuple[KubernetesObject, ...] = ()
    """emptyDir, persistentVolumeClaim or configMap volumes, each with a mountPath."""
    labels: dict[str, str] | None = None
    """Pod labels outside btx.dev."""
    annotations: dict[str, str] | None = None
    """Pod annotations outside btx.dev."""
    termination_grace_period_seconds: Annotated[Integer, Field(ge=5, le=86_400)] = 300
    """Time for the last checkpoint after SIGTERM."""


class Execution(Model):
    """How it runs, per kind; never hashed."""

    image: Text | None = None
    """Trainer image; default: the chart's."""
    prepare: Scheduling = Scheduling()
    """Scheduling of prepare stages."""
    train: Scheduling = Scheduling()
    """Scheduling of train stages."""
    average: Scheduling = Scheduling()
    """Scheduling of the average stage."""
    mix: Scheduling = Scheduling()
    """Scheduling of the mix stage."""
    stitch: Scheduling = Scheduling()
    """Scheduling of the stitch stage."""
    finetune: Scheduling = Scheduling()
    """Scheduling of the finetune stage."""
    evaluate: Scheduling = Scheduling()
    """Scheduling of the evaluate stage."""


class Expert(Model):
    """One branch: a copy of the seed trained on its own domain, or a ready model."""

    name: Name
    """Unique; also the name of its domain."""
    tokens: Count = 0
    """Tokens to train on; rounded up to whole steps."""
    data: Sources = ()
    """The domain's sources."""
    model: Uri | None = None
    """A ready dense checkpoint of the seed's architecture: no train stage."""
    train: Train | None = None
    """Overlay: only what is set replaces the run's train block."""
    execution: Scheduling | None = None
    """Overlay: only what is set replaces the run's execution.train block."""

    @field_serializer("train", "execution", when_used="unless-none")
    def _only_what_is_set(self, over: Model) -> dict[str, Any]:
        # A default that is written would override the run's block; one left out would not.
        return over.model_dump(mode="json", exclude_unset=True)

    @model_validator(mode="after")
    def _trained_or_ready(self) -> Self:
        if self.name == GENERAL:
            raise ValueError(f"name: {GENERAL!r} is the seed's own data; see spec.general")
        if self.model is None and not self.data:
            raise ValueError("data: an expert needs data, or model for a ready checkpoint")
        if self.model is None and not self.tokens:
            raise ValueError("tokens: an expert with data needs a number of tokens above 0")
        if self.model is not None and self.tokens:
            raise ValueError("tokens: a ready expert (model) is not trained")
        if self.model is not None and self.train is not None:
            raise ValueError("train: a ready expert (model) is not trained")
        return self


def overlay(base: M, over: M | None) -> M:
    """`base` with the fields that were set in `over`, recursively; raises ValidationError."""
    if over is None:
        return base
    changed = {}
    for name in over.model_fields_set:
        ours, theirs = getattr(base, name), getattr(over, name)
        changed[name] = overlay(ours, theirs) if isinstance(ours, Model) else theirs
    return type(base).model_validate({**dict(base), **changed})


class BTXRunSpec(Model):
    """One seed, its experts, and what is made of them."""

    method: Method = Method.BTX
    """Immutable."""
    storage: Storage
    """Where artifacts live; its uri is immutable."""
    seed: Seed
    """The model that is branched; immutable."""
    general: Sources = ()
    """The seed's own data: the domain `general`, for finetuning and for measuring forgetting."""
    experts: Annotated[tuple[Expert, ...], Field(min_length=1, max_length=64)]
    """The branches, in the order of the experts' indices."""
    prepare: Prepare = Prepare()
    """Recipe of every prepare stage."""
    train: Train = Train()
    """Recipe of every train stage; an expert may overlay it."""
    average: Average = Average()
    """Recipe of the soup."""
    mix: Mix = Mix()
    """Recipe of the mixed model."""
    stitch: Stitch | None = None
    """Recipe of BTS."""
    finetune: Finetune = Finetune()
    """Recipe of the finetune stage."""
    evaluate: Evaluate = Evaluate()
    """Recipe of the evaluation."""
    policy: Policy = Policy()
    """When to try again and when to give up."""
    execution: Execution = Execution()
    """How the stages' processes run."""
    suspend: Flag = False
    """Stops all work after a checkpoint, until false again; acts at once."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_served("method", self.method)
        for problem in _problems(self):
            raise ValueError(problem)
        return self

    def domains(self) -> dict[str, tuple[Source, ...]]:
        """Every domain with data of its own: experts' in spec order, general, evaluation-only."""
        found = {expert.name: expert.data for expert in self.experts if expert.data}
        if self.general:
            found[GENERAL] = self.general
        found.update({d.name: d.data for d in self.evaluate.domains if d.data})
        return found

    def expert_train(self, expert: Expert) -> Train:
        """The run's train block overlaid by the expert's."""
        return overlay(self.train, expert.train)

    def mixed_experts(self, members: int) -> int:
        """Number of experts in each mixed layer for so many members."""
        return members + self.mix.include_seed


def _problems(spec: BTXRunSpec) -> Iterator[str]:
    """What no single block can see, first problem first, each naming its field."""
    names = [expert.name for expert in spec.experts]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield f"experts[{i}].name: {name!r} is used by experts[{names.index(name)}] already"
    yield from _unserved(spec)
    yield from _recipe_problems(spec)
    yield from _domain_problems(spec)
    policy = spec.policy
    if policy.min_experts is not None and policy.min_experts > len(names):
        yield f"policy.minExperts: {policy.min_experts} of {len(names)} experts"
    if spec.method is not Method.DENSE:
        routing, total = spec.finetune.routing, spec.mixed_experts(len(names))
        if routing.method is RoutingMethod.TOP_K and routing.k > total:
            yield f"finetune.routing.k: {routing.k} is more than the {total} mixed experts"


def _unserved(spec: BTXRunSpec) -> Iterator[str]:
    if spec.stitch is not None:
        yield "stitch: is read by method BTS only, which this release does not serve"
    if spec.method is Method.DENSE:
        for name, unread in {**_dense_unread(spec), "average": spec.average != Average(),
                             "mix": spec.mix != Mix()}.items():  # fmt: skip
            if unread:
                yield f"{name}: is not read by method Dense"


def _dense_unread(spec: BTXRunSpec) -> dict[str, bool]:
    # By value, not by "was it set": an API server sets every default.
    plain = Finetune()
    unread = {
        f"finetune.{to_camel(name)}": getattr(spec.finetune, name) != getattr(plain, name)
        for name in Finetune.model_fields
        if name != "data"
    }
    for i, expert in enumerate(spec.experts):
        unread[f"experts[{i}].model"] = expert.model is not None
        unread[f"experts[{i}].train"] = expert.train is not None
    return unread


def _recipe_problems(spec: BTXRunSpec) -> Iterator[str]:
    recipes: list[tuple[str, Train]] = [("train", spec.train), ("finetune", spec.finetune)]
    recipes += [
        (f"experts[{i}].train", spec.expert_train(expert))
        for i, expert in enumerate(spec.experts)
        if expert.train
    ]
    for path, recipe in recipes:
        if not recipe.batch_tokens or recipe.batch_tokens % recipe.sequence_length:
            yield (
                f"{path}.batchTokens: {recipe.batch_tokens} is not a positive multiple of "
                f"sequenceLength {recipe.sequence_length}"
            )


def _domain_problems(spec: BTXRunSpec) -> Iterator[str]:
    known = spec.domains()
    if len(known) > MAX_DOMAINS:
        yield f"evaluate.domains: {len(known)} domains of the run have data, {MAX_DOMAINS} may"
    for name, sources in known.items():
        if not any(source.weight for source in sources):
            yield f"{_path_of(spec, name)}: all weights are 0"
    data = (spec.general, spec.finetune.data, *(expert.data for expert in spec.experts))
    if spec.method is not Method.DENSE and not any(data):
        yield "finetune.data: is required where neither general nor an expert has data"
    for i, phase in enumerate(spec.finetune.data):
        for name in phase.domains:
            if name not in known:
                yield (
                    f"finetune.data[{i}].domains.{name}: no such domain (known: {', '.join(known)})"
                )
    seen: set[str] = set()
    for i, domain in enumerate(spec.evaluate.domains):
        path = f"evaluate.domains[{i}]"
        if domain.name in seen:
            yield f"{path}.name: {domain.name!r} is named twice"
        seen.add(domain.name)
        taken = {expert.name for expert in spec.experts} | {GENERAL}
        if domain.data and domain.name in taken:
            yield f"{path}.data: {domain.name!r} has its data elsewhere in the run"
        if domain.name not in known:
            yield f"{path}.name: no such domain (known: {', '.join(known)}), and no data"
    yield from _task_problems(spec.evaluate, seen or set(known))


def _task_problems(block: Evaluate, taken: set[str]) -> Iterator[str]:
    for i, task in enumerate(block.tasks):
        path = f"evaluate.tasks[{i}]"
        if task.name in taken:
            yield f"{path}.name: {task.name!r} is the name of a domain or of another task"
        taken = taken | {task.name}
        exact, default = task.kind is TaskKind.EXACT_MATCH, TaskShape.model_fields["max_new_tokens"]
        if exact and task.max_new_tokens >= block.sequence_length:
            yield (
                f"{path}.maxNewTokens: {task.max_new_tokens} leaves no room for a question in "
                f"evaluate.sequenceLength {block.sequence_length}"
            )
        if not exact and task.max_new_tokens != default.default:
            yield f"{path}.maxNewTokens: is read by kind ExactMatch only"


def _path_of(spec: BTXRunSpec, domain: str) -> str:
    for i, expert in enumerate(spec.experts):
        if expert.name == domain:
            return f"experts[{i}].data"
    names = [d.name for d in spec.evaluate.domains]
    return "general" if domain == GENERAL else f"evaluate.domains[{names.index(domain)}].data"


def explain(error: ValidationError, root: str = "spec") -> list[str]:
    """One line per problem: field path, what is wrong, what was given."""
    found = error.errors(include_url=False)
    places = [item["loc"] for item in found]
    return [
        _line(item, root)
        for item in found
        # pydantic counts only the items that are right: a list with a wrong one looks too short.
        if item["type"] != "too_short" or not any(_within(place, item["loc"]) for place in places)
    ]


def _within(place: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(place) > len(outer) and place[: len(outer)] == outer


def _line(item: ErrorDetails, root: str) -> str:
    path, message = root + "".join(map(_part, item["loc"])), _one_line(item["msg"])
    message = message.removeprefix("Value error, ")
    match item["type"]:
        case "value_error" if re.match(r"^[a-z][\w.\[\]-]*: ", message):
            # Our own rules name the rest of the path: "policy.minExperts: 5 of 3 experts".
            return f"{path}.{message}"
        case "value_error":
            return f"{path}: {message}"
        case "extra_forbidden":
            return f"{path}: unknown field"
        case "missing":
            return f"{path}: is required"
    return f"{path}: {message[0].lower()}{message[1:]} (got {_shown(item['input'])})"


def _part(part: int | str) -> str:
    """One step of a path; a key that is no name is quoted, and cut."""
    if isinstance(part, int):
        return f"[{part}]"
    if part == "[key]":
        return ""  # pydantic's word for a wrong key, which stands before
    return f".{part}" if re.fullmatch(r"[\w/.\[\]-]{1,80}", part) else f".{part[:60]!r}"


def _shown(value: object) -> str:
    """The first characters; of a list or mapping not more than its size: it may hold anything."""
    if isinstance(value, list | tuple | dict):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = str(value) if not isinstance(value, int) or abs(value) < 10**60 else "a huge integer"
    return repr(text[:60])


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:400]
