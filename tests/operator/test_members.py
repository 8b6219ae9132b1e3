"""Who goes into the mix: failures, quorum, deadline, gain; and what the rest of the run is then."""

from typing import Any

import pytest
from btx_api.spec import BTXRunSpec
from btx_api.stage import Exit
from btx_api.status import ConditionType, Reason, State
from builders import spec_of
from simulator import Simulator

SUCCEEDED = ConditionType.SUCCEEDED
QUORUM = {"failurePolicy": "Quorum", "minExperts": 2, "maxRetries": 0}


def three(**policy: Any) -> BTXRunSpec:
    """Experts a, b, c."""
    experts = [{"name": name, "tokens": 100, "data": [{"uri": f"file://{name}"}]} for name in "abc"]
    return spec_of(experts=experts, policy=policy)


def members(sim: Simulator) -> tuple[str, ...] | None:
    """Names, once decided."""
    found = sim.status().members
    return found.experts if found else None


def test_members_are_frozen_in_status_before_the_mix_starts(sim: Simulator) -> None:
    """In the very write that holds the intent (and in no start before: an invariant)."""
    sim.submit(three())
    sim.finish(but=["train-c"])
    assert members(sim) is None

    sim.end("train-c")
    sim.step()

    assert members(sim) == ("a", "b", "c")
    assert sim.row("mix").state is State.STARTING


def test_under_quorum_a_failed_expert_is_left_out(sim: Simulator) -> None:
    """Its data stays in the finetune data, because its prepare succeeded."""
    sim.submit(three(**QUORUM))
    sim.finish(but=["train-b"])
    sim.end("train-b", Exit.CONFIGURATION)

    sim.finish()

    assert members(sim) == ("a", "c")
    assert sim.status().members.without == ()
    assert "prepare-b" in [task.execution.name for task in sim.tasks("prepare-b")]
    mix, finetune = sim.tasks("mix")[0].stage, sim.tasks("finetune")[0].stage
    assert mix is not None and len(mix.inputs) == 3
    assert finetune is not None and len(finetune.inputs) == 5
    assert sim.row("train-b").state is State.FAILED
    assert sim.condition(SUCCEEDED) == ("True", Reason.COMPLETE)


def test_under_quorum_a_domain_whose_prepare_failed_is_lost(sim: Simulator) -> None:
    """Its expert is missing at once, its data is in nothing that follows; both recorded."""
    sim.submit(three(**QUORUM))
    sim.finish(but=["prepare-b"])
    sim.end("prepare-b", Exit.CONFIGURATION)

    sim.finish()

    assert sim.status().members.without == ("b",)
    finetune = sim.tasks("finetune")[0].stage
    assert finetune is not None and len(finetune.inputs) == 4
    assert sim.condition(SUCCEEDED) == ("True", Reason.COMPLETE)
    sim.submit(three(**QUORUM), refresh="again")
    before = sim.attempts()
    sim.finish()
    assert {n: a for n, a in sim.attempts().items() if a != before[n]} == {}


def test_too_few_experts_fail_the_run_as_soon_as_that_is_known(sim: Simulator) -> None:
    """The expert that is still open could not save it."""
    sim.submit(three(**QUORUM))
    sim.finish(but=["train-a", "train-b", "train-c"])
    sim.end("train-a", Exit.CONFIGURATION)
    sim.settle()
    assert sim.condition(SUCCEEDED)[0] == "Unknown"
    sim.end("train-b", Exit.CONFIGURATION)
    sim.settle()

    assert sim.condition(SUCCEEDED) == ("False", Reason.TOO_FEW_EXPERTS)
    assert sim.live()["train-c"].stopping


def test_quorum_without_min_experts_needs_all(sim: Simulator) -> None:
    """The default of minExperts."""
    sim.submit(three(failurePolicy="Quorum"))
    sim.finish(but=["train-a"])
    sim.end("train-a", Exit.CONFIGURATION)
    sim.settle()

    assert sim.condition(SUCCEEDED) == ("False", Reason.TOO_FEW_EXPERTS)


def test_experts_that_are_not_complete_by_the_deadline_are_late(sim: Simulator) -> None:
    """The clock starts at acceptance; a straggler is stopped and its result not waited for."""
    sim.submit(three(expertDeadlineSeconds=100, minExperts=2))
    sim.settle()
    sim.advance(1000)
    sim.finish(but=["train-c"])
    assert sim.step().again_after == 100
    sim.advance(99)
    sim.settle()
    assert members(sim) is None
    sim.advance(1)
    sim.settle()

    assert members(sim) == ("a", "b")
    assert sim.row("train-c").state is State.LATE
    assert sim.live()["train-c"].stopping
    sim.end("train-c")
    sim.finish()
    assert sim.row("train-c").state is State.LATE
    assert sim.condition(SUCCEEDED) == ("True", Reason.COMPLETE)


