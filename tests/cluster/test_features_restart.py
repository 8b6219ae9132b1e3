"""The operator stopped, killed, replaced; what happens meanwhile is not lost and not done twice.

Each test has an operator of its own namespace.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from btx_api.names import GROUP, STAGE_LABEL
from cluster.control_plane import Cluster
from cluster.operator_process import RULES, Operator, grant
from cluster.space import (
    TOLD,
    Space,
    attempt,
    condition,
    container,
    ended,
    row_of,
    running,
    scripted,
    task_of,
)
from kubernetes import client

Start = Callable[..., Operator]


@pytest.fixture
def start(cluster: Cluster, space: Space) -> Iterator[Start]:
    """Starts an operator of the namespace; the one before is killed."""
    kubeconfig, begun = grant(cluster), []

    def start(*, ready: bool = True, **settings: Any) -> Operator:
        stop(begun)
        made = Operator(cluster, kubeconfig, namespaces=[space.name], **settings)
        begun.append(made)
        made.start()
        if ready:
            made.wait_ready()
        return made

    yield start
    stop(begun)
    grant(cluster)


def stop(begun: list[Operator]) -> None:
    """Kills the last one, if it runs."""
    if begun and begun[-1].name in begun[-1].cluster.parts:
        begun[-1].stop(kill=True)
        del begun[-1].cluster.parts[begun[-1].name]


def allow(cluster: Cluster, refused: tuple[str, str] | None = None) -> None:
    """The operator's rights, all but one (resource, verb), once they are in force."""
    cut = [
        rule | {"verbs": [v for v in rule["verbs"] if (rule["resources"][0], v) != refused]}
        for rule in RULES
    ]
    rules = [rule for rule in cut if rule["verbs"]]
    rbac = client.RbacAuthorizationV1Api(cluster.client())
    rbac.replace_cluster_role(
        "btx-operator", {"metadata": {"name": "btx-operator"}, "rules": rules}
    )
    reviews = client.AuthorizationV1Api(cluster.client())
    checks = [("jobs", "create", "batch", ""), ("btxruns", "update", GROUP, "status")]

    def allowed(resource: str, verb: str, group: str, part: str) -> bool:
        what = {"resource": resource, "verb": verb, "group": group, "subresource": part}
        spec = {"user": "btx-operator", "resourceAttributes": what | {"namespace": "any"}}
        return bool(reviews.create_subject_access_review({"spec": spec}).status.allowed)

    def in_force() -> bool:
        wanted = [(f"{r}/{p}" if p else r, v) != refused for r, v, _, p in checks]
        return [allowed(*check) for check in checks] == wanted

    cluster.wait_for("the rights", in_force)


@pytest.mark.shows("adopt-intent", "create-retried")
def test_killed_between_status_and_create(cluster: Cluster, space: Space, start: Start) -> None:
    """The intent is stored, the Job is not: the next operator makes it, under the same name."""
    start()
    allow(cluster, ("jobs", "create"))
    run = space.run()
    stored = space.until(lambda run: condition(run, "Running")[1] == "Blocked")
    assert "spec.execution.prepare" in condition(stored, "Running")[2]
    assert space.jobs() == []
    row = row_of(stored, "preflight")
    start(ready=False)
    allow(cluster)
    job = space.job("preflight")
    space.succeeded()

    assert (row["attempt"], attempt(job), len(space.jobs("preflight"))) == (1, 1, 1)
    assert job["metadata"]["ownerReferences"][0]["uid"] == run["metadata"]["uid"]
    once(space)


@pytest.mark.shows("adopt-job", "killed-while-running")
def test_killed_after_create(cluster: Cluster, space: Space, start: Start) -> None:
    """The Job is there, its uid is not in status: it is adopted, and its result taken."""
    start()
    allow(cluster, ("jobs", "create"))
    space.run(execution=scripted(train={"stages": {"train-code": TOLD}}))
    space.until_condition("Running", "False", "Blocked")
    allow(cluster, ("btxruns/status", "update"))
    job = space.job("preflight", lambda job: bool(ended(job)))
    assert "handle" not in space.row("preflight")
    start()
    allow(cluster)
    space.pod("train-code", running)
    assert [j["metadata"]["uid"] for j in space.jobs("preflight")] == [job["metadata"]["uid"]]
    space.until_row("train-code", state="Running")
    start(ready=False)
    space.release("train-code")
    space.succeeded()
    once(space)


