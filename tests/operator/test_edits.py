"""Edits of a run: pending, refused, accepted; what is kept, what is made again."""

from typing import Any

import pytest
from btx_api.spec import BTXRunSpec
from btx_api.stage import VERSIONS, Exit
from btx_api.status import ConditionType, Reason, Release, State
from builders import a_spec, spec_of
from simulator import Simulator, corrupt_input, problem

ACCEPTED, SUCCEEDED = ConditionType.ACCEPTED, ConditionType.SUCCEEDED


def with_experts(*names: str, policy: dict[str, Any] | None = None, **changes: Any) -> BTXRunSpec:
    """Experts by name, each with its own data; `changes`: of single experts."""
    experts = [
        {"name": name, "tokens": 100, "data": [{"uri": f"file://{name}"}], **changes.get(name, {})}
        for name in names
    ]
    return spec_of(experts=experts, policy=policy or {})


def finished(sim: Simulator, spec: BTXRunSpec) -> dict[str, int]:
    """Runs to the end; attempts by stage."""
    sim.submit(spec)
    sim.finish()
    assert sim.condition(SUCCEEDED) == ("True", Reason.COMPLETE)
    return sim.attempts()


def made_again(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """Stages with more attempts than before, or new ones."""
    return {name for name, attempts in after.items() if attempts != before.get(name, 0)}


LAST = {"average", "mix", "finetune", "evaluate"}

EDITS: dict[str, tuple[BTXRunSpec, set[str]]] = {
    "an expert is added": (with_experts("a", "b", "c"), {"prepare-c", "train-c", *LAST}),
    "an expert is dropped": (with_experts("a"), LAST),
    "an expert is replaced": (with_experts("a", "c"), {"prepare-c", "train-c", *LAST}),
    # Names are labels of the report only; but a finetune phase draws its domains in spec order.
    "an expert is renamed": (
        spec_of(experts=[
            {"name": "a", "tokens": 100, "data": [{"uri": "file://a"}]},
            {"name": "new", "tokens": 100, "data": [{"uri": "file://b"}]},
        ]),
        {"evaluate"},
    ),
    "an expert is retrained, which is allowed": (
        with_experts("a", "b", policy={"allowRetrain": True}, b={"tokens": 200}), {"train-b", *LAST},
    ),
    "the policy": (with_experts("a", "b", policy={"maxRetries": 9}), set()),
    "only how it runs": (with_experts("a", "b", b={"execution": {"threads": 2}}), set()),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITS)
def test_an_edit_of_a_finished_run(sim: Simulator, case: str) -> None:
    """Rows of the same name and digest are kept; what is complete in storage is found."""
    spec, expected = EDITS[case]
    sim.storage.fingerprints = {"new": "b" + "d" * 21}
    before = finished(sim, with_experts("a", "b"))

    after = finished(sim, spec)

    assert made_again(before, after) == expected
    assert set(after) == set(sim.attempts())


@pytest.mark.parametrize(
    "change",
    [{"policy": {"maxRetries": 9}}, {"suspend": True}, {"execution": {"train": {"threads": 2}}}],
)
def test_policy_suspend_and_scheduling_need_no_preflight(
    sim: Simulator, change: dict[str, Any]
) -> None:
    """They are outside of the graph and act at once."""
    sim.submit(spec_of())
    sim.finish(but=["train-code"])

    sim.submit(spec_of(**change))
    sim.step()

    assert sim.condition(ACCEPTED) == ("True", Reason.ACCEPTED)
    assert sim.status().generation == 2
    assert len(sim.tasks("preflight")) == 1


def test_an_edit_is_pending_until_preflight_has_looked(sim: Simulator) -> None:
    """Results are recorded, nothing starts, nothing is pruned."""
    sim.submit(with_experts("a", "b"))
    sim.finish(but=["train-a", "train-b"])

    sim.submit(with_experts("a"))
    sim.settle()
    assert sim.condition(ACCEPTED) == ("Unknown", Reason.EDIT_PENDING)
    sim.end("train-a")
    sim.settle()
    assert sim.row("train-a").state is State.COMPLETE
    assert set(sim.live()) == {"train-b", "preflight"}
    assert not sim.live()["train-b"].stopping

    sim.end("preflight")
    sim.settle()
    assert sim.live()["train-b"].stopping
    sim.end("train-b", Exit.PREEMPTED)
    sim.finish()
    assert sim.status().row("train-b") is None
    assert sim.condition(SUCCEEDED) == ("True", Reason.COMPLETE)


def test_an_edit_that_would_retrain_is_refused(sim: Simulator) -> None:
    """By the names of the experts; reverting and allowing both heal, without a word more."""
    before = finished(sim, with_experts("a", "b"))

    sim.submit(with_experts("a", "b", b={"tokens": 200}))
    sim.finish()

    assert sim.condition(ACCEPTED) == ("False", Reason.WOULD_RETRAIN)
    condition = sim.status().condition(ACCEPTED)
    assert condition is not None and condition.message.startswith("b: ")
    assert sim.attempts() == before
    sim.submit(with_experts("a", "b"))
    sim.finish()
    assert sim.condition(ACCEPTED) == ("True", Reason.ACCEPTED)
    assert sim.attempts() == before


def test_allowing_a_retrain_acts_at_once(sim: Simulator) -> None:
    """The answer of preflight is still there: `policy` is outside of the graph."""
    finished(sim, with_experts("a", "b"))
    sim.submit(with_experts("a", "b", b={"tokens": 200}))
    sim.finish()
    looks = len(sim.tasks("preflight"))

    sim.submit(with_experts("a", "b", b={"tokens": 200}, policy={"allowRetrain": True}))
    sim.finish()

    assert sim.condition(SUCCEEDED) == ("True", Reason.COMPLETE)
    assert sim.attempts()["train-b"] == 2
    assert len(sim.tasks("preflight")) == looks


def test_going_back_to_a_trained_recipe_retrains_nothing(sim: Simulator) -> None:
    """The artifact is still in storage, so nobody has to allow it."""
    finished(sim, with_experts("a", "b"))
    edited = with_experts("a", "b", b={"tokens": 200}, policy={"allowRetrain": True})
    before = finished(sim, edited)

    after = finished(sim, with_experts("a", "b"))

    assert made_again(before, after) == set()


def test_other_bytes_under_the_same_path_are_an_edit(sim: Simulator) -> None:
    """Seen by a new look at the inputs; only what reads them is made again."""
    spec = with_experts("a", "b")
    before = finished(sim, spec)
    sim.storage.fingerprints = {"b": "x" * 22}

    sim.submit(spec, refresh="again")
    sim.finish()
    assert sim.condition(ACCEPTED) == ("False", Reason.WOULD_RETRAIN)
    after = finished(sim, with_experts("a", "b", policy={"allowRetrain": True}))

    assert made_again(before, after) == {"prepare-b", "train-b", *LAST}


def test_fingerprints_are_kept_while_their_uris_are(sim: Simulator) -> None:
    """An edit elsewhere does not notice other bytes; a refresh does."""
    before = finished(sim, with_experts("a", "b"))
    sim.storage.fingerprints = {"b": "x" * 22}

    after = finished(sim, with_experts("a", "b", "c"))

    assert made_again(before, after) == {"prepare-c", "train-c", *LAST}
    sim.submit(with_experts("a", "b", "c"), refresh="again")
    sim.finish()
    assert sim.condition(ACCEPTED) == ("False", Reason.WOULD_RETRAIN)


def test_an_artifact_that_is_gone_is_made_again(sim: Simulator) -> None:
    """At the next look; here evaluate's manifest was removed."""
    spec = with_experts("a", "b")
    before = finished(sim, spec)
    del sim.storage.complete[sim.row("evaluate").digest]

    sim.submit(spec, refresh="again")
    sim.finish()

    assert made_again(before, sim.attempts()) == {"evaluate"}


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("method", {"method": "Dense"}),
        ("seed.uri", {"seed": {"uri": "file://other"}}),
        ("storage.uri", {"storage": {"uri": "file://other"}}),
    ],
)
def test_immutable_fields(sim: Simulator, path: str, change: dict[str, Any]) -> None:
    """Refused naming the field once the run was accepted; its attempts go on; reverting heals."""
    sim.submit(spec_of())
    sim.finish(but=["train-code"])

    sim.submit(spec_of(**change))
    sim.settle()

    condition = sim.status().condition(ACCEPTED)
    assert condition is not None
    assert (condition.reason, condition.message.split(":")[0]) == (Reason.IMMUTABLE, path)
    assert not sim.live()["train-code"].stopping
    sim.submit(spec_of())
    sim.finish()
    assert sim.condition(SUCCEEDED) == ("True", Reason.COMPLETE)


