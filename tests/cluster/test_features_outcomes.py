"""How attempts end, and what becomes of it: one run in which every expert meets another mishap.

A hollow node has no logs: that an event carries the last lines is shown on the real node.
"""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pytest
from btx_api.stage import Problem, Result
from cluster.control_plane import Cluster
from cluster.operator_process import Operator
from cluster.space import (
    TOLD,
    Object,
    Space,
    attempt,
    condition,
    container,
    ended,
    job_name,
    row_of,
    running,
    scripted,
    task_of,
)
from kubernetes import client

POD = {
    "metadata": {},
    "spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "hollow"}]},
}
WRONG = Result(problem=Problem(field="spec.train.optimizer", message="is wrong")).line()
NO_GAIN = Result(token="f" * 16, metrics={"gain": -0.1}).line()


@dataclass(frozen=True)
class Mishap:
    """What an expert's pods do, and what is to be seen of it."""

    script: Any
    jobs: list[str]
    """How its Jobs end, first attempt first."""
    pods: int
    row: dict[str, Any]
    """Fields of its row once the run has ended."""
    events: list[tuple[str, str]] = field(default_factory=list)
    """(reason, part of the message)."""


def then_well(**act: Any) -> Object:
    """The first attempt does this; the second one is as it should be."""
    return {"attempts": [act, {}]}


RETRIED = {"state": "Complete", "attempt": 2, "failures": 1}
REPLACED = {"state": "Complete", "attempt": 1, "preemptions": 1}
TWO = ["Failed", "Complete"]
MISHAPS = {
    "fails": Mishap(
        then_well(exit=1), TWO, 2, RETRIED, [("AttemptFailed", "exit 1, to be tried again")]
    ),
    "killed": Mishap(
        then_well(exit=137), TWO, 2, RETRIED, [("AttemptFailed", "exit 137, to be tried again")]
    ),
    "memory": Mishap(
        then_well(exit=137, reason="OOMKilled"), TWO, 2, RETRIED,
        [("AttemptFailed", "spec.execution.train.resources.limits.memory: OOMKilled")],
    ),
    "stalls": Mishap(then_well(exit=70), TWO, 2, RETRIED, [("AttemptFailed", "exit 70")]),
    "diverges": Mishap(then_well(exit=71), TWO, 2, RETRIED, [("AttemptFailed", "exit 71")]),
    "evicted": Mishap(
        [{"end": "evict"}, {}], ["Complete"], 2, REPLACED, [("AttemptPreempted", "attempt 1")]
    ),
    "preempted": Mishap(
        [{"exit": 75}, {}], ["Complete"], 2, REPLACED, [("AttemptPreempted", "attempt 1")]
    ),
    "wrong": Mishap(
        {"exit": 78, "message": WRONG}, ["Failed"], 1,
        {"state": "Failed", "attempt": 1, "failures": 1, "exit": 78},
        [("AttemptFailed", "given up"), ("StageGivenUp", "spec.train.optimizer: is wrong")],
    ),
    "hopeless": Mishap(
        {"exit": 1}, ["Failed", "Failed"], 2,
        {"state": "Failed", "attempt": 2, "failures": 2, "exit": 1},
        [("AttemptFailed", "tried again"), ("AttemptFailed", "given up"), ("StageGivenUp", "exit 1")],
    ),
    "mute": Mishap(
        then_well(message="not a Result"), ["Complete", "Failed", "Complete"], 3,
        {"state": "Complete", "attempt": 3, "lost": 1, "gain": 0.5},
        [("AttemptLost", "exit 66")],
    ),
    "useless": Mishap(
        {"message": NO_GAIN}, ["Complete"], 1, {"state": "Complete", "attempt": 1, "gain": -0.1}
    ),
}  # fmt: skip
OUT = ("wrong", "hopeless", "useless")


def expert(name: str, **changes: Any) -> Object:
    """An expert with data of its own."""
    return {"name": name, "tokens": 100, "data": [{"uri": f"file://{name}.jsonl"}]} | changes


@pytest.fixture(scope="module")
def mishaps(cluster: Cluster, api: client.ApiClient, engine: Operator) -> Iterator[Space]:
    """A namespace in which the run has ended."""
    space = Space(cluster, api, f"test-{uuid.uuid4().hex[:8]}")
    scripts = {f"train-{name}": mishap.script for name, mishap in MISHAPS.items()}
    experts = [expert(name) for name in MISHAPS if name != "mute"]
    experts.append(expert("mute", execution={"gpus": 1, "nodes": 1}))
    space.run(
        experts=experts, execution=scripted(train={"stages": scripts}),
        policy={
            "maxRetries": 1, "failurePolicy": "Quorum", "minExperts": 2, "onNoGain": "Drop",
        },
    )  # fmt: skip
    space.succeeded()
    yield space
    space.close()


