"""The engine is level-triggered: when and how often it looks changes nothing about the end."""

from functools import cache
from typing import Any

from btx_api.spec import BTXRunSpec
from btx_api.stage import Exit, Result
from btx_api.status import PREFLIGHT, ConditionType, State, Status
from builders import spec_of
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator import Simulator, corrupt_input, problem

EXPERTS = ("a", "b", "c")
SCRIPT: dict[tuple[str, int], tuple[int, Result | None]] = {
    ("preflight", 1): (Exit.FAILED, None),
    ("prepare-a", 1): (Exit.PREEMPTED, None),
    ("prepare-b", 1): (Exit.FAILED, problem("no space")),
    ("train-a", 1): (Exit.PREEMPTED, None),
    ("train-a", 2): (Exit.STALLED, problem("no step")),
    ("train-b", 1): (Exit.CONFIGURATION, problem("k")),
    ("finetune", 1): (-9, None),
}
"""How an attempt ends, by stage and number; all others end well."""


def a_world() -> Simulator:
    """Three experts, one of which will fail, over an empty storage."""
    experts = [
        {"name": name, "tokens": 100, "data": [{"uri": f"file://{name}"}]} for name in EXPERTS
    ]
    policy = {"failurePolicy": "Quorum", "minExperts": 2, "maxParallelExperts": 2}
    sim = Simulator()
    sim.submit(spec_of(experts=experts, policy=policy))
    return sim


def release(sim: Simulator, stage: str) -> None:
    """The stage's attempt ends as the script says."""
    attempt = sim.live()[stage]
    if stage == "mix" and attempt.number == 1:
        producer = sim.row("train-c")
        report = corrupt_input(producer, sim.storage.complete[producer.digest])
        sim.end(stage, Exit.CORRUPT, result=report)
        return
    code, result = SCRIPT.get((stage, attempt.number), (Exit.OK, None))
    sim.end(stage, Exit.PREEMPTED if attempt.stopping else code, result=result)


def end_state(status: Status) -> dict[str, Any]:
    """What must not depend on order: no times, no handles."""
    rows = {
        row.name: (row.state, row.failures, row.preemptions, row.lost, row.attempt, row.message)
        for row in (*status.stages, *([status.preflight] if status.preflight else []))
    }
    conditions = {c.type: (c.status, c.reason) for c in status.conditions}
    return {
        "rows": rows,
        "conditions": conditions,
        "members": status.members,
        "model": status.model,
    }


def to_the_end(sim: Simulator) -> dict[str, Any]:
    """In plain order: look after every change."""
    for _ in range(200):
        sim.settle()
        live = [stage for stage, attempt in sim.live().items()]
        for stage in live:
            release(sim, stage)
        if not live:
            sim.advance(600)
            sim.settle()
            if not sim.live():
                return end_state(sim.status())
    raise AssertionError("the run does not end")


@cache
def undisturbed() -> dict[str, Any]:
    """The end when everything is looked at once."""
    return to_the_end(a_world())


MOVES = st.lists(
    st.one_of(
        st.just("look"),
        st.just("look twice"),
        st.just("begin"),
        st.just("conflict"),
        st.just("wait"),
        st.just("patience"),
        st.integers(min_value=0, max_value=9),
    ),
    max_size=60,
)
"""Numbers end one of the live attempts; everything else is what the engine gets to see of it."""


@settings(max_examples=25, deadline=None)
@given(moves=MOVES)
def test_the_end_does_not_depend_on_what_was_seen_when(moves: list[str | int]) -> None:
    """Attempts end in any order; looks are dropped, doubled, put off, or lose their write."""
    sim = a_world()
    for move in moves:
        match move:
            case "look":
                sim.step()
            case "look twice":
                sim.step()
                sim.step()
            case "begin":
                sim.begin_pending()
            case "conflict":
                sim.worlds["run"].lose_write = True
            case "wait":
                sim.advance(7)
            case "patience":
                sim.patient = 1.0 - sim.patient
            case int() if sim.live():
                stages = list(sim.live())
                release(sim, stages[move % len(stages)])
            case _:
                sim.step()

    sim.patient = 0.0

    assert to_the_end(sim) == undisturbed()


def test_only_what_is_shown_waits() -> None:
    """Handles and Running do; an intent, a result, a wish and what is said in an event do not."""
    sim = a_world()
    sim.finish(but=["train-a", "train-b", "train-c"])
    sim.patient = 1.0

    sim.end("train-a", Exit.PREEMPTED)
    sim.step()
    assert (sim.row("train-a").state, sim.row("train-a").attempt) == (State.STARTING, 2)
    sim.step()
    sim.begin_pending()
    assert sim.step().again_after == 1.0
    assert (sim.row("train-a").state, sim.row("train-a").handle) == (State.STARTING, "")
    sim.end("train-a", Exit.OK)
    sim.step()
    assert sim.row("train-a").state is State.COMPLETE

    sim.step()
    sim.begin_pending()
    sim.step()
    assert sim.row("train-c").handle == ""
    sim.submit(of_experts("abc", suspend=True))
    sim.step()
    assert sim.row("train-c").state is State.STOPPING
    assert sim.row("train-c").handle


