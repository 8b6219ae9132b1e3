"""The specification, one test per behaviour, on the simulator; retries and deadlines of a run."""

from typing import Any

import pytest
from btx_api.spec import BTXRunSpec
from btx_api.stage import VERSIONS, Corrupt, Exit, Kind, Result
from btx_api.status import SHORT_LENGTH, ConditionType, Reason, Release, State
from builders import spec_of
from simulator import Simulator, corrupt_input, problem

STAGES = [
    "prepare-code", "prepare-math", "prepare-general", "train-code", "train-math", "average",
    "mix", "finetune", "evaluate",
]  # fmt: skip
SUCCEEDED, ACCEPTED = ConditionType.SUCCEEDED, ConditionType.ACCEPTED


def with_policy(**policy: Any) -> BTXRunSpec:
    """The small run with a policy."""
    return spec_of(policy=policy)


def started(sim: Simulator) -> list[str]:
    """Names in the order of their starts."""
    return [start.name for decision in sim.decisions for start in decision.starts]


def test_a_run_from_start_to_end(sim: Simulator) -> None:
    """Preflight, then every stage once, in the order of the graph; then the model's URI."""
    sim.submit(spec_of())

    sim.finish()

    assert started(sim) == ["preflight", *STAGES]
    assert sim.condition(SUCCEEDED) == ("True", Reason.COMPLETE)
    digest = sim.row("finetune").digest
    assert sim.status().model == f"file://storage/stages/finetune/{digest}/attempts/{'f' * 16}"


def test_dense_needs_no_members(sim: Simulator) -> None:
    """The other method of this release ends with its own model."""
    sim.submit(spec_of(method="Dense"))

    sim.finish()

    assert sim.condition(SUCCEEDED) == ("True", Reason.COMPLETE)
    assert sim.status().members is None
    assert "/stages/train/" in sim.status().model


def test_a_run_without_an_incomplete_stage_ends_after_preflight(sim: Simulator) -> None:
    """The second run of a manifest, under whatever name, starts nothing else."""
    sim.submit(spec_of(), name="first")
    sim.finish()
    sim.decisions.clear()

    sim.submit(spec_of(), name="first", refresh="again")
    sim.submit(spec_of(), name="second")
    sim.finish()

    assert started(sim) == ["preflight", "preflight"]
    assert set(sim.attempts("second").values()) == {0}
    assert sim.condition(SUCCEEDED, "second") == ("True", Reason.COMPLETE)
    assert sim.status("second").model == sim.status("first").model
    assert sim.row("train-code", "second").gain == 0.5


def test_stages_wait_for_their_inputs_only(sim: Simulator) -> None:
    """An expert trains while another's data is still being prepared."""
    sim.submit(spec_of())
    sim.settle()
    sim.end("preflight")
    sim.settle()
    sim.end("prepare-code")
    sim.settle()

    assert set(sim.live()) == {"prepare-math", "prepare-general", "train-code"}


def test_a_stage_that_failed_is_tried_again_after_its_back_off(sim: Simulator) -> None:
    """And the engine asks to be called at that time."""
    sim.submit(with_policy(backoffSeconds=30))
    sim.finish(but=["train-code"])

    sim.end("train-code", Exit.FAILED, result=problem("out of memory"))
    decision = sim.step()

    assert decision.again_after == 30
    assert sim.row("train-code").message == "exit 1: out of memory"
    sim.advance(29)
    sim.settle()
    assert "train-code" not in sim.live()
    sim.advance(1)
    sim.finish()
    assert sim.attempts()["train-code"] == 2
    assert sim.condition(SUCCEEDED) == ("True", Reason.COMPLETE)