@pytest.mark.parametrize("name", MISHAPS)
@pytest.mark.shows(
    "failure-retried", "message-names-field", "disruption-replaced", "preempted-replaced",
    "configuration-final", "given-up", "must-exist-missing",
)  # fmt: skip
def test_an_expert_after_its_mishap(mishaps: Space, name: str) -> None:
    """Jobs and pods, the row's counts, and the events (posted in any order)."""
    mishap, stage = MISHAPS[name], f"train-{name}"
    jobs, pods = mishaps.jobs(stage), mishaps.pods(stage)
    row = mishaps.row(stage)
    counted = {"failures": 0, "preemptions": 0, "lost": 0} | mishap.row

    assert [ended(job) for job in jobs] == mishap.jobs
    assert [attempt(job) for job in jobs] == list(range(1, len(jobs) + 1))
    assert len({job["metadata"]["name"] for job in jobs}) == len(jobs)
    assert len(pods) == mishap.pods
    assert {key: row.get(key, 0) for key in counted} == counted
    quiet = ("AttemptStarted", "StageComplete", "MembersDecided")
    told = [(reason, text) for reason, text in mishaps.events() if reason not in quiet]
    told = [(reason, text) for reason, text in told if text.startswith(stage)]
    assert sorted(r for r, _ in told) == sorted(r for r, _ in mishap.events)
    for reason, text in mishap.events:
        assert any(reason == r and text in message for r, message in told), told


@pytest.mark.shows("configuration-final", "backoff")
def test_jobs_end_by_their_policy_and_wait_between(mishaps: Space) -> None:
    """78 by the first rule of podFailurePolicy; else the next attempt after the back-off."""
    [wrong] = mishaps.jobs("train-wrong")
    [end] = [c for c in wrong["status"]["conditions"] if c["type"] == "Failed"]
    first, second = mishaps.jobs("train-fails")
    [failed] = [c for c in first["status"]["conditions"] if c["type"] == "Failed"]

    assert (end["reason"], wrong["spec"]["podFailurePolicy"]["rules"][0]["action"]) == (
        "PodFailurePolicy", "FailJob",
    )  # fmt: skip
    assert time(second["metadata"]["creationTimestamp"]) > time(failed["lastTransitionTime"])


def time(text: str) -> datetime:
    """As the API writes it."""
    return datetime.fromisoformat(text)


@pytest.mark.shows("result-by-must-exist", "must-exist-missing")
def test_a_lost_result_is_looked_for_on_a_cpu(mishaps: Space) -> None:
    """The second attempt has the same task, computes nothing and asks for no GPU; the third does."""
    tasks = [task_of(job) for job in mishaps.jobs("train-mute")]
    limits = [container(job)["resources"].get("limits", {}) for job in mishaps.jobs("train-mute")]

    assert [task.execution.must_exist for task in tasks] == [False, True, False]
    assert len({task.stage.digest for task in tasks if task.stage}) == 1
    assert ["nvidia.com/gpu" in limit for limit in limits] == [True, False, True]


@pytest.mark.shows("quorum", "no-gain-dropped", "members-frozen")
def test_the_rest_goes_into_the_mix(mishaps: Space) -> None:
    """The failed and the useless are left out, in status, in the task of mix, and in an event."""
    run = mishaps.get()
    members = [name for name in (*[m for m in MISHAPS if m != "mute"], "mute") if name not in OUT]
    [mix] = mishaps.jobs("mix")
    stage = task_of(mix).stage

    assert run["status"]["members"]["experts"] == members
    assert condition(run, "Succeeded")[:2] == ("True", "Complete")
    assert stage is not None
    assert len(stage.inputs) == 1 + len(members)
    assert ("MembersDecided", f"members: {', '.join(members)}") in mishaps.events()


@pytest.mark.shows("job-deleted", "terminating-waits")
def test_a_job_deleted_by_hand(engine: Operator, space: Space) -> None:
    """Its pod checkpoints on SIGTERM: preempted, next attempt, no failure.

    While the Job is still terminating the next attempt waits.
    """
    space.run(execution=scripted(train={"attempts": [TOLD, {}]}))
    job, other = space.job("train-code"), space.job("train-math")
    for stage in ("train-code", "train-math"):
        space.until_row(stage, state="Running")
    hold = {"metadata": {"finalizers": ["hollow.test/hold"]}}
    space.batch.patch_namespaced_job(job["metadata"]["name"], space.name, hold)
    space.delete_job(job)
    space.delete_job(other)

    math = space.until_row("train-math", state="Complete")
    held = space.row("train-code")
    assert [attempt(job) for job in space.jobs("train-code")] == [1]
    assert held["attempt"] == 1
    free = {"metadata": {"finalizers": None}}
    space.batch.patch_namespaced_job(job["metadata"]["name"], space.name, free)
    code = space.until_row("train-code", state="Complete")
    for stage, row in (("train-code", code), ("train-math", math)):
        counts = [row.get(key, 0) for key in ("attempt", "preemptions", "failures", "lost")]
        assert counts == [2, 1, 0, 0]
        assert space.commits(stage) == [stage]
        space.event("AttemptPreempted", f"{stage}: attempt 1")