def test_a_wrong_seed_of_a_new_run_can_be_mended(sim: Simulator) -> None:
    """Nothing is pinned before the first acceptance."""
    sim.storage.problems = ("seed.uri: no such folder",)
    sim.submit(spec_of(seed={"uri": "file://wrong"}))
    sim.settle()
    sim.end("preflight")
    sim.settle()
    assert sim.status().problems == ("seed.uri: no such folder",)
    sim.storage.problems = ()

    finished(sim, spec_of())

    assert sim.status().problems == ()


def test_problems_are_looked_at_again_with_a_back_off(sim: Simulator) -> None:
    """So that a Secret that is created later heals the run."""
    sim.storage.problems = ("storage.uri: access denied",)
    sim.submit(spec_of())
    waits = []
    for _ in range(4):
        sim.settle()
        sim.end("preflight")
        decision = sim.step()
        assert decision.again_after is not None
        waits.append(decision.again_after)
        assert sim.condition(ACCEPTED) == ("False", Reason.PROBLEMS_FOUND)
        sim.advance(decision.again_after)
    sim.storage.problems = ()
    sim.finish()

    assert waits == [10, 20, 40, 80]
    assert sim.condition(SUCCEEDED) == ("True", Reason.COMPLETE)


def test_preflight_may_name_a_problem_by_its_exit(sim: Simulator) -> None:
    """A configuration error is a problem for the user, not a failure of preflight."""
    sim.submit(spec_of())
    sim.settle()
    sim.end("preflight", Exit.CONFIGURATION, result=problem("no such file", "experts[0].data"))
    sim.settle()

    assert sim.condition(ACCEPTED) == ("False", Reason.PROBLEMS_FOUND)
    assert sim.status().problems == ("experts[0].data: no such file",)