def test_a_run_fails_when_retries_run_out_and_stops_the_rest(sim: Simulator) -> None:
    """A failed run holds no GPUs; its reason names stage, exit code and message."""
    sim.submit(with_policy(maxRetries=0))
    sim.finish(but=["train-code", "train-math"])

    sim.end("train-code", Exit.FAILED, result=problem("out of memory"))
    sim.settle()

    assert sim.condition(SUCCEEDED) == ("False", Reason.EXPERT_FAILED)
    condition = sim.status().condition(SUCCEEDED)
    assert condition is not None
    assert condition.message == "train-code: exit 1: out of memory"
    assert sim.live()["train-math"].stopping
    sim.end("train-math", Exit.PREEMPTED)
    sim.settle()
    assert sim.live() == {}
    assert sim.row("train-math").preemptions == 0


def test_a_stage_that_is_no_experts_fails_the_run(sim: Simulator) -> None:
    """Quorum is about experts only."""
    sim.submit(with_policy(maxRetries=0, failurePolicy="Quorum", minExperts=1))
    sim.finish(but=["prepare-general"])

    sim.end("prepare-general", Exit.CONFIGURATION, result=problem("no such file", "general[0].uri"))
    sim.settle()

    assert sim.condition(SUCCEEDED) == ("False", Reason.STAGE_FAILED)


def test_a_new_retry_annotation_forgives(sim: Simulator) -> None:
    """The same value again does nothing."""
    world = sim.submit(with_policy(maxRetries=0))
    sim.finish(but=["train-code"])
    sim.end("train-code", Exit.CONFIGURATION)
    sim.finish()
    assert sim.condition(SUCCEEDED)[0] == "False"

    world.retry = "once"
    sim.settle()

    assert sim.condition(SUCCEEDED) == ("Unknown", Reason.IN_PROGRESS)
    assert sim.row("train-code").failures == 0
    sim.end("train-code", Exit.FAILED)
    sim.settle()
    assert sim.condition(SUCCEEDED)[0] == "False"


def test_preemptions_are_free(sim: Simulator) -> None:
    """However many: the next attempt follows at once and resumes."""
    sim.submit(with_policy(maxRetries=0))
    sim.finish(but=["train-code"])
    for _ in range(5):
        sim.end("train-code", Exit.PREEMPTED)
        sim.settle()

    sim.finish()

    row = sim.row("train-code")
    assert (row.attempt, row.preemptions, row.failures) == (6, 5, 0)


def test_a_lost_attempt_is_counted_apart(sim: Simulator) -> None:
    """Not found never means not run: the next attempt has a new number."""
    sim.submit(with_policy(maxRetries=0))
    sim.finish(but=["train-code"])

    sim.vanish("train-code")
    sim.finish()

    row = sim.row("train-code")
    assert (row.attempt, row.lost, row.failures) == (2, 1, 0)


def test_an_intent_survives_a_crash(sim: Simulator) -> None:
    """The status was written, nothing was created: the same start again."""
    sim.submit(spec_of())
    sim.settle()
    sim.vanish("preflight")
    world = sim.worlds["run"]
    errand = sim.row("preflight").model_copy(
        update={"state": State.STARTING, "handle": "", "start_time": None}
    )
    world.status = world.status.model_copy(update={"preflight": errand})

    decision = sim.step()

    assert [(s.name, s.attempt) for s in decision.starts] == [("preflight", 1)]
    sim.finish()
    assert sim.attempts()["evaluate"] == 1


def test_a_lost_write_creates_nothing(sim: Simulator) -> None:
    """Somebody else wrote the status: look again, act on what is stored."""
    sim.submit(spec_of(), lose_write=True)

    sim.step()

    assert sim.live() == {}
    assert sim.events == []
    sim.finish()
    assert sim.condition(SUCCEEDED)[0] == "True"


def test_a_lost_result_is_looked_for(sim: Simulator) -> None:
    """Complete without a readable result: the next attempt must not compute."""
    sim.submit(spec_of())
    sim.finish(but=["train-code"])

    sim.end("train-code", Exit.OK, readable=False)
    sim.settle()
    sim.end("train-code", Exit.MISSING)
    sim.finish()

    asked = [task.execution.must_exist for task in sim.tasks("train-code")]
    assert asked == [False, True, False]
    assert sim.row("train-code").failures == 0
    assert sim.condition(SUCCEEDED)[0] == "True"


