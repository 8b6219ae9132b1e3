"""An expert that next to no tokens reach is an event, once; what says nothing of experts is none."""

from dataclasses import replace

import pytest
from btx_api.stage import Progress, Result
from btx_api.status import EventReason
from btx_operator import views
from btx_operator.processes import dead_experts
from builders import spec_of
from simulator import Simulator

TOLD = (EventReason.EXPERT_DEAD, EventReason.EXPERT_ALIVE)
DEAD, ALIVE = "finetune: dead experts (layer.expert) ", "finetune: every expert gets tokens again"


@pytest.fixture
def finetuning(sim: Simulator) -> Simulator:
    """A run whose finetune is at work."""
    sim.submit(spec_of())
    sim.finish(but=["finetune"])
    return sim


def says(sim: Simulator, dead: tuple[str, ...] | None) -> None:
    """What the finetune's attempt publishes of its experts, seen by two steps."""
    world = sim.worlds["run"]
    key = next(key for key in world.attempts if key[0] == "finetune")
    world.attempts[key] = replace(world.attempts[key], dead_experts=dead)
    sim.step()
    sim.step()


def told(sim: Simulator) -> list[str]:
    """Messages of the events about experts so far."""
    return [event.message for event in sim.events if event.reason in TOLD]


def test_an_expert_that_dies_is_told_once(finetuning: Simulator) -> None:
    """However often it is seen; another change is told again, and that all are back."""
    says(finetuning, ())
    says(finetuning, None)
    assert told(finetuning) == []
    says(finetuning, ("0.4",))
    # While the held-out loss is measured nothing is said of experts.
    says(finetuning, None)
    says(finetuning, ("0.4",))
    assert told(finetuning) == [f"{DEAD}1: 0.4"]
    assert finetuning.row("finetune").dead_experts == "1: 0.4"
    says(finetuning, ("0.4", "1.4"))
    says(finetuning, ())
    assert told(finetuning)[1:] == [f"{DEAD}2: 0.4, 1.4", ALIVE]
    warnings = [event.warning for event in finetuning.events if event.reason in TOLD]
    assert warnings == [True, True, False]


@pytest.mark.parametrize(
    ("seen", "count", "messages"),
    [
        (None, 2.0, [f"{DEAD}2"]),
        (("0.4", "1.4"), 2.0, [f"{DEAD}2: 0.4, 1.4"]),
        (("0.4",), 0.0, [f"{DEAD}1: 0.4", ALIVE]),
        (None, 0.0, []),
    ],
)
def test_the_result_tells_what_was_not_seen(
    finetuning: Simulator, seen: tuple[str, ...] | None, count: float, messages: list[str]
) -> None:
    """A stage may end between two looks at it; what was told already is not told again."""
    says(finetuning, seen)
    digest = finetuning.row("finetune").digest
    finetuning.end("finetune", result=Result(digest=digest, metrics={"dead_experts": count}))
    finetuning.settle()
    assert told(finetuning) == messages


def test_many_dead_experts_fit_a_row(finetuning: Simulator) -> None:
    """Status is bounded: the names are cut, the count is whole."""
    names = tuple(f"{layer}.{expert}" for layer in range(32) for expert in range(8))
    says(finetuning, names)
    row = finetuning.row("finetune")
    assert row.dead_experts.startswith("256: 0.0, 0.1, ")
    assert len(row.dead_experts) <= 44
    line = next(
        line
        for line in views.stage_lines("run", finetuning.status(), {})
        if line.stage == "finetune"
    )
    assert line.note == f"dead experts {row.dead_experts}"


def test_only_progress_with_a_load_speaks_of_experts() -> None:
    """A dense model has none, and an evaluation in between does not say."""
    assert dead_experts(None) is None
    assert dead_experts(Progress(phase="evaluating")) is None
    assert dead_experts(Progress(expert_load=(0.5, 0.5))) == ()
    assert dead_experts(Progress(expert_load=(1.0, 0.0), dead_experts=("0.1",))) == ("0.1",)
