"""What the operator tells Prometheus of its runs: counted once, named, and only while they live."""

from collections import Counter
from typing import Any

import pytest
from btx_api.methods import graph
from btx_api.metrics import ENGINE, Outcome
from btx_api.spec import Policy
from btx_api.stage import Corrupt, Exit, Kind, Parameters, Result
from btx_api.status import (
    PREFLIGHT,
    Condition,
    ConditionType,
    Reason,
    Row,
    State,
    Status,
)
from btx_operator import attempts
from btx_operator.attempts import begin, record
from btx_operator.cluster.meters import Meters
from btx_operator.cluster.run_metrics import STATES, Gauges, LiveRun, Sample, ended, outcome_of
from btx_operator.flops import cost
from btx_operator.observed import Attempt, Phase
from builders import resolved_for, spec_of
from prometheus_client.parser import text_string_to_metric_families

NOW = 1000
POLICY = Policy(max_retries=2, backoff_seconds=10)
GPUS = {"train": {"gpus": 4, "nodes": 2}, "finetune": {"gpus": 1}}
PARAMETERS = Parameters(
    dense=1000, total=3000, active=2000, head=100, embedding=100, experts=500, layers=2, hidden=8
)
DONE = Result(token="t" * 12)
CORRUPT = Result(corrupt=Corrupt(kind=Kind.PREPARE, digest="c" * 32, tag="tag"))


def a_row(**fields: Any) -> Row:
    """A train stage whose second attempt runs since 100 s."""
    defaults: dict[str, Any] = {
        "name": "train-code", "digest": "d" * 32, "state": State.RUNNING, "attempt": 2,
        "handle": "job2", "start_time": 900, "seconds": 50,
    }  # fmt: skip
    return Row(**defaults | fields)


def after(row: Row, code: int | None = None, result: Result | None = None, **more: Any) -> Row:
    """What the engine makes of the row when its attempt ended like this."""
    attempt = Attempt(
        stage=row.name, number=row.attempt, digest=row.digest, handle=row.handle,
        phase=Phase.ENDED, exit=code, result=result, seconds=100.0,
    )  # fmt: skip
    return record(row, attempt, POLICY.model_copy(update=more), NOW)


def named(samples: Any, key: str) -> list[tuple[dict[str, str], float]]:
    """Labels and values of one metric."""
    found: list[Sample] = list(samples)
    return [(s.labels, s.value) for s in found if s.metric is ENGINE[key]]