def test_a_corrupt_input_is_made_again(sim: Simulator) -> None:
    """Producer and reader once more each, nothing else; the producer replaces the bad copy."""
    sim.submit(spec_of())
    sim.finish(but=["evaluate"])
    producer = sim.row("train-code")
    tag = sim.storage.complete[producer.digest]

    sim.end("evaluate", Exit.CORRUPT, result=corrupt_input(producer, tag))
    sim.finish()

    expected = {**dict.fromkeys(STAGES, 1), "train-code": 2, "evaluate": 2}
    assert sim.attempts() == expected
    assert [t.execution.replaces for t in sim.tasks("train-code")] == ["", tag]
    assert sim.storage.complete[producer.digest] != tag
    assert sim.condition(SUCCEEDED)[0] == "True"


def test_two_readers_of_one_corrupt_copy_cause_one_repair(sim: Simulator) -> None:
    """The second report is about a copy that is being replaced already."""
    sim.submit(spec_of())
    sim.finish(but=["average", "mix"])
    producer = sim.row("train-code")
    report = corrupt_input(producer, sim.storage.complete[producer.digest])

    sim.end("mix", Exit.CORRUPT, result=report)
    sim.settle()
    sim.end("average", Exit.CORRUPT, result=report)
    sim.finish()

    assert sim.attempts()["train-code"] == 2
    assert (sim.row("mix").failures, sim.row("average").failures) == (0, 0)
    assert sim.condition(SUCCEEDED)[0] == "True"


def test_an_artifact_that_stays_corrupt_fails_the_run(sim: Simulator) -> None:
    """Two repairs, then the producer is given up."""
    sim.submit(spec_of())
    sim.finish(but=["evaluate"])
    for _ in range(3):
        producer = sim.row("train-code")
        tag = sim.storage.complete[producer.digest]
        sim.end("evaluate", Exit.CORRUPT, result=corrupt_input(producer, tag))
        sim.finish(but=["evaluate"])

    assert sim.attempts()["train-code"] == 3
    assert sim.condition(SUCCEEDED) == ("False", Reason.STAGE_FAILED)


def test_a_late_report_of_a_replaced_copy_is_a_failure_of_its_reader(sim: Simulator) -> None:
    """It leads to a back-off, so that it cannot go round for ever."""
    sim.submit(spec_of())
    sim.finish(but=["mix", "average"])
    producer = sim.row("train-code")
    report = corrupt_input(producer, sim.storage.complete[producer.digest])
    sim.end("mix", Exit.CORRUPT, result=report)
    sim.finish(but=["average", "mix"])

    sim.end("average", Exit.CORRUPT, result=report)
    sim.settle()

    assert sim.attempts()["train-code"] == 2
    assert sim.row("average").state is State.BACK_OFF


def test_what_verify_finds_corrupt_is_made_again_and_nothing_else(sim: Simulator) -> None:
    """Consumers that are complete stay valid: their lineage names the copy that they read."""
    sim.submit(spec_of())
    sim.finish()
    row = sim.row("train-code")
    bad = Corrupt(kind=Kind.TRAIN, digest=row.digest, tag=sim.storage.complete[row.digest])
    sim.storage.corrupt = (bad,)

    sim.submit(spec_of(), refresh="again", verify=True)
    sim.settle()
    assert sim.tasks("preflight")[-1].preflight.verify
    sim.finish()

    assert sim.attempts() == {**dict.fromkeys(STAGES, 1), "train-code": 2}
    assert sim.tasks("train-code")[-1].execution.replaces == bad.tag


def test_the_active_deadline_ends_a_stage(sim: Simulator) -> None:
    """Over all its attempts; the live one is stopped."""
    sim.submit(with_policy(activeDeadlineSeconds=100))
    sim.finish(but=["train-code"])
    sim.advance(60)
    sim.end("train-code", Exit.PREEMPTED)
    sim.settle()
    assert sim.step().again_after == 40

    sim.advance(40)
    sim.settle()

    assert sim.row("train-code").message == "policy.activeDeadlineSeconds passed"
    assert sim.live()["train-code"].stopping
    assert sim.condition(SUCCEEDED) == ("False", Reason.EXPERT_FAILED)


