"""One artifact is made once at a time: two names in one run, two runs over one storage."""

from typing import Any

import pytest
from btx_api.spec import BTXRunSpec
from btx_api.stage import Exit
from btx_api.status import ConditionType, Reason, State
from builders import spec_of
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator import Simulator, corrupt_input

SUCCEEDED = ConditionType.SUCCEEDED


def twins() -> BTXRunSpec:
    """The domain `general` is the expert's own data under another name."""
    return spec_of(general=[{"uri": "file://math.jsonl"}])


def test_two_names_for_one_artifact_in_one_run(sim: Simulator) -> None:
    """The second waits for the first and is complete with it, without an attempt."""
    sim.storage.fingerprints = {"general": "math" + "d" * 18}
    sim.submit(twins())
    sim.settle()
    sim.end("preflight")
    sim.settle()
    assert sim.row("prepare-general").state is State.WAITING
    assert sim.row("prepare-general").waits_for == "prepare-math"

    sim.finish()

    assert sim.attempts()["prepare-general"] == 0
    assert sim.condition(SUCCEEDED) == ("True", Reason.COMPLETE)


def test_a_twin_takes_over_when_the_first_fails(sim: Simulator) -> None:
    """And the first is complete with it."""
    sim.storage.fingerprints = {"general": "math" + "d" * 18}
    sim.submit(twins())
    sim.finish(but=["prepare-math"])

    sim.end("prepare-math", Exit.FAILED)
    sim.settle()
    assert "prepare-general" in sim.live()
    sim.end("prepare-general")
    sim.finish()

    assert sim.row("prepare-math").state is State.COMPLETE
    assert sim.attempts()["prepare-math"] == 1


def two_runs(sim: Simulator) -> None:
    """The older run trains, the younger waits."""
    sim.submit(spec_of(), name="older")
    sim.finish("older", but=["train-code"])
    sim.submit(spec_of(), name="younger")
    sim.finish(but=["train-code"])
    assert sim.row("train-code", "younger").waits_for == "older/train-code"
    assert sim.condition(ConditionType.QUEUED, "younger") == ("True", Reason.WAITING_FOR)


def test_a_waiter_gets_its_result_from_the_holders_row(sim: Simulator) -> None:
    """Nothing is started for it, and the gain is there."""
    two_runs(sim)

    sim.finish()

    assert sim.attempts("younger")["train-code"] == 0
    assert sim.row("train-code", "younger").gain == 0.5
    assert sim.condition(SUCCEEDED, "younger") == ("True", Reason.COMPLETE)
    assert sim.status("younger").model == sim.status("older").model


@pytest.mark.parametrize("how", ["suspended", "failed", "gone", "queued"])
def test_a_waiter_takes_over(sim: Simulator, how: str) -> None:
    """When the holder does not work on it any more."""
    two_runs(sim)
    match how:
        case "suspended":
            sim.submit(spec_of(suspend=True), name="older")
            sim.settle("older")
            sim.end("train-code", Exit.PREEMPTED, run="older")
        case "failed":
            sim.end("train-code", Exit.FAILED, run="older")
            sim.settle("older")
        case "gone":
            del sim.worlds["older"]
        case "queued":
            sim.end("train-code", Exit.PREEMPTED, run="older")
            sim.held = {"older/train-code"}
            sim.settle("older")
            assert sim.row("train-code", "older").state is State.QUEUED
    sim.settle("younger")

    assert "train-code" in sim.live("younger")


def test_a_holder_that_failed_waits_for_the_one_that_took_over(sim: Simulator) -> None:
    """Nobody has precedence for its age alone."""
    two_runs(sim)
    sim.end("train-code", Exit.FAILED, run="older")
    sim.settle()
    sim.advance(10)
    sim.settle()
    assert sim.row("train-code", "older").waits_for == "younger/train-code"

    sim.finish()

    assert sim.attempts("older")["train-code"] == 1
    assert sim.condition(SUCCEEDED, "older") == ("True", Reason.COMPLETE)


def test_runs_that_are_ready_at_once_start_one_attempt(sim: Simulator) -> None:
    """An intent counts before anything is created (checked after every step)."""
    for name in ("a", "b", "c"):
        sim.submit(spec_of(), name=name)

    sim.finish()

    totals = {
        stage: sum(sim.attempts(name)[stage] for name in ("a", "b", "c"))
        for stage in sim.attempts("a")
    }
    assert set(totals.values()) == {1}
    assert all(sim.condition(SUCCEEDED, name)[0] == "True" for name in ("a", "b", "c"))