ENDINGS: dict[str, tuple[Row, Outcome]] = {
    "complete": (after(a_row(), Exit.OK, DONE), Outcome.COMPLETE),
    "result lost": (after(a_row(), Exit.OK), Outcome.LOST),
    "vanished": (after(a_row()), Outcome.LOST),
    "missing": (after(a_row(), Exit.MISSING), Outcome.LOST),
    "failed": (after(a_row(), Exit.FAILED), Outcome.FAILED),
    "killed": (after(a_row(), 137), Outcome.FAILED),
    "failed for good": (after(a_row(), Exit.FAILED, max_retries=0), Outcome.FAILED),
    "stalled": (after(a_row(), Exit.STALLED), Outcome.STALLED),
    "diverged": (after(a_row(), Exit.DIVERGED), Outcome.DIVERGED),
    "misconfigured": (after(a_row(), Exit.CONFIGURATION), Outcome.MISCONFIGURED),
    "corrupt input": (after(a_row(), Exit.CORRUPT, CORRUPT), Outcome.CORRUPT),
    "preempted": (after(a_row(), Exit.PREEMPTED), Outcome.PREEMPTED),
    "preempted and begun again": (begin(after(a_row(), Exit.PREEMPTED)), Outcome.PREEMPTED),
    "stopped": (after(a_row(state=State.STOPPING), Exit.PREEMPTED), Outcome.STOPPED),
    "too late": (attempts.late(a_row()), Outcome.STOPPED),
    "a deadline": (
        record(
            a_row(),
            Attempt(stage="train-code", number=2, digest="d" * 32, handle="job2",
                    phase=Phase.RUNNING, since=900.0),
            POLICY.model_copy(update={"active_deadline_seconds": 60}), NOW,
        ),
        Outcome.FAILED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ENDINGS)
def test_how_an_attempt_ended(how: str) -> None:
    """Read from the row that the engine writes; every outcome there is has a row here."""
    row, outcome = ENDINGS[how]
    before = a_row(state=State.STOPPING) if how == "stopped" else a_row()

    assert outcome_of(before, row) is outcome
    assert {outcome for _, outcome in ENDINGS.values()} == set(Outcome)


@pytest.mark.parametrize(
    "row",
    [a_row(), a_row(state=State.STOPPING), a_row(dead_experts="1: 0.1"), a_row(seconds=60)],
)
def test_an_attempt_that_goes_on_is_not_counted(row: Row) -> None:
    """Nor is one that has not begun, or that ended long ago."""
    assert outcome_of(a_row(), row) is None
    idle = a_row(state=State.PENDING, handle="", start_time=None)
    assert outcome_of(idle, begin(idle)) is None
    failed = after(a_row(), Exit.FAILED)
    assert outcome_of(failed, failed) is None
    assert outcome_of(failed, attempts.forgive(failed)) is None


def test_an_attempt_that_ended_is_counted_once() -> None:
    """One outcome, its running time, its GPUs times that; the same status again adds nothing."""
    spec = spec_of(execution=GPUS)
    before, now = (Status(stages=(row,)) for row in (a_row(), after(a_row(), Exit.FAILED)))
    samples = list(ended(before, now, spec, NOW))

    assert named(samples, "attempts") == [({"kind": "train", "outcome": "Failed"}, 1)]
    assert named(samples, "attempt_seconds") == [({"kind": "train"}, 100)]
    assert named(samples, "gpu_seconds") == [({"kind": "train"}, 800)]
    assert named(samples, "reused") == []
    assert list(ended(now, now, spec, NOW)) == []


def test_preflight_and_prepare_count_too() -> None:
    """A finished row of prepare keeps no times: since when it ran says how long."""
    spec = spec_of()
    prepare = a_row(name="prepare-code", seconds=0)
    preflight = a_row(name=PREFLIGHT)
    before = Status(stages=(prepare,), preflight=preflight)
    now = Status(
        stages=(after(prepare, Exit.OK, DONE),), preflight=after(preflight, Exit.CONFIGURATION)
    )
    samples = list(ended(before, now, spec, NOW))

    assert named(samples, "attempts") == [
        ({"kind": "prepare", "outcome": "Complete"}, 1),
        ({"kind": "preflight", "outcome": "Misconfigured"}, 1),
    ]
    assert named(samples, "attempt_seconds")[0] == ({"kind": "prepare"}, 100)
    assert {value for _, value in named(samples, "gpu_seconds")} == {0}


def test_a_stage_that_was_there_before_is_reused() -> None:
    """Complete without any attempt; no attempt is counted for it."""
    fresh = Row(name="train-code", digest="d" * 32)
    samples = list(
        ended(Status(stages=(fresh,)), Status(stages=(attempts.complete(fresh),)), None, NOW)
    )

    assert named(samples, "reused") == [({"kind": "train"}, 1)]
    assert len(samples) == 1


def a_run(**changes: Any) -> LiveRun:
    """An accepted run, `train-code` complete after 600 s, `train-math` running for 100 s."""
    spec = spec_of(execution=GPUS)
    resolved = resolved_for(spec, parameters=PARAMETERS)
    digests = {name: node.stage.digest for name, node in graph(spec, resolved).items()}
    rows = [Row(name=name, digest=digest) for name, digest in digests.items()]
    known = {
        "train-code": {"state": State.COMPLETE, "seconds": 600, "attempt": 1},
        "train-math": {"state": State.RUNNING, "seconds": 50, "start_time": 900, "attempt": 1},
    }
    stages = tuple(row.model_copy(update=known.get(row.name, {})) for row in rows)
    fields = {"stages": stages, "resolved": resolved} | changes.pop("status", {})
    return LiveRun(
        **{"namespace": "n", "name": "r", "uid": "u", "spec": spec, "status": Status(**fields)}
        | changes
    )


def test_a_live_run_has_series_of_its_own() -> None:
    """GPUs of what runs, GPU-seconds of all attempts, FLOPs per token as `btx plan` counts them."""
    run = a_run()
    samples = list(Gauges().samples(["Running"], [run], NOW))
    who = {"namespace": "n", "run": "r"}
    assert run.spec is not None and run.status.resolved is not None
    stage = graph(run.spec, run.status.resolved)["train-math"].stage
    price = cost(stage, PARAMETERS, run.spec.execution.train)

    assert named(samples, "stage_gpus") == [(who | {"stage": "train-math"}, 8)]
    assert named(samples, "run_gpu_seconds") == [(who, 8 * (600 + 50 + 100))]
    assert named(samples, "stage_flops") == [
        (who | {"stage": "train-math"}, pytest.approx(price.flops / price.tokens))
    ]
    assert named(samples, "run_refused") == []
    counted = {tuple(labels.values()): value for labels, value in named(samples, "stages")}
    assert counted["train", "Complete"] == counted["train", "Running"] == 1


def test_every_state_has_a_value() -> None:
    """Zero too, so that a first failure is a rise; a run that nobody has looked at is Pending."""
    values = {
        labels["state"]: value
        for labels, value in named(Gauges().samples(["Running", "Running", ""], [], NOW), "runs")
    }

    assert values == dict.fromkeys(STATES, 0) | {"Running": 2, "Pending": 1}


def test_a_refused_run_is_named() -> None:
    """With its reason; it needs no spec that can be read."""
    condition = Condition(
        type=ConditionType.ACCEPTED, status="False", reason=Reason.INVALID_SPEC,
        last_transition_time=NOW,
    )  # fmt: skip
    run = a_run(spec=None, status={"stages": (), "conditions": (condition,)})
    samples = list(Gauges().samples(["Refused"], [run], NOW))

    assert named(samples, "run_refused") == [
        ({"namespace": "n", "run": "r", "reason": "InvalidSpec"}, 1)
    ]
    assert named(samples, "run_gpu_seconds") == []


def test_flops_are_computed_once_for_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scrapes come often and graphs are dear; what runs no more is forgotten."""
    calls: Counter[str] = Counter()

    def counted(*arguments: Any, **more: Any) -> Any:
        calls["graph"] += 1
        return graph(*arguments, **more)

    monkeypatch.setattr("btx_operator.cluster.run_metrics.graph", counted)
    gauges = Gauges()
    for _ in range(3):
        list(gauges.samples([], [a_run()], NOW))
    assert calls["graph"] == 1
    list(gauges.samples([], [], NOW))
    list(gauges.samples([], [a_run()], NOW))
    assert calls["graph"] == 2


def test_a_stage_of_an_older_spec_has_no_flops() -> None:
    """An edit that is not accepted yet asks for other stages than the one that runs."""
    row = Row(name="train-math", digest="0" * 32, state=State.RUNNING, start_time=900, attempt=1)
    samples = list(Gauges().samples([], [a_run(status={"stages": (row,)})], NOW))

    assert [value for _, value in named(samples, "stage_flops")] == [0]


def test_counters_of_attempts_begin_at_zero() -> None:
    """A counter that appears with its first 1 has no increase that an alert could see."""
    meters = Meters()
    meters.told(
        Status(stages=(a_row(),)),
        Status(stages=(after(a_row(), Exit.DIVERGED),)),
        spec_of(),
        size=9,
    )
    families = {f.name: f for f in text_string_to_metric_families(meters.exposition().decode())}
    values = {
        (s.labels["kind"], s.labels["outcome"]): s.value
        for s in families["btx_attempts"].samples
        if s.name == "btx_attempts_total"
    }

    assert values.keys() == {
        (kind, outcome) for kind in (PREFLIGHT, *Kind) for outcome in map(str, Outcome)
    }
    assert {key for key, value in values.items() if value} == {("train", "Diverged")}