@pytest.mark.shows("finished-jobs-deleted")
def test_finished_jobs_that_are_deleted_do_not_run_again(engine: Operator, space: Space) -> None:
    """While the run goes on, and after its end: results are in status."""
    space.run(execution=scripted(train={"stages": {"train-math": TOLD}}))
    for stage in ("prepare-general", "train-code"):
        space.until_row(stage, state="Complete")
    space.pod("train-math", running)
    done = [job for job in space.jobs() if ended(job)]
    for job in done:
        space.delete_job(job)
    space.release("train-math")
    space.succeeded()
    for job in space.jobs():
        space.delete_job(job)
    space.none_left()
    space.note(retry="1")
    space.until(lambda run: run["status"].get("retry") == "1")

    assert len(done) >= 5
    assert space.jobs() == []
    assert len(space.commits()) == len(set(space.commits()))
    assert all(row["attempt"] == 1 for row in space.get()["status"]["stages"])


@pytest.mark.shows("active-deadline", "pending-deadline", "fail-run")
def test_deadlines_of_attempts(engine: Operator, space: Space) -> None:
    """A stage that runs too long, or whose pod does not start, is given up; SIGTERM, Job deleted."""
    space.run("long", policy={"activeDeadlineSeconds": 8}, execution=scripted(train=TOLD))
    space.run(
        # Pods of the stages before it have to begin within it on a busy machine.
        "stuck", policy={"pendingDeadlineSeconds": 6},
        execution=scripted(train={"begin": "never"}), storage={"uri": f"file://{space.name}-2"},
    )  # fmt: skip
    for name, policy in (("long", "activeDeadlineSeconds"), ("stuck", "pendingDeadlineSeconds")):
        message = space.until_condition("Succeeded", "False", "ExpertFailed", name)
        space.none_left("train-code", name)
        space.none_left("train-math", name)
        run = space.get(name)
        stages = ("train-code", "train-math")
        states = {stage: row_of(run, stage)["state"] for stage in stages}
        # The first to be given up stops the other, unless both are late at the same look.
        given_up = [stage for stage in stages if states[stage] == "Failed"]
        assert given_up and set(states.values()) <= {"Failed", "Pending"}
        assert run["status"]["state"] == "Failed"
        assert message.split(":")[0] in given_up
        assert f"policy.{policy} passed" in message
        for stage in given_up:
            space.event("StageGivenUp", f"{stage}: policy.{policy} passed", name)


@pytest.mark.shows("fail-run", "retry", "prune", "give-up-stops-others")
def test_a_failed_expert_fails_the_run_until_btx_retry(engine: Operator, space: Space) -> None:
    """The others stop with a checkpoint; the annotation forgives, and both go on."""
    script = {"stages": {"train-code": then_well(exit=78), "train-math": {"attempts": [TOLD, {}]}}}
    space.run(execution=scripted(train=script))
    space.until_condition("Succeeded", "False", "ExpertFailed")
    space.none_left("train-math")
    space.event("StageGivenUp", "train-code: exit 78")
    space.note(retry="2026-01-01")
    run = space.succeeded()

    code, math = row_of(run, "train-code"), row_of(run, "train-math")
    assert (code["attempt"], code.get("failures", 0)) == (2, 0)
    assert (math["attempt"], math.get("failures", 0), math.get("preemptions", 0)) == (2, 0, 0)
    assert run["status"]["retry"] == "2026-01-01"


@pytest.mark.shows("foreign-job")
def test_a_foreign_job_of_the_same_name(engine: Operator, space: Space) -> None:
    """Never adopted, never deleted: the stage is given up, with the object's name."""
    uid = space.run(execution=scripted(prepare={"stages": {"prepare-code": TOLD}}))["metadata"][
        "uid"
    ]
    row = space.until_row("train-code", state="Pending")
    name = job_name("run", uid, "train-code", row["digest"], 1)
    body = {"metadata": {"name": name}, "spec": {"suspend": True, "template": POD}}
    space.batch.create_namespaced_job(space.name, body)
    space.release("prepare-code")

    message = space.event("StageGivenUp", "train-code")
    assert "metadata.name" in message and name in message
    space.note(retry="1")
    space.until_row("train-code", state="Complete", attempt=2)
    assert space.batch.read_namespaced_job(name, space.name).spec.suspend