def test_an_unreadable_spec_changes_nothing(sim: Simulator) -> None:
    """It is refused with its problems; attempts go on and their results are recorded."""
    sim.submit(spec_of())
    sim.finish(but=["train-code", "train-math"])

    sim.submit(None, problems=("spec.experts: is required", *["p" * 300] * 20))
    sim.settle()
    sim.end("train-code")
    sim.settle()

    assert sim.condition(ACCEPTED) == ("False", Reason.INVALID_SPEC)
    assert sim.row("train-code").state is State.COMPLETE
    assert list(sim.live()) == ["train-math"]
    sim.submit(spec_of(), problems=())
    sim.finish()
    assert sim.condition(SUCCEEDED) == ("True", Reason.COMPLETE)


@pytest.mark.parametrize("kind", ["trained", "ready"])
def test_two_experts_that_are_one_model_are_refused(sim: Simulator, kind: str) -> None:
    """Naming both."""
    experts: list[dict[str, Any]] = a_spec()["experts"]
    twin = {**experts[0], "name": "twin"}
    if kind == "ready":
        experts[0] = {"name": "code", "model": "file://m1"}
        twin = {"name": "twin", "model": "file://m2"}
    sim.storage.fingerprints = {"twin": "code" + "d" * 18}
    sim.storage.models = {"code": "m" * 22, "twin": "m" * 22}
    sim.submit(spec_of(experts=[*experts, twin]))
    sim.settle()
    sim.end("preflight")
    sim.settle()

    condition = sim.status().condition(ACCEPTED)
    assert condition is not None and condition.reason is Reason.DUPLICATE_EXPERTS
    assert "'code' and 'twin'" in condition.message