@settings(max_examples=15, deadline=None)
@given(lost=st.lists(st.sampled_from([PREFLIGHT, "prepare-a", "train-c", "mix"]), max_size=6))
def test_lost_attempts_cost_time_only(lost: list[str]) -> None:
    """Objects that vanish at any moment are made up for, and counted apart from failures."""
    sim = a_world()
    for stage in lost:
        sim.settle()
        sim.vanish(stage)
        sim.settle()
        sim.advance(600)
        for live in list(sim.live()):
            release(sim, live)

    end = to_the_end(sim)

    expected = undisturbed()
    assert end["conditions"] == expected["conditions"]
    assert end["members"] == expected["members"]
    for name, row in expected["rows"].items():
        state, failures, *_ = end["rows"][name]
        # The script fails attempts by number: it may have been the lost one that would have failed.
        assert state == row[0] and failures <= row[1]


def test_the_script_has_a_failed_expert_and_a_repair() -> None:
    """So that the properties above are about more than a run without incidents."""
    sim = a_world()
    to_the_end(sim)

    assert sim.row("train-b").state is State.FAILED
    assert sim.row("train-c").invalid is not None
    assert sim.row("finetune").failures == 1
    assert sim.condition(ConditionType.SUCCEEDED)[0] == "True"


USERS = st.lists(
    st.one_of(
        st.sampled_from(
            ["suspend", "refresh", "retry", "unreadable", "immutable", "close", "gone"]
        ),
        st.sampled_from(["a", "ab", "abc", "abcd", "retrain", "minimum"]),
        st.tuples(st.integers(0, 9), st.sampled_from([Exit.OK] * 12 + [*Exit, -9])),
        st.tuples(st.integers(0, 9), st.just(Exit.OK)),
        st.sampled_from(["look", "begin", "wait"]),
    ),
    max_size=60,
)
"""What users, nodes and time may do to a run: letters are its experts, pairs end an attempt."""


def of_experts(names: str, **changes: Any) -> BTXRunSpec:
    """A spec that may be edited in every way."""
    tokens = changes.pop("tokens", 100)
    experts = [
        {"name": name, "tokens": tokens, "data": [{"uri": f"file://{name}"}]} for name in names
    ]
    policy = {"allowRetrain": True, "maxParallelExperts": 2, **changes.pop("policy", {})}
    return spec_of(experts=experts, policy=policy, **changes)


def disturb(sim: Simulator, move: str) -> None:
    """One thing that is not the end of an attempt."""
    world = sim.worlds["run"]
    edits = {
        "suspend": of_experts("ab", suspend=True),
        "unreadable": None,
        "immutable": of_experts("ab", method="Dense"),
        "retrain": of_experts("ab", tokens=200),
        "minimum": of_experts("ab", policy={"minExperts": 1, "failurePolicy": "Quorum"}),
    }
    match move:
        case "look":
            sim.step()
        case "begin":
            sim.begin_pending()
        case "wait":
            sim.advance(100)
        case "close":
            world.closing = not world.closing
        case "refresh" | "retry":
            setattr(world, move, f"{len(sim.decisions)}")
        case "gone" if sim.live():
            sim.vanish(next(iter(sim.live())))
        case "immutable" if not world.status.generation:
            sim.step()  # nothing is pinned yet
        case _ if move in edits:
            sim.submit(edits[move])
        case _ if set(move) <= set("abcd"):
            sim.submit(of_experts(move))


def report_of(sim: Simulator, stage: str, code: int) -> Result | None:
    """A corrupt input is one that exists; else the reader has not read anything."""
    readable = [row for row in sim.status().stages if row.digest in sim.storage.complete]
    if code == Exit.CORRUPT and readable and stage != PREFLIGHT:
        return corrupt_input(readable[-1], sim.storage.complete[readable[-1].digest])
    return None


@settings(max_examples=25, deadline=None)
@given(history=USERS)
def test_any_history_can_be_mended(history: list[Any]) -> None:
    """Whatever happened, a good spec and one retry end in success; every step keeps the rules."""
    sim = Simulator()
    sim.submit(of_experts("ab"))
    for number, move in enumerate(history):
        if number % 3:
            sim.settle()
        if isinstance(move, str):
            disturb(sim, move)
        elif sim.live():
            stages = list(sim.live())
            stage = stages[move[0] % len(stages)]
            sim.end(stage, move[1], result=report_of(sim, stage, move[1]))

    world = sim.submit(of_experts("abc"))
    world.closing, world.retry = False, "at last"
    for _ in range(5):
        sim.finish()
        sim.advance(600)

    assert sim.condition(ConditionType.SUCCEEDED)[0] == "True"
    assert sim.status().members is not None
    assert sim.live() == {}
