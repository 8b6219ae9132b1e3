"""Kueue by label: a second field manager admits and evicts Jobs.

The test plays it; where a real Kueue is given by environment (kueue.py), the same tests run against
that too.
"""

import time
from collections.abc import Iterator
from typing import Protocol

import pytest
from btx_api.names import QUEUE_LABEL
from cluster import kueue
from cluster.control_plane import Cluster
from cluster.operator_process import USER, Operator
from cluster.space import TOLD, Object, Space, attempt, condition, row_of, running, scripted

QUEUED = {"train": {"queueName": "gpus"}}


def queued(script: Object, queue: str = "gpus") -> Object:
    """`spec.execution`: train by a queue, and by a script."""
    block = scripted(train=script)["train"]
    return {"train": block | ({"queueName": queue} if queue else {})}


def suspend(space: Space, job: Object, wanted: bool, **template: Object) -> None:
    """As Kueue does it: spec.suspend, and what the flavour injects while the Job is suspended."""
    name = job["metadata"]["name"]
    if template:
        body = {"spec": {"template": template}}
        space.batch.patch_namespaced_job(name, space.name, body, field_manager="kueue")
    space.batch.patch_namespaced_job(
        name, space.name, {"spec": {"suspend": wanted}}, field_manager="kueue"
    )


FLAVOUR: Object = {
    "metadata": {"labels": {"kueue.x-k8s.io/podset": "main"}, "annotations": {"flavour": "spot"}},
    "spec": {"nodeSelector": {"hollow.test/node": "true"}},
}


class Kueue(Protocol):
    """Who admits and evicts."""

    def admit(self, *jobs: Object) -> None:
        """They may begin."""

    def evict(self, job: Object) -> None:
        """It has to go."""


class Played:
    """By the test, as Kueue does it."""

    def __init__(self, space: Space) -> None:
        self._space = space

    def admit(self, *jobs: Object) -> None:
        """See Kueue."""
        for job in jobs:
            suspend(self._space, job, False, **FLAVOUR)

    def evict(self, job: Object) -> None:
        """See Kueue."""
        suspend(self._space, job, True)


class Real:
    """By a Kueue, of which the test opens and closes the queue."""

    def __init__(self, space: Space) -> None:
        self._queue = kueue.Queue(space.cluster, space.name)
        self._queue.create()

    def admit(self, *jobs: Object) -> None:
        """See Kueue; of all Jobs that wait."""
        self._queue.set("None")

    def evict(self, job: Object) -> None:
        """See Kueue; of all Jobs that run."""
        self._queue.set("HoldAndDrain")


