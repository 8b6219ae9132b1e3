"""What `kubectl get btx` says of a run: words made of its rows, which no code reads."""

import pytest
from btx_api.status import STAGE_LENGTH, Reason, Row, State, Status
from btx_operator.conditions import Verdict, conclude
from builders import spec_of
from simulator import Simulator


def shown(*states: tuple[str, State], preflight: State | None = None) -> tuple[str, str]:
    """(stage, experts) of a status with such rows."""
    rows = tuple(Row(name=name, digest="d", state=state) for name, state in states)
    errand = preflight and Row(name="preflight", digest="d", state=preflight)
    status = conclude(
        Status(stages=rows, preflight=errand), None, now=0,
        accepted=Verdict("True", Reason.ACCEPTED), suspended=Reason.NOT_SUSPENDED, succeeded=None,
    )  # fmt: skip
    return status.stage, status.experts


RUNNING, COMPLETE, PENDING = State.RUNNING, State.COMPLETE, State.PENDING
ROWS = [
    ((), None, ("", "")),
    ((), RUNNING, ("preflight", "")),
    ((), COMPLETE, ("", "")),
    ((("prepare-a", RUNNING), ("train-a", PENDING)), COMPLETE, ("prepare", "0/1")),
    (
        (("prepare-b", State.STARTING), ("train-a", RUNNING), ("train-b", PENDING)),
        COMPLETE,
        ("prepare, train", "0/2"),
    ),
    (tuple((f"train-{i}", State.QUEUED) for i in range(3)), COMPLETE, ("train x3", "0/3")),
    (
        (("train-a", COMPLETE), ("train-b", State.LATE), ("train-c", State.FAILED)),
        COMPLETE,
        ("", "1/3"),
    ),
    ((("train-a", State.BACK_OFF), ("train-b", State.STOPPING)), COMPLETE, ("", "0/2")),
    ((("train-a", COMPLETE), ("finetune", RUNNING)), RUNNING, ("preflight, finetune", "1/1")),
]


@pytest.mark.parametrize(("rows", "preflight", "words"), ROWS, ids=[str(row[-1]) for row in ROWS])
def test_the_words_follow_from_the_rows(
    rows: tuple[tuple[str, State], ...], preflight: State | None, words: tuple[str, str]
) -> None:
    """Kinds with an attempt, counted; complete train stages of all."""
    assert shown(*rows, preflight=preflight) == words


def test_the_words_are_short() -> None:
    """When everything runs at once, which no run does."""
    kinds = ("prepare", "train", "average", "mix", "stitch", "finetune", "evaluate")
    rows = [(f"{kind}-{i}", RUNNING) for kind in kinds for i in range(25)]

    stage, experts = shown(*rows)

    assert len(stage) <= STAGE_LENGTH
    assert stage.startswith("prepare x25, train x25")
    assert experts == "0/25"


def test_a_run_is_shown_from_its_first_stage_to_its_last(sim: Simulator) -> None:
    """Nothing has an attempt once it has ended; progress and ETA are not the engine's."""
    sim.submit(spec_of())
    sim.settle()
    assert (sim.status().stage, sim.status().experts) == ("preflight", "")
    sim.finish()

    status = sim.status()
    assert (status.state, status.stage, status.experts) == ("Succeeded", "", "2/2")
    assert (status.progress, status.eta) == ("", "")
