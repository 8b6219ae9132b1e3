"""What the operator tells Prometheus of its runs: gauges of what is, counts of what ended; pure.

`gauges` is asked at each scrape, `ended` with the status before and after each write that was
accepted. Only runs that have not ended have series of their own.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from btx_api.methods import graph
from btx_api.metrics import ENGINE, Metric, Outcome
from btx_api.spec import BTXRunSpec
from btx_api.stage import VERSIONS, Exit, Kind
from btx_api.status import ACTIVE, PREFLIGHT, ConditionType, Row, State, Status

from btx_operator.attempts import scheduling_of
from btx_operator.conditions import WORDS
from btx_operator.flops import cost

STATES = ("Pending", *dict.fromkeys(word for _, _, word in WORDS))
KINDS = (PREFLIGHT, *Kind)
_BY_EXIT: dict[int | None, Outcome] = {
    Exit.STALLED: Outcome.STALLED,
    Exit.DIVERGED: Outcome.DIVERGED,
    Exit.CONFIGURATION: Outcome.MISCONFIGURED,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A value of a gauge, or what a counter grows by, or what a histogram observes."""

    metric: Metric
    labels: dict[str, str]
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveRun:
    """A run that has not ended."""

    namespace: str
    name: str
    uid: str
    spec: BTXRunSpec | None
    status: Status


class Gauges:
    """Remembers only what is dear to compute: FLOPs per token, by the stage's digest."""

    def __init__(self) -> None:
        self._flops: dict[str, float] = {}

    def samples(
        self, states: Iterable[str], live: Iterable[LiveRun], now: float
    ) -> Iterator[Sample]:
        """`states`: status.state of every run, ended or not. Every state has a value, 0 too."""
        counted = Counter(dict.fromkeys(STATES, 0))
        counted.update(state or "Pending" for state in states)
        for state, number in counted.items():
            yield Sample(metric=ENGINE["runs"], labels={"state": state}, value=number)
        stages: Counter[tuple[str, str]] = Counter()
        kept: dict[str, float] = {}
        for run in live:
            stages.update((row.kind, row.state) for row in run.status.stages)
            yield from _of_run(run, now)
            for row in run.status.stages:
                if row.state is State.RUNNING and row.kind in (Kind.TRAIN, Kind.FINETUNE):
                    known = self._flops.get(row.digest)
                    kept[row.digest] = _flops_per_token(run, row) if known is None else known
                    yield _sample("stage_flops", run, kept[row.digest], stage=row.name)
        self._flops = kept
        for (kind, state), number in stages.items():
            yield Sample(
                metric=ENGINE["stages"], labels={"kind": kind, "state": state}, value=number
            )


def _of_run(run: LiveRun, now: float) -> Iterator[Sample]:
    accepted = run.status.condition(ConditionType.ACCEPTED)
    if accepted is not None and accepted.status == "False":
        yield _sample("run_refused", run, 1, reason=accepted.reason)
    if run.spec is None:
        return
    total = 0.0
    for row in run.status.stages:
        gpus = gpus_of(run.spec, row.name)
        running = now - row.start_time if row.start_time is not None else 0.0
        total += gpus * (row.seconds + max(0.0, running))
        if row.state is State.RUNNING:
            yield _sample("stage_gpus", run, gpus, stage=row.name)
    yield _sample("run_gpu_seconds", run, total)


def _sample(name: str, run: LiveRun, value: float, **labels: str) -> Sample:
    where = {"namespace": run.namespace, "run": run.name}
    return Sample(metric=ENGINE[name], labels=where | labels, value=value)


def gpus_of(spec: BTXRunSpec, stage: str) -> int:
    """GPUs of one attempt, on all its nodes."""
    if stage == PREFLIGHT:
        return 0
    block = scheduling_of(spec, stage)
    return block.nodes * block.gpus


def _flops_per_token(run: LiveRun, row: Row) -> float:
    """0 when the stage is not of the spec as it stands."""
    spec, resolved, release = run.spec, run.status.resolved, run.status.release
    if spec is None or resolved is None:
        return 0.0
    with suppress(ValueError):
        versions = release.kinds if release else VERSIONS
        nodes = graph(spec, resolved, run.status.members, versions=versions, uid=run.uid)
        node = nodes.get(row.name)
        if node is not None and node.stage.digest == row.digest:
            price = cost(node.stage, resolved.parameters, scheduling_of(spec, row.name))
            return price.flops / price.tokens if price.tokens else 0.0
    return 0.0


def ended(before: Status, after: Status, spec: BTXRunSpec | None, now: float) -> Iterator[Sample]:
    """Attempts that ended between two statuses: count, running time, GPU-seconds; reused stages."""
    old = {(row.name, row.digest): row for row in before.rows}
    for row in after.rows:
        kind = row.name.partition("-")[0]
        known = old.get((row.name, row.digest), Row(name=row.name, digest=row.digest))
        newly = row.state is State.COMPLETE and known.state is not State.COMPLETE
        if newly and row.attempt == 0:
            yield Sample(metric=ENGINE["reused"], labels={"kind": kind}, value=1)
        outcome = outcome_of(known, row)
        if outcome is None:
            continue
        labels = {"kind": kind, "outcome": outcome}
        yield Sample(metric=ENGINE["attempts"], labels=labels, value=1)
        seconds = float(row.seconds - known.seconds)
        if seconds <= 0 and known.start_time is not None:
            # Finished rows of prepare keep no times.
            seconds = max(0.0, now - known.start_time)
        yield Sample(metric=ENGINE["attempt_seconds"], labels={"kind": kind}, value=seconds)
        gpus = gpus_of(spec, row.name) if spec else 0
        yield Sample(metric=ENGINE["gpu_seconds"], labels={"kind": kind}, value=gpus * seconds)


def outcome_of(before: Row, after: Row) -> Outcome | None:
    """How the attempt of `before` ended; None while it has not. Read from what the row counts."""
    if after.lost > before.lost or (after.check and not before.check):
        return Outcome.LOST
    if after.preemptions > before.preemptions:
        return Outcome.PREEMPTED
    if after.failures > before.failures:
        return _BY_EXIT.get(after.exit, Outcome.FAILED)
    there = (*ACTIVE, State.STOPPING)
    same = after.attempt == before.attempt
    if before.state not in there or (same and after.state in there):
        return None
    if after.message.startswith(f"exit {Exit.CORRUPT:d}"):
        return Outcome.CORRUPT
    by_state = {State.COMPLETE: Outcome.COMPLETE, State.FAILED: Outcome.FAILED}
    return by_state.get(after.state, Outcome.STOPPED)