def test_a_new_edit_replaces_the_look_at_the_one_before(sim: Simulator) -> None:
    """The answer to an older question is not heard; its attempt is stopped first."""
    sim.submit(with_experts("a", "b"))
    sim.settle()
    sim.submit(with_experts("a", "b", "c"))
    sim.settle()

    assert sim.live()["preflight"].stopping
    assert len(sim.tasks("preflight")) == 1
    sim.end("preflight")
    sim.finish()
    assert set(sim.status().members.experts) == {"a", "b", "c"}
    assert len(sim.tasks("preflight")) == 2


def test_a_refresh_while_a_stage_is_repaired_leaves_the_repair_alone(sim: Simulator) -> None:
    """What preflight sees as complete is the corrupt copy."""
    sim.submit(spec_of())
    sim.finish(but=["evaluate"])
    producer = sim.row("train-code")
    report = corrupt_input(producer, sim.storage.complete[producer.digest])
    sim.end("evaluate", Exit.CORRUPT, result=report)
    sim.settle()

    sim.submit(spec_of(), refresh="again")
    sim.finish()

    assert sim.attempts()["train-code"] == 2
    assert sim.storage.complete[producer.digest] != report.corrupt.tag


def test_an_accepted_edit_forgives_failed_stages(sim: Simulator) -> None:
    """More retries, a mended Secret, other resources: whatever changed, try again."""
    sim.submit(with_experts("a", "b", policy={"maxRetries": 0}))
    sim.finish(but=["train-a"])
    sim.end("train-a", Exit.CONFIGURATION)
    sim.finish()
    assert sim.condition(SUCCEEDED)[0] == "False"

    sim.submit(with_experts("a", "b", policy={"maxRetries": 0}, a={"execution": {"threads": 1}}))
    sim.finish()

    assert sim.condition(SUCCEEDED) == ("True", Reason.COMPLETE)


def test_scheduling_edits_apply_from_the_next_attempt(sim: Simulator) -> None:
    """The running one goes on as it was."""
    sim.submit(with_experts("a", "b"))
    sim.finish(but=["train-a"])
    sim.submit(with_experts("a", "b", a={"execution": {"threads": 3}}))
    sim.settle()
    assert not sim.live()["train-a"].stopping
    sim.end("train-a", Exit.PREEMPTED)
    sim.finish()

    threads = [task.execution.scheduling.threads for task in sim.tasks("train-a")]
    assert threads == [None, 3]


def test_reuse_never_makes_everything_for_this_run(sim: Simulator) -> None:
    """Own addresses, same protocol; the second start of the same run still reuses its own."""
    finished(sim, spec_of())

    sim.submit(spec_of(policy={"reuse": "Never"}), name="own")
    sim.finish("own")
    sim.submit(spec_of(policy={"reuse": "Never"}), name="own", refresh="again")
    sim.finish("own")

    assert set(sim.attempts("own").values()) == {1}


def test_an_image_that_is_too_old_is_refused(sim: Simulator) -> None:
    """The engine writes tasks of its own version and of the one before."""
    finished(sim, spec_of())
    world = sim.worlds["run"]
    old = Release(image="trainer:0", task=-1, kinds=VERSIONS)
    world.status = world.status.model_copy(update={"release": old})

    sim.submit(with_experts("a"))
    sim.settle()

    assert sim.condition(ACCEPTED) == ("False", Reason.IMAGE_TOO_OLD)