def test_of_two_intents_the_older_run_goes_on(sim: Simulator) -> None:
    """As after two engines wrote at once: the younger steps back, and creates nothing."""
    sim.submit(spec_of(), name="older")
    sim.submit(spec_of(), name="younger")
    sim.finish(but=["train-code", "train-math"])
    for name in ("older", "younger"):
        world = sim.worlds[name]
        sim.vanish("train-code", name)
        rows = tuple(
            row.model_copy(update={
                "state": State.STARTING, "attempt": 1, "handle": "", "start_time": None,
                "waits_for": "",
            })
            if row.name == "train-code"
            else row
            for row in world.status.stages
        )  # fmt: skip
        world.status = world.status.model_copy(update={"stages": rows})

    sim.step("younger")
    sim.step("older")

    assert "train-code" not in sim.live("younger")
    assert "train-code" in sim.live("older")
    sim.finish()
    assert sim.condition(SUCCEEDED, "younger") == ("True", Reason.COMPLETE)


def test_another_storage_is_another_world(sim: Simulator) -> None:
    """Claims are about one prefix of one endpoint."""
    sim.submit(spec_of(), name="here")
    sim.submit(spec_of(storage={"uri": "file://elsewhere"}), name="there")
    sim.settle()
    sim.end("preflight", run="here")
    sim.end("preflight", run="there")
    sim.settle()

    assert set(sim.live("here")) == set(sim.live("there")) != set()


def test_two_runs_that_find_one_corrupt_copy_repair_it_once(sim: Simulator) -> None:
    """The repair has the artifact's digest, so it flies single too."""
    sim.submit(spec_of(), name="a")
    sim.submit(spec_of(evaluate={"tokens": 7}), name="b")
    sim.finish(but=["evaluate"])
    producer = sim.row("train-code", "a")
    report = corrupt_input(producer, sim.storage.complete[producer.digest])
    sim.end("evaluate", Exit.CORRUPT, run="a", result=report)
    sim.end("evaluate", Exit.CORRUPT, run="b", result=report)
    commits = sim.storage.commits

    sim.finish()

    assert sim.storage.commits == commits + 3
    assert all(sim.condition(SUCCEEDED, name)[0] == "True" for name in "ab")


MOVES = st.lists(
    st.tuples(
        st.sampled_from("xyz"),
        st.one_of(
            st.sampled_from(
                ["suspend", "resume", "look", "begin", "refresh", "retry", "gone", "wait"]
            ),
            st.tuples(st.integers(0, 9), st.sampled_from([Exit.OK] * 10 + [*Exit, -9])),
        ),
    ),
    max_size=60,
)
"""To which run, and what: pairs end one of its attempts."""


def disturb(sim: Simulator, name: str, move: str, value: str) -> None:
    """One thing that happens to one of several runs."""
    world, live = sim.worlds[name], list(sim.live(name))
    assert world.spec is not None
    match move:
        case "suspend" | "resume":
            sim.submit(world.spec.model_copy(update={"suspend": move == "suspend"}), name=name)
        case "look":
            sim.step(name)
        case "begin":
            sim.begin_pending()
        case "refresh" | "retry":
            setattr(world, move, value)
        case "gone" if live:
            sim.vanish(live[0], name)
        case "wait":
            sim.advance(50)


@settings(max_examples=20, deadline=None)
@given(moves=MOVES)
def test_runs_over_one_storage_end_well_whatever_happens(moves: list[tuple[str, Any]]) -> None:
    """Nobody waits for ever, nothing is made by two at once (checked after every step)."""
    sim = Simulator()
    for name in "xyz":
        sim.submit(spec_of(evaluate={"tokens": 8 if name == "z" else 9}), name=name)
    for number, (name, move) in enumerate(moves):
        if number % 2:
            sim.settle()
        if isinstance(move, str):
            disturb(sim, name, move, str(number))
        elif stages := list(sim.live(name)):
            sim.end(stages[move[0] % len(stages)], move[1], run=name)

    for name in "xyz":
        disturb(sim, name, "resume", "")
        disturb(sim, name, "retry", "at last")
    for _ in range(6):
        sim.finish()
        sim.advance(600)

    assert [sim.condition(SUCCEEDED, name)[0] for name in "xyz"] == ["True"] * 3