def once(space: Space) -> None:
    """Every stage had one attempt, one Job and one commit."""
    rows = space.get()["status"]["stages"]
    assert all(row["attempt"] == 1 for row in rows)
    assert len(space.jobs()) == len(rows) + 1
    assert sorted(space.commits()) == sorted(row["name"] for row in rows)


@pytest.mark.shows("killed-while-running", "ends-on-sigterm")
def test_what_happens_while_it_is_down(space: Space, start: Start) -> None:
    """It ends on SIGTERM at once with 0; results of Jobs that ended meanwhile are read afterwards."""
    first = start()
    space.run(execution=scripted(train=TOLD))
    for stage in ("train-code", "train-math"):
        space.until_row(stage, state="Running")
    process = first.cluster.parts[first.name].process
    assert process is not None
    process.terminate()
    assert process.wait(15) == 0
    first.stop(kill=True)
    for stage in ("train-code", "train-math"):
        space.release(stage)
        space.job(stage, lambda job: ended(job) == "Complete")
    start(ready=False)
    space.succeeded()
    once(space)


@pytest.mark.shows("pod-force-deleted", "result-by-must-exist")
def test_a_pod_is_force_deleted_before_its_result_is_read(space: Space, start: Start) -> None:
    """A task with mustExist reads it from the manifest: full metrics, trained once."""
    first = start()
    space.run(execution=scripted(train={"attempts": [TOLD, {}]}))
    for stage in ("train-code", "train-math"):
        space.until_row(stage, state="Running")
    first.stop(kill=True)
    for stage in ("train-code", "train-math"):
        space.release(stage)
        space.job(stage, lambda job: ended(job) == "Complete")
        for pod in space.pods(stage):
            space.core.delete_namespaced_pod(
                pod["metadata"]["name"], space.name, grace_period_seconds=0
            )
    start(ready=False)
    run = space.succeeded()

    for stage in ("train-code", "train-math"):
        row = row_of(run, stage)
        assert (row["attempt"], row["gain"], row.get("failures", 0)) == (2, 0.5, 0)
        tasks = [task_of(job) for job in space.jobs(stage)]
        assert [task.execution.must_exist for task in tasks] == [False, True]
        assert space.commits(stage) == [stage]


@pytest.mark.shows("lost")
def test_a_job_vanishes_while_it_is_down(space: Space, start: Start) -> None:
    """Its uid is in status, the object and its pod are gone: lost, and tried again at once."""
    first = start()
    space.run(execution=scripted(train={"attempts": [TOLD, {}]}))
    job = space.job("train-code")
    for stage in ("train-code", "train-math"):
        space.until_row(stage, state="Running")
    first.stop(kill=True)
    space.delete_job(job)
    space.none_left("train-code")
    start(ready=False)
    row = space.until_row("train-code", state="Complete")

    counts = [row.get(key, 0) for key in ("attempt", "lost", "failures", "preemptions")]
    assert counts == [2, 1, 0, 0]
    message = space.event("AttemptLost", "train-code")
    assert message == "train-code: attempt 1: vanished without a result"
    assert space.row("train-math")["attempt"] == 1


@pytest.mark.shows("ttl", "finished-jobs-deleted")
def test_jobs_go_by_their_ttl(space: Space, start: Start) -> None:
    """One second after their end, while the run goes on; nothing runs again."""
    start(jobTtlSeconds=1)
    space.run(execution=scripted(finetune=TOLD))
    space.pod("finetune", running)
    for stage in ("preflight", "prepare-code", "train-code", "mix"):
        space.none_left(stage)
    space.release("finetune")
    space.succeeded()
    space.none_left()
    start(jobTtlSeconds=1)
    space.note(retry="1")
    run = space.until(lambda run: run["status"].get("retry") == "1")

    assert space.jobs() == []
    assert all(row["attempt"] == 1 for row in run["status"]["stages"])
    assert len(space.commits()) == len(set(space.commits()))