@pytest.fixture(scope="module")
def real(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[None]:
    """The manager of the Kueue that is given."""
    with kueue.manager(cluster):
        yield


# The summary at the end says loudly that there is no real one (tests/conftest.py).
@pytest.fixture(params=["played"] if kueue.missing() else ["played", "real"])
def admission(request: pytest.FixtureRequest, space: Space) -> Kueue:
    """Each in turn."""
    if request.param == "played":
        return Played(space)
    request.getfixturevalue("real")
    return Real(space)


@pytest.mark.shows("kueue-label", "kueue-queued", "kueue-injects", "deadlines-pause")
def test_a_job_of_a_queue_is_admitted(engine: Operator, space: Space, admission: Kueue) -> None:
    """Created suspended: Queued, no deadline runs. What is injected is never undone."""
    policy = {"pendingDeadlineSeconds": 6, "expertDeadlineSeconds": 3600}
    space.run(policy=policy, execution=queued({}))
    code = space.job("train-code")
    math = space.job("train-math")
    assert (code["spec"]["suspend"], code["metadata"]["labels"][QUEUE_LABEL]) == (True, "gpus")
    message = space.until_condition("Queued", "True", "Queued")
    assert set(message.split(", ")) <= {"train-code", "train-math"}
    run = space.until(lambda run: row_of(run, "train-math")["state"] == "Queued"
                      and row_of(run, "train-code")["state"] == "Queued")  # fmt: skip
    assert (run["status"]["state"], "expertSince" in run["status"]) == ("Queued", False)
    wait_past(space, 7)
    admission.admit(code, math)
    done = space.succeeded()

    for stage in ("train-code", "train-math"):
        row = row_of(done, stage)
        assert (row["attempt"], row.get("failures", 0)) == (1, 0)
        [job] = space.jobs(stage)
        template = job["spec"]["template"]
        assert template["spec"]["nodeSelector"] == FLAVOUR["spec"]["nodeSelector"]
        assert template["metadata"]["labels"]["kueue.x-k8s.io/podset"] == "main"
        if isinstance(admission, Played):
            assert template["metadata"]["annotations"]["flavour"] == "spot"
    writes = [line for line in space.audit(resource="jobs") if line["user"]["username"] == USER]
    assert {line["verb"] for line in writes} <= {"create", "get"}


def wait_past(space: Space, seconds: float) -> None:
    """Time passes, and the run stays queued."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        states = {row["state"] for row in map(space.row, ("train-code", "train-math"))}
        assert states == {"Queued"}
        time.sleep(0.5)


@pytest.mark.shows("kueue-evicts", "deadlines-pause")
def test_an_evicted_job_resumes(engine: Operator, space: Space, admission: Kueue) -> None:
    """Suspended again: SIGTERM, 75, Queued; admitted again it goes on in the same Job, uncounted."""
    space.run(execution=queued({"stages": {"train-code": [TOLD, TOLD]}}))
    admission.admit(*[space.job(stage) for stage in ("train-code", "train-math")])
    pod = space.pod("train-code", running)
    space.until_row("train-math", state="Complete")
    job = space.job("train-code")
    admission.evict(job)
    space.until_row("train-code", state="Queued")
    space.until_condition("Queued", "True", "Queued")
    admission.admit(job)
    again = space.pod(
        "train-code", lambda p: p["metadata"]["uid"] != pod["metadata"]["uid"] and running(p)
    )
    space.until_row("train-code", state="Running")
    space.tell(again)
    run = space.succeeded()

    row = row_of(run, "train-code")
    assert (row["attempt"], row.get("failures", 0), row.get("lost", 0)) == (1, 0, 0)
    assert row["preemptions"] == 1
    assert [attempt(job) for job in space.jobs("train-code")] == [1]
    assert space.commits("train-code") == ["train-code"]


@pytest.mark.shows("externally-suspended")
def test_a_job_that_somebody_suspends(engine: Operator, space: Space) -> None:
    """Without a queue's name that is said; the operator never writes spec.suspend."""
    space.run(execution=queued({"stages": {"train-code": TOLD, "train-math": TOLD}}, queue=""))
    jobs = [space.job(stage) for stage in ("train-code", "train-math")]
    for job in jobs:
        assert (job["spec"]["suspend"], QUEUE_LABEL in job["metadata"]["labels"]) == (False, False)
    space.pod("train-code", running)
    space.pod("train-math", running)
    for job in jobs:
        suspend(space, job, True)
    message = space.until_condition("Queued", "True", "ExternallySuspended")
    assert "train-code" in message or "train-math" in message
    for job in jobs:
        suspend(space, job, False)
    for stage in ("train-code", "train-math"):
        space.release(stage)
    run = space.succeeded()
    assert condition(run, "Queued")[:2] == ("False", "NotQueued")
    assert [row_of(run, stage)["attempt"] for stage in ("train-code", "train-math")] == [1, 1]


@pytest.mark.shows("take-over", "kueue-queued")
def test_a_queued_holder_holds_nothing(engine: Operator, space: Space) -> None:
    """Another run that can begin at once takes over; the queued Job then finds the artifact."""
    space.run("queued", execution=queued({}))
    space.until_row("train-code", "queued", state="Queued")
    space.run("free", finetune={"optimizer": {"lr": 0.0002}})
    space.succeeded("free")
    for stage in ("train-code", "train-math"):
        suspend(space, space.job(stage, name="queued"), False)
    space.succeeded("queued")
    assert space.commits("train-code") == ["train-code"]