def test_the_deadline_fails_a_run_with_too_few_experts(sim: Simulator) -> None:
    """minExperts holds for late experts too."""
    sim.submit(three(expertDeadlineSeconds=100, minExperts=3))
    sim.finish(but=["train-c"])
    sim.advance(100)
    sim.settle()

    assert sim.condition(SUCCEEDED) == ("False", Reason.TOO_FEW_EXPERTS)


def test_the_deadline_pauses_while_suspended(sim: Simulator) -> None:
    """And while queued; only the time in which the experts could train counts."""
    policy = {"expertDeadlineSeconds": 100, "minExperts": 1}
    sim.submit(three(**policy))
    sim.finish(but=["train-a", "train-b", "train-c"])
    sim.end("train-a")
    sim.settle()
    sim.advance(60)
    sim.submit(three(**policy).model_copy(update={"suspend": True}))
    sim.settle()
    for stage in list(sim.live()):
        sim.end(stage, Exit.PREEMPTED)
    sim.advance(10_000)
    sim.held = {"train-b", "train-c"}
    sim.submit(three(**policy))
    sim.settle()
    assert sim.condition(ConditionType.QUEUED)[0] == "True"
    sim.advance(10_000)
    sim.held = set()
    sim.settle()

    assert members(sim) is None
    assert sim.step().again_after == 40
    sim.advance(40)
    sim.settle()
    assert members(sim) == ("a",)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"onNoGain": "Keep"}, ("a", "b", "c")),
        ({"onNoGain": "Drop"}, ("a", "c")),
        ({"onNoGain": "Drop", "minExperts": 2}, ("a", "c")),
        ({"onNoGain": "Drop", "minExperts": 3}, None),
    ],
)
def test_an_expert_without_gain(
    sim: Simulator, policy: dict[str, Any], expected: tuple[str, ...] | None
) -> None:
    """Judged by its own held-out loss; dropping it is no failure unless minExperts says so."""
    sim.storage.gains = {"train-b": -0.01, "train-c": 0.01}
    sim.submit(three(**policy))

    sim.finish()

    assert members(sim) == expected
    assert (sim.condition(SUCCEEDED)[0] == "True") == (expected is not None)


def test_gains_of_reused_experts_come_from_preflight(sim: Simulator) -> None:
    """The second run decides as the first did."""
    sim.storage.gains = {"train-b": -0.01}
    sim.submit(three(onNoGain="Drop"), name="first")
    sim.finish()
    sim.submit(three(onNoGain="Drop"), name="second")
    sim.finish()

    assert sim.status("second").members == sim.status("first").members
    assert set(sim.attempts("second").values()) <= {0, 1}
    assert sim.row("train-b", "second").attempt == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"minExperts": 1}, ("a", "b", "c")),
        ({"expertDeadlineSeconds": 500}, ("a", "b", "c")),
        ({"maxRetries": 5}, ("a", "c")),
    ],
)
def test_members_are_decided_again_only_for_a_reason(
    sim: Simulator, change: dict[str, Any], expected: tuple[str, ...]
) -> None:
    """The expert set, minExperts, expertDeadlineSeconds; then a late expert gets another chance."""
    policy = {**QUORUM, "expertDeadlineSeconds": 100}
    sim.submit(three(**policy))
    sim.finish(but=["train-b"])
    sim.advance(100)
    sim.settle()
    sim.end("train-b", Exit.PREEMPTED)
    sim.finish()
    assert members(sim) == ("a", "c")

    sim.submit(three(**{**policy, **change}))
    sim.finish()

    assert members(sim) == expected
    assert sim.condition(SUCCEEDED) == ("True", Reason.COMPLETE)


def test_a_ready_expert_needs_no_training(sim: Simulator) -> None:
    """It is complete from the start; one without data has no domain."""
    experts = [
        {"name": "a", "tokens": 100, "data": [{"uri": "file://a"}]},
        {"name": "ready", "model": "file://ready"},
    ]
    sim.submit(spec_of(experts=experts))
    sim.finish()

    assert members(sim) == ("a", "ready")
    assert "train-ready" not in sim.attempts()
    assert sim.condition(SUCCEEDED) == ("True", Reason.COMPLETE)