def test_the_pending_deadline_stands_while_queued(sim: Simulator) -> None:
    """A queue may take its time; Queued tells, by the queue's name or without."""
    sim.held = {"prepare-code", "prepare-math", "prepare-general"}
    named = {"execution": {"prepare": {"queueName": "team"}}}
    sim.submit(spec_of(policy={"pendingDeadlineSeconds": 10}, **named))
    sim.submit(
        spec_of(policy={"pendingDeadlineSeconds": 10}, storage={"uri": "file://other"}),
        name="other",
    )
    sim.settle()
    sim.end("preflight")
    sim.end("preflight", run="other")
    sim.settle()
    sim.advance(1000)
    sim.settle()

    assert sim.row("prepare-code").state is State.QUEUED
    assert sim.condition(ConditionType.QUEUED) == ("True", Reason.QUEUED)
    assert sim.condition(ConditionType.QUEUED, "other") == ("True", Reason.EXTERNALLY_SUSPENDED)


def test_experts_train_in_spec_order_so_many_at_once(sim: Simulator) -> None:
    """maxParallelExperts counts those that are still stopping, too (an invariant of each step)."""
    experts = [{"name": f"e{i}", "tokens": 10, "data": [{"uri": f"file://{i}"}]} for i in range(5)]
    sim.submit(spec_of(experts=experts, policy={"maxParallelExperts": 2}))

    sim.finish()

    trains = [name for name in started(sim) if name.startswith("train-")]
    assert trains == [f"train-e{i}" for i in range(5)]
    assert sim.condition(SUCCEEDED)[0] == "True"


def test_suspend_stops_everything_and_costs_nothing(sim: Simulator) -> None:
    """Resume is the next attempt, uncounted; nothing starts before the old one is gone."""
    sim.submit(with_policy(maxRetries=0))
    sim.finish(but=["train-code", "train-math"])

    sim.submit(spec_of(policy={"maxRetries": 0}, suspend=True))
    sim.settle()
    assert all(attempt.stopping for attempt in sim.live().values())
    sim.end("train-code", Exit.PREEMPTED)
    sim.settle()
    assert sim.condition(ConditionType.SUSPENDED) == ("True", Reason.SUSPENDED)
    assert set(sim.live()) == {"train-math"}

    sim.submit(with_policy(maxRetries=0))
    sim.settle()
    assert sim.row("train-math").state is State.STOPPING
    sim.end("train-math", Exit.FAILED)
    sim.finish()
    assert [sim.row(f"train-{name}").attempt for name in ("code", "math")] == [2, 2]
    assert sim.row("train-math").failures == 0
    assert sim.condition(SUCCEEDED)[0] == "True"
    assert len(sim.tasks("preflight")) == 1


def test_an_engine_that_closes_stops_everything(sim: Simulator) -> None:
    """Ctrl-C is a suspension that nobody wrote into the spec."""
    world = sim.submit(spec_of())
    sim.finish(but=["train-code", "train-math"])

    world.closing = True
    sim.settle()
    for stage in list(sim.live()):
        sim.end(stage, Exit.PREEMPTED)
    sim.settle()

    assert sim.live() == {}
    assert sim.condition(ConditionType.SUSPENDED) == ("True", Reason.INTERRUPTED)
    world.closing = False
    sim.finish()
    assert sim.condition(SUCCEEDED)[0] == "True"


def test_an_attempt_that_the_graph_does_not_ask_for_is_stopped(sim: Simulator) -> None:
    """Whatever it is: nobody else is looking after it."""
    sim.submit(spec_of())
    sim.finish(but=["train-code"])
    world = sim.worlds["run"]
    key, attempt = next((k, a) for k, a in world.attempts.items() if a.stage == "train-code")
    stranger = ("stranger", 1, attempt.digest)
    world.attempts[stranger] = Simulator.copy_of(attempt, stage="stranger")

    sim.step()

    assert world.attempts[stranger].stopping
    assert not world.attempts[key].stopping


