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


class Outcome(StrEnum):
    """How an attempt ended: the label `outcome`."""

    COMPLETE = "Complete"
    FAILED = "Failed"
    STALLED = "Stalled"
    DIVERGED = "Diverged"
    MISCONFIGURED = "Misconfigured"
    CORRUPT = "Corrupt"
    PREEMPTED = "Preempted"
    LOST = "Lost"
    STOPPED = "Stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric family."""

    name: str
    """With its unit where it has one, and `_total` if it only grows."""
    type: MetricType
    unit: str
    """Base unit: seconds, bytes, ratio, tokens, nats; empty: a plain number."""
    labels: tuple[str, ...]
    help: str


COUNTER, GAUGE, HISTOGRAM = MetricType.COUNTER, MetricType.GAUGE, MetricType.HISTOGRAM


def _trainer(
    name: str, help: str, *, type: MetricType = GAUGE, unit: str = "", labels: tuple[str, ...] = ()
) -> Metric:
    return Metric(
        name=f"btx_trainer_{name}",
        type=type,
        unit=unit,
        labels=("run", "stage", *labels),
        help=help,
    )


def _engine(name: str, help: str, *labels: str, type: MetricType = GAUGE, unit: str = "") -> Metric:
    return Metric(name=f"btx_{name}", type=type, unit=unit, labels=labels, help=help)


TRAINER: dict[str, Metric] = {
    "phase": _trainer("phase", "1 for what the attempt does now.", labels=("kind", "phase")),
    "step": _trainer("step", "Steps (or units of work) done."),
    "steps": _trainer("steps", "Steps (or units of work) in all."),
    "tokens": _trainer(
        "tokens_total", "Tokens trained on, also before a resume.", type=COUNTER, unit="tokens"
    ),
    "tokens_per_second": _trainer("tokens_per_second", "Throughput over the last steps."),
    "loss": _trainer("loss_nats", "Cross-entropy per token.", unit="nats"),
    "balance": _trainer(
        "balance_ratio", "Balancing loss divided by layers * alpha: 1 at balance.", unit="ratio"
    ),
    "grad_norm": _trainer("grad_norm", "Global gradient norm before clipping."),
    "lr": _trainer("learning_rate", "Learning rate of the last step."),
    "eta_seconds": _trainer("eta_seconds", "Estimated time to the last step.", unit="seconds"),
    "checkpoint_step": _trainer("checkpoint_step", "Step of the last stored checkpoint."),
    "checkpoint_time": _trainer(
        "checkpoint_timestamp_seconds", "Unix time of the last stored checkpoint.", unit="seconds"
    ),
    "expert_load": _trainer(
        "expert_load_ratio", "Share of slots, mean over layers.", unit="ratio", labels=("expert",)
    ),
    "dead_experts": _trainer("dead_experts", "Experts that got next to nothing for long."),
    "time": _trainer(
        "progress_timestamp_seconds", "Unix time of the last progress.", unit="seconds"
    ),
}
"""By the field of Progress that it shows."""

ENGINE: dict[str, Metric] = {
    "runs": _engine("runs", "Runs by status.state.", "state"),
    "stages": _engine("stages", "Stages of runs that have not ended.", "kind", "state"),
    "run_refused": _engine(
        "run_refused", "1 for each run that is not accepted.", "namespace", "run", "reason"
    ),
    "run_gpu_seconds": _engine(
        "run_gpu_seconds", "GPUs times running time of a run that has not ended.",
        "namespace", "run", unit="seconds",
    ),
    "stage_gpus": _engine("stage_gpus", "GPUs of a running attempt.", "namespace", "run", "stage"),
    "stage_flops": _engine(
        "stage_flops_per_token", "FLOPs of a running stage per token that it trains on.",
        "namespace", "run", "stage",
    ),
    "attempts": _engine(
        "attempts_total", "Finished attempts.", "kind", "outcome", type=COUNTER
    ),
    "attempt_seconds": _engine(
        "attempt_duration_seconds", "Running time of finished attempts.", "kind",
        type=HISTOGRAM, unit="seconds",
    ),
    "reused": _engine(
        "stages_reused_total", "Stages whose artifact was there before.", "kind", type=COUNTER
    ),
    "gpu_seconds": _engine(
        "gpu_seconds_total", "GPUs times running time of finished attempts.", "kind",
        type=COUNTER, unit="seconds",
    ),
    "reconciles": _engine(
        "operator_reconciles_total", "Reconciliations by result.", "result", type=COUNTER
    ),
    "reconcile_seconds": _engine(
        "operator_reconcile_duration_seconds", "Time of one reconciliation.",
        type=HISTOGRAM, unit="seconds",
    ),
    "queue_depth": _engine("operator_queue_depth", "Runs waiting for a worker."),
    "queue_seconds": _engine(
        "operator_queue_duration_seconds", "Time that runs waited for a worker.",
        type=HISTOGRAM, unit="seconds",
    ),
    "api_requests": _engine(
        "operator_api_requests_total", "Requests to the API server.", "verb", "resource", "code",
        type=COUNTER,
    ),
    "api_seconds": _engine(
        "operator_api_request_duration_seconds", "Time of requests to the API server.",
        "verb", "resource", type=HISTOGRAM, unit="seconds",
    ),
    "cache_objects": _engine("operator_cache_objects", "Objects in the cache.", "kind"),
    "cache_listed": _engine(
        "operator_cache_listed_timestamp_seconds", "Unix time of the last full list.", "kind",
        unit="seconds",
    ),
    "cache_drift": _engine(
        "operator_cache_drift_total", "Objects of full lists that no watch had told of.",
        type=COUNTER,
    ),
    "loop_lag": _engine(
        "operator_loop_lag_seconds", "How late the event loop was at its last beat.",
        unit="seconds",
    ),
    "progress_failures": _engine(
        "operator_progress_failures_total", "Progress that could not be read.", type=COUNTER
    ),
    "status_bytes": _engine(
        "operator_status_bytes", "Size of written statuses.", type=HISTOGRAM, unit="bytes"
    ),
}  # fmt: skip
