"""A Job and its pods -> Attempt: every way in which Kubernetes says that something began or ended."""

from typing import Any

import pytest
from btx_api.stage import Exit, Result
from btx_operator.cluster.objects import JobObject, PodObject, Record
from btx_operator.cluster.outcome import STUCK_SECONDS, attempt_of
from btx_operator.observed import Phase
from builders import spec_of

NOW = 1_700_000_600.0
T0, T1, T2 = "2023-11-14T22:13:20Z", "2023-11-14T22:15:00Z", "2023-11-14T22:16:40Z"
"""1,700,000,000 and 100 s apart."""
LABELS = {"btx.dev/run": "r", "btx.dev/run-uid": "run-uid", "btx.dev/stage": "train-code"}
NOTES = {"btx.dev/attempt": "2", "btx.dev/digest": "d" * 32, "btx.dev/execution": "e"}


def meta(name: str, uid: str, **more: Any) -> dict[str, Any]:
    return {
        "namespace": "ns", "name": name, "uid": uid, "resourceVersion": "1",
        "creationTimestamp": T0, "labels": LABELS, "annotations": NOTES, **more,
    }  # fmt: skip


def a_job(end: str = "", *, suspend: bool = False, nodes: int = 1, **more: str) -> dict[str, Any]:
    conditions = [{"type": end, "status": "True", **more}] if end else []
    return {
        "metadata": meta("job", "job-uid"),
        "spec": {"suspend": suspend, "completions": nodes},
        "status": {"startTime": T0, "conditions": conditions},
    }