def test_tasks_carry_what_the_run_was_accepted_with(sim: Simulator) -> None:
    """An upgrade of the engine changes nothing under way."""
    kinds = {**VERSIONS, Kind.TRAIN: 7}
    sim.release_of_engine = Release(image="trainer:1", task=1, kinds=kinds)
    sim.submit(spec_of(execution={"train": {"threads": 3}}, policy={"noProgressSeconds": 99}))
    sim.finish(but=["train-code"])
    sim.release_of_engine = Release(image="trainer:2", task=1, kinds=VERSIONS)
    sim.finish()

    task = sim.tasks("finetune")[0]
    train = sim.tasks("train-code")[0]
    assert (task.execution.image, train.execution.image) == ("trainer:1", "trainer:1")
    assert train.stage is not None and train.stage.version == 7
    assert train.execution.scheduling.threads == 3
    assert (train.execution.run, train.execution.uid, train.execution.name) == (
        "run",
        "uid-run",
        "train-code",
    )
    assert train.execution.no_progress_seconds == 99
    assert [location.uri for location in train.execution.inputs] == ["file://seed", ""]


def test_conditions_keep_their_time_until_they_flip(sim: Simulator) -> None:
    """metav1: reasons and messages may change, the time marks the last change of status."""
    sim.submit(spec_of())
    sim.settle()
    began = int(sim.now)
    sim.advance(100)
    sim.end("preflight")
    sim.settle()

    times = {c.type: c.last_transition_time - began for c in sim.status().conditions}

    assert times == {"Accepted": 100, "Queued": 0, "Running": 100, "Suspended": 0, "Succeeded": 0}


def test_events_tell_each_change_once(sim: Simulator) -> None:
    """In words with exit code and what follows; no event per step that changed nothing."""
    sim.submit(with_policy(maxRetries=1))
    sim.finish(but=["train-code"])
    sim.events.clear()

    sim.end("train-code", Exit.FAILED, result=problem("no space"))
    sim.settle()
    sim.advance(10)
    sim.settle()
    sim.end("train-code", Exit.FAILED, result=problem("no space"))
    sim.settle()

    assert [(event.reason, event.message, event.warning) for event in sim.events] == [
        ("AttemptFailed", "train-code: attempt 1: exit 1: no space, to be tried again", True),
        ("AttemptStarted", "train-code: attempt 2", False),
        ("AttemptFailed", "train-code: attempt 2: exit 1: no space, given up", True),
        ("StageGivenUp", "train-code: exit 1: no space", True),
        ("ExpertFailed", "train-code: exit 1: no space", True),
    ]


def test_results_of_any_length_stay_bounded(sim: Simulator) -> None:
    """A row keeps a few words of a message; the rest is in the log."""
    sim.submit(spec_of())
    sim.finish(but=["train-code"])

    sim.end("train-code", Exit.FAILED, result=problem("x" * 600, "y" * 160))
    sim.settle()

    assert len(sim.row("train-code").message) == SHORT_LENGTH


@pytest.mark.parametrize("code", [Exit.OK, Exit.FAILED, Exit.MISSING, Exit.STALLED, -9])
def test_a_preflight_without_an_answer_is_tried_again(sim: Simulator, code: int) -> None:
    """More than maxRetries times: Accepted=False; and still again, for it may heal."""
    sim.submit(with_policy(maxRetries=1, backoffSeconds=10))
    for _ in range(3):
        sim.settle()
        sim.end("preflight", code, result=Result())
        sim.settle()
        sim.advance(1000)

    refused = code != Exit.MISSING
    assert (sim.condition(ACCEPTED) == ("False", Reason.PREFLIGHT_FAILED)) == refused
    sim.finish()
    assert sim.condition(ACCEPTED) == ("True", Reason.ACCEPTED)
    assert sim.condition(SUCCEEDED)[0] == "True"