@pytest.mark.shows("upgrade-keeps-image", "upgrade-new-run")
def test_an_upgrade_between_train_and_mix(space: Space, start: Start) -> None:
    """An accepted run keeps its image, also for what starts later; a new run gets the new one."""
    start(trainerImage="trainer:v1")
    space.run(execution=scripted(train={"stages": {"train-math": TOLD}}))
    space.until_row("train-code", state="Complete")
    math = space.until_row("train-math", state="Running")
    start(trainerImage="trainer:v2")
    space.run("new", storage={"uri": f"file://{space.name}-2"})
    space.succeeded("new")
    space.release("train-math")
    run = space.succeeded()

    assert row_of(run, "train-math")["attempt"] == math["attempt"] == 1
    assert run["status"]["release"]["image"] == "trainer:v1"
    images = {
        name: {container(job)["image"] for job in space.jobs(name=name)} for name in ("run", "new")
    }
    assert images == {"run": {"trainer:v1"}, "new": {"trainer:v2"}}
    assert space.commits("train-code") == ["train-code"] * 2
    assert [task_of(job).execution.image for job in space.jobs("mix")] == ["trainer:v1"]


@pytest.mark.shows("image-too-old")
def test_an_image_that_is_too_old(space: Space, start: Start) -> None:
    """A run accepted by a release whose Task this one cannot write: said, and nothing starts."""
    first = start()
    space.run(execution=scripted(train=TOLD))
    space.until_row("train-code", state="Running")
    first.stop(kill=True)
    space.patch({"status": {"release": {"task": -1}}}, subresource="status")
    start(ready=False)
    message = space.until_condition("Accepted", "False", "ImageTooOld")
    assert message == "task version -1 of the run's image; this engine writes 1"
    space.event("ImageTooOld", "task version -1")
    assert [attempt(job) for job in space.jobs("train-code")] == [1]
    space.edit(suspend=True)
    space.none_left("train-code")
    space.patch({"status": {"release": {"task": 1}}}, subresource="status")
    space.until_condition("Accepted", "True", "Accepted")


@pytest.mark.shows("namespace-deleted")
def test_a_namespace_is_deleted_while_it_is_down(space: Space, start: Start) -> None:
    """It goes: nothing of ours has a finalizer."""
    first = start()
    space.run(execution=scripted(train=TOLD))
    space.until_row("train-code", state="Running")
    first.stop(kill=True)
    space.close()

    def gone() -> bool:
        with contextlib.suppress(client.ApiException):
            space.core.read_namespace(space.name)
            return False
        return True

    space.cluster.wait_for("the end of the namespace", gone)


@pytest.mark.shows("status-conflict")
def test_a_status_that_somebody_else_wrote(space: Space, start: Start) -> None:
    """Two operators at once: a status written by the other is a conflict; nothing is made twice."""
    start(resyncSeconds=5)
    other = Operator(space.cluster, grant(space.cluster), name="other", namespaces=[space.name])
    other.start()
    try:
        other.wait_ready()
        for name in ("a", "b"):
            space.run(name, finetune={"optimizer": {"lr": 1e-4 if name == "a" else 2e-4}})
        runs = [space.succeeded(name) for name in ("a", "b")]
    finally:
        other.stop(kill=True)
        del space.cluster.parts["other"]
    writes = space.audit(verb="update", resource="btxruns")
    codes = [line["responseStatus"]["code"] for line in writes]
    assert 409 in codes
    for run in runs:
        name = run["metadata"]["name"]
        pairs = [
            (job["metadata"]["labels"][STAGE_LABEL], attempt(job)) for job in space.jobs(name=name)
        ]
        assert len(pairs) == len(set(pairs))
        assert all(row.get("attempt", 0) <= 1 for row in run["status"]["stages"])
    assert len(space.commits("train-code")) == len(space.commits("train-math")) == 1


@pytest.mark.shows("liveness-alone", "stuck-loop", "readiness")
def test_liveness_and_readiness(cluster: Cluster, space: Space, start: Start) -> None:
    """Alive without an API server, ready once it was listed; a loop that stands does not answer."""
    cluster.stop("kube-apiserver")
    made = start(ready=False)
    cluster.wait_for("life", lambda: made.get("/healthz")[0] == 200)
    assert made.get("/healthz") == (200, "ok")
    assert made.get("/readyz")[0] == 503
    cluster.start("kube-apiserver")
    made.wait_ready()
    process = cluster.parts[made.name].process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    assert made.get("/healthz")[0] == 0
    os.kill(process.pid, signal.SIGCONT)
    cluster.wait_for("life", lambda: made.get("/healthz")[0] == 200)
    space.run(method="Dense")
    space.succeeded()