def a_pod(
    phase: str = "Running", *, uid: str = "pod-1", code: int | None = None, message: str = "",
    reason: str = "", waiting: dict[str, str] | None = None, disrupted: bool = False,
    rank: int = 0, created: str = T0, deleted: str = "", conditions: tuple[Any, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    if code is not None:
        state: dict[str, Any] = {
            "terminated": {
                "exitCode": code, "message": message, "reason": reason or "Error",
                "startedAt": T0, "finishedAt": T1,
            }
        }  # fmt: skip
    elif waiting is not None:
        state = {"waiting": waiting}
    else:
        state = {"running": {"startedAt": T1}} if phase == "Running" else {}
    owners = [{"kind": "Job", "uid": "job-uid", "controller": True}]
    extra = {"deletionTimestamp": deleted} if deleted else {}
    notes = NOTES | {"batch.kubernetes.io/job-completion-index": str(rank)}
    target = [{"type": "DisruptionTarget", "status": "True"}] if disrupted else []
    return {
        "metadata": meta(
            f"pod-{uid}", uid, ownerReferences=owners, **extra,
        ) | {"annotations": notes, "creationTimestamp": created},
        "spec": {"containers": [{"name": "trainer", "image": "registry/trainer:1"}]},
        "status": {
            "phase": phase, "podIP": "10.0.0.1", "conditions": [*target, *conditions],
            "containerStatuses": [{"name": "trainer", "state": state}],
        },
    }  # fmt: skip


def seen(
    job: dict[str, Any] | None, *pods: dict[str, Any], now: float = NOW, **options: Any
) -> Any:
    """The Attempt of a record with these objects."""
    parsed = [PodObject.of(pod) for pod in pods]
    assert all(pod is not None for pod in parsed)
    found = None if job is None else JobObject.of(job)
    origin = found.origin if found else parsed[0].origin  # type: ignore[union-attr]
    record = Record(origin=origin, uid="job-uid", job=found)
    record.pods = {pod.uid: pod for pod in parsed if pod is not None}
    record.complete_pods = options.pop("listed", False)
    return attempt_of(record, now, **options)


def test_where_a_live_attempt_is() -> None:
    """Queued, pending since the Job may run, running since its container does."""
    queued = seen(a_job(suspend=True))
    pending = seen(a_job())
    created = seen(a_job(), a_pod("Pending", waiting={"reason": "ContainerCreating"}))
    running = seen(a_job(), a_pod())

    assert (queued.phase, queued.since, queued.handle) == (Phase.QUEUED, None, "job-uid")
    assert (pending.phase, pending.since) == (Phase.PENDING, 1_700_000_000.0)
    assert (created.phase, created.trouble) == (Phase.PENDING, "")
    assert (running.phase, running.since) == (Phase.RUNNING, 1_700_000_100.0)
    assert (running.stage, running.number, running.digest) == ("train-code", 2, "d" * 32)


def test_between_the_pods_end_and_the_jobs_it_still_runs() -> None:
    """A row does not go back to Starting for the moment in which the Job's controller counts."""
    assert seen(a_job(), a_pod("Succeeded", code=0)).phase is Phase.RUNNING
    assert seen(a_job(), a_pod("Failed", code=1)).phase is Phase.RUNNING


def test_a_replaced_pod_is_a_preemption_and_one_clock_runs_on() -> None:
    """The Job made a second pod by itself: counted, and the time of the first is not forgotten."""
    first = a_pod("Failed", code=75, uid="a")
    waiting = seen(a_job(), first, a_pod("Pending", uid="b", created=T1))
    running = seen(a_job(), first, a_pod(uid="b", created=T1))

    assert (waiting.phase, waiting.replaced) == (Phase.PENDING, 1)
    assert (running.phase, running.replaced) == (Phase.RUNNING, 1)
    assert running.since == 1_700_000_100.0 - 100.0
    assert seen(a_job(), first).replaced == 0


RESULT = Result(token="t" * 16, metrics={"gain": 0.25}).line()


@pytest.mark.parametrize(
    ("job", "pod", "code", "left"),
    [
        (a_job("Complete"), a_pod("Succeeded", code=0, message=RESULT), 0, True),
        (a_job("Complete"), a_pod("Succeeded", code=0, message="not JSON"), 0, False),
        (a_job("Failed"), a_pod("Failed", code=1, message=RESULT), 1, True),
        (a_job("Failed"), a_pod("Failed", code=70), 70, False),
        (a_job("Failed"), a_pod("Failed", code=137, disrupted=True), Exit.PREEMPTED, False),
        (a_job("Failed"), a_pod("Failed", code=78, disrupted=True), Exit.CONFIGURATION, False),
        (a_job("Failed"), a_pod("Failed", disrupted=True), Exit.PREEMPTED, False),
        (a_job("Failed"), a_pod("Failed", code=137), 137, False),
        (a_job("Failed"), a_pod("Failed", code=137, deleted=T2), Exit.PREEMPTED, False),
        (a_job("Failed"), a_pod("Failed", code=1, deleted=T2), 1, False),
        (None, a_pod("Failed", code=75), Exit.PREEMPTED, False),
    ],
)
def test_how_an_attempt_ends(job: Any, pod: Any, code: int, left: bool) -> None:
    """Exit code and Result, by what Kubernetes says of the container."""
    found = seen(job, pod, listed=True)

    assert (found.phase, found.exit) == (Phase.ENDED, code)
    assert (found.result is not None) == left
    assert found.seconds == (100.0 if pod["status"]["containerStatuses"][0]["state"] else 0.0)


def test_a_finished_job_waits_for_its_pods_last_word() -> None:
    """Its watch may be ahead of the pods'; without any pod only a list tells that there is none."""
    early = seen(a_job("Complete"), a_pod())
    unknown = seen(a_job("Complete"))
    listed = seen(a_job("Complete"), listed=True)
    lost = seen(a_job("Failed"), listed=True)

    assert early.phase is Phase.RUNNING and unknown.phase is Phase.PENDING
    assert (listed.phase, listed.exit, listed.result) == (Phase.ENDED, Exit.OK, None)
    assert (lost.phase, lost.exit) == (Phase.ENDED, None)


def test_a_deleted_job_ends_with_its_pods() -> None:
    """The pods of a Job that is gone still write; with nothing left there is nothing to say."""
    ending = seen(None, a_pod(deleted="2023-11-14T22:30:00Z"))
    record = Record(origin=ending and JobObject.of(a_job()).origin, uid="job-uid")  # type: ignore[union-attr]

    assert (ending.phase, ending.stopping) == (Phase.RUNNING, True)
    assert attempt_of(record, NOW) is None


def test_of_several_nodes_the_gravest_exit_decides() -> None:
    """Unless a rule for preemption ended the Job: then the other ranks only lost that one."""
    ranks = (a_pod("Failed", code=75, uid="a"), a_pod("Failed", code=1, uid="b", rank=1))
    message = "Pod ns/x has condition DisruptionTarget matching FailJob rule at index 1"
    preempted = a_job("Failed", nodes=2, reason="PodFailurePolicy", message=message)
    wrong = a_job("Failed", nodes=2, reason="PodFailurePolicy", message="... rule at index 0")

    assert seen(a_job("Failed", nodes=2), *ranks).exit == 1
    assert seen(preempted, *ranks).exit == Exit.PREEMPTED
    assert seen(wrong, *ranks, a_pod("Failed", code=78, uid="c", rank=2)).exit == 78


def test_kubernetes_own_words_name_a_field() -> None:
    """OOMKilled has no Result of ours."""
    found = seen(a_job("Failed"), a_pod("Failed", code=137, reason="OOMKilled"))

    assert found.exit == 137
    assert found.result.problem.field == "spec.execution.train.resources.limits.memory"
    assert "OOMKilled" in found.result.problem.message


STORAGE = {"uri": "s3://b/p", "credentialsSecretRef": {"name": "keys"}}


@pytest.mark.parametrize(
    ("waiting", "trouble"),
    [
        (
            {"reason": "ErrImagePull", "message": "rpc error: not found"},
            "spec.execution.image: cannot pull registry/trainer:1",
        ),
        (
            {"reason": "ImagePullBackOff", "message": "Back-off pulling image"},
            "spec.execution.image: cannot pull registry/trainer:1",
        ),
        (
            {"reason": "CreateContainerConfigError", "message": 'secret "keys" not found'},
            "spec.storage.credentialsSecretRef.name: secret 'keys' not found",
        ),
        (
            {"reason": "CreateContainerConfigError", "message": 'secret "other" not found'},
            "spec.execution.train.env: secret 'other' not found",
        ),
        (
            {"reason": "RunContainerError", "message": "no such runtime"},
            "pod: RunContainerError: no such runtime",
        ),
    ],
)
def test_why_a_pod_does_not_begin(waiting: dict[str, str], trouble: str) -> None:
    """In terms of the manifest; obsolete once an edit would make another pod."""
    job, pod, spec = a_job(), a_pod("Pending", waiting=waiting), spec_of(storage=STORAGE)
    same = seen(job, pod, spec=spec, execution=lambda stage: "e")
    edited = seen(job, pod, spec=spec, execution=lambda stage: "f")

    assert (same.phase, same.trouble, same.obsolete) == (Phase.PENDING, trouble, False)
    assert edited.obsolete
    assert not seen(job, a_pod(), spec=spec, execution=lambda stage: "f").obsolete


def test_a_pod_that_finds_no_node_says_so() -> None:
    """The scheduler's reason is in a condition of the pod."""
    text = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    condition = {
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text,
    }  # fmt: skip
    found = seen(a_job(), a_pod("Pending", conditions=(condition,)))

    assert found.trouble == f"spec.execution.train: Unschedulable: {text}"


def test_a_pod_on_a_lost_node_is_given_up_a_minute_after_its_grace_period() -> None:
    """Nobody else would: the Job waits for the pod's end, and the node does not answer."""
    pod = a_pod(deleted=T2)
    end = 1_700_000_200.0

    assert not seen(a_job(), pod, now=end + STUCK_SECONDS - 1).obsolete
    late = seen(a_job(), pod, now=end + STUCK_SECONDS + 1)
    assert (late.phase, late.obsolete) == (Phase.PENDING, True)
    assert seen(None, pod, now=end + STUCK_SECONDS + 1).phase is Phase.ENDED
