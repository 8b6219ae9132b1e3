"""Every metric: name, type, unit, labels, help. Nothing else is exported, by either side.

TRAINER is rendered by the trainer's telemetry from the latest Progress, ENGINE by the operator.
"""

from dataclasses import dataclass
from enum import StrEnum


class MetricType(StrEnum):
    """As Prometheus has them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric family."""

    name: str
    """With its unit where it has one, and `_total` if it only grows."""
    type: MetricType = MetricType.GAUGE
    unit: str = ""
    """Base unit: seconds, bytes, ratio, tokens, nats; empty: a plain number."""
    labels: tuple[str, ...] = ()
    help: str


COUNTER, HISTOGRAM = MetricType.COUNTER, MetricType.HISTOGRAM
_STAGE = ("run", "stage")

PHASE = Metric(
    name="btx_trainer_phase", labels=(*_STAGE, "kind", "phase"),
    help="1 for what the attempt does now: loading, training, evaluating, committing.",
)  # fmt: skip
STEP = Metric(name="btx_trainer_step", labels=_STAGE, help="Steps (or units of work) done.")
STEPS = Metric(name="btx_trainer_steps", labels=_STAGE, help="Steps (or units of work) in all.")
TOKENS = Metric(
    name="btx_trainer_tokens_total", type=COUNTER, unit="tokens", labels=_STAGE,
    help="Tokens trained on, those before a resume included.",
)  # fmt: skip
TOKENS_PER_SECOND = Metric(
    name="btx_trainer_tokens_per_second", labels=_STAGE, help="Throughput over the last steps."
)
LOSS = Metric(
    name="btx_trainer_loss_nats", unit="nats", labels=_STAGE, help="Cross-entropy per token."
)
BALANCE = Metric(
    name="btx_trainer_balance_ratio", unit="ratio", labels=_STAGE,
    help="Balancing loss divided by layers * alpha: 1 at balance.",
)  # fmt: skip
GRAD_NORM = Metric(
    name="btx_trainer_grad_norm", labels=_STAGE, help="Global gradient norm before clipping."
)
LEARNING_RATE = Metric(
    name="btx_trainer_learning_rate", labels=_STAGE, help="Learning rate of the last step."
)
ETA = Metric(
    name="btx_trainer_eta_seconds", unit="seconds", labels=_STAGE,
    help="Estimated time to the last step.",
)  # fmt: skip
CHECKPOINT_STEP = Metric(
    name="btx_trainer_checkpoint_step", labels=_STAGE, help="Step of the last stored checkpoint."
)
CHECKPOINT_TIME = Metric(
    name="btx_trainer_checkpoint_timestamp_seconds", unit="seconds", labels=_STAGE,
    help="Unix time of the last stored checkpoint.",
)  # fmt: skip
EXPERT_LOAD = Metric(
    name="btx_trainer_expert_load_ratio", unit="ratio", labels=(*_STAGE, "expert"),
    help="Share of slots per expert, mean over layers.",
)  # fmt: skip
DEAD_EXPERTS = Metric(
    name="btx_trainer_dead_experts", labels=_STAGE,
    help="Experts of any layer with a share of slots below 0.1 k/N for deadExpertSteps.",
)  # fmt: skip
PROGRESS_TIME = Metric(
    name="btx_trainer_progress_timestamp_seconds", unit="seconds", labels=_STAGE,
    help="Unix time of the last progress.",
)  # fmt: skip

TRAINER = (
    PHASE, STEP, STEPS, TOKENS, TOKENS_PER_SECOND, LOSS, BALANCE, GRAD_NORM, LEARNING_RATE, ETA,
    CHECKPOINT_STEP, CHECKPOINT_TIME, EXPERT_LOAD, DEAD_EXPERTS, PROGRESS_TIME,
)  # fmt: skip

RUNS = Metric(name="btx_runs", labels=("state",), help="Runs in the cache by status.state.")
STAGES = Metric(
    name="btx_stages", labels=("kind", "state"), help="Stages of all runs by kind and state."
)
ATTEMPTS = Metric(
    name="btx_attempts_total", type=COUNTER, labels=("kind", "outcome"),
    help="Finished attempts by outcome: Succeeded, Failed, Preempted, Corrupt, Lost, ...",
)  # fmt: skip
ATTEMPT_SECONDS = Metric(
    name="btx_attempt_duration_seconds", type=HISTOGRAM, unit="seconds", labels=("kind",),
    help="Running time of finished attempts.",
)  # fmt: skip
REUSED = Metric(
    name="btx_stages_reused_total", type=COUNTER, labels=("kind",),
    help="Stages whose artifact was there before.",
)  # fmt: skip
GPU_SECONDS = Metric(
    name="btx_gpu_seconds_total", type=COUNTER, unit="seconds", labels=("kind",),
    help="GPUs times running time of finished attempts.",
)  # fmt: skip
RECONCILES = Metric(
    name="btx_operator_reconciles_total", type=COUNTER, labels=("result",),
    help="Reconciliations by result: unchanged, written, conflict, error.",
)  # fmt: skip
RECONCILE_SECONDS = Metric(
    name="btx_operator_reconcile_duration_seconds", type=HISTOGRAM, unit="seconds",
    help="Time of one reconciliation.",
)  # fmt: skip
QUEUE_DEPTH = Metric(name="btx_operator_queue_depth", help="Runs waiting for a worker.")
QUEUE_SECONDS = Metric(
    name="btx_operator_queue_duration_seconds", type=HISTOGRAM, unit="seconds",
    help="Time from enqueueing a run to its worker.",
)  # fmt: skip
API_REQUESTS = Metric(
    name="btx_operator_api_requests_total", type=COUNTER, labels=("verb", "resource", "code"),
    help="Requests to the API server.",
)  # fmt: skip
API_SECONDS = Metric(
    name="btx_operator_api_request_duration_seconds", type=HISTOGRAM, unit="seconds",
    labels=("verb", "resource"), help="Time of requests to the API server.",
)  # fmt: skip
CACHE_OBJECTS = Metric(
    name="btx_operator_cache_objects", labels=("kind",), help="Objects in the cache."
)
CACHE_LISTED = Metric(
    name="btx_operator_cache_listed_timestamp_seconds", unit="seconds", labels=("kind",),
    help="Unix time of the last full list.",
)  # fmt: skip
PROGRESS_FAILURES = Metric(
    name="btx_operator_progress_failures_total", type=COUNTER,
    help="Progress that could not be read from a trainer.",
)  # fmt: skip
STATUS_BYTES = Metric(
    name="btx_operator_status_bytes", type=HISTOGRAM, unit="bytes",
    help="Size of written statuses as compact JSON.",
)  # fmt: skip

ENGINE = (
    RUNS, STAGES, ATTEMPTS, ATTEMPT_SECONDS, REUSED, GPU_SECONDS, RECONCILES, RECONCILE_SECONDS,
    QUEUE_DEPTH, QUEUE_SECONDS, API_REQUESTS, API_SECONDS, CACHE_OBJECTS, CACHE_LISTED,
    PROGRESS_FAILURES, STATUS_BYTES,
)  # fmt: skip
