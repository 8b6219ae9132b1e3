"""A Job and its pods -> Attempt: where it is, how it ended, what it left; pure.

A Job has ended when it is Complete or Failed, and its pods have been seen to end (or are known to
be gone). Called by backend.py.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from btx_api.spec import BTXRunSpec
from btx_api.stage import GRAVITY, Exit, Problem, Progress, Result
from pydantic import ValidationError

from btx_operator.cluster.jobs import block_path
from btx_operator.cluster.objects import PodObject, Record
from btx_operator.observed import Attempt, Phase
from btx_operator.processes import dead_experts

STUCK_SECONDS = 60
"""After the end of its grace period: a pod that is not gone by then is on a node that is."""
PULLS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
HELD = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "Unschedulable")
KILLED, OOM = (137, 143), "OOMKilled"
"""Exit codes after SIGKILL and SIGTERM; Kubernetes' word for a kill that has another cause."""
PREEMPTION_RULES = (1, 2)
"""Of the podFailurePolicy in jobs.py: all but the first, which is for configuration."""


def attempt_of(
    record: Record, now: float, *, progress: Progress | None = None, spec: BTXRunSpec | None = None,
    execution: Callable[[str], str] = lambda stage: "",
) -> Attempt | None:  # fmt: skip
    """None: neither Job nor pod is left, nor anything that they said.

    `execution`: stage -> hash of image and scheduling that an attempt would get now.
    """
    job, origin = record.job, record.origin
    pods = sorted(record.pods.values(), key=lambda pod: (pod.created, pod.uid))
    live = [pod for pod in pods if not pod.ended and not stuck(pod, now)]
    if job is None and not pods:
        return None
    seen = Attempt(
        stage=origin.stage, number=origin.number, digest=origin.digest, handle=record.uid,
        phase=Phase.PENDING, stopping=job is None or job.deleting or record.stopping,
        replaced=sum(map(preempted, _replaced(pods))),
        obsolete=any(stuck(pod, now) for pod in pods),
    )  # fmt: skip
    since: float | None
    if (job is None and not live) or (job is not None and job.finished and settled(record, now)):
        code, result = ending(record, pods)
        total: float = sum(map(seconds, (pod for pod in pods if pod.rank == 0)))
        return replace(seen, phase=Phase.ENDED, exit=code, result=result, seconds=total)
    if job is not None and job.suspended and not seen.stopping:
        return replace(seen, phase=Phase.QUEUED)
    first = next((pod for pod in reversed(pods) if pod.rank == 0), None)
    # Between the end of its last pod and the Job's own an attempt does not go back to the start.
    if first is not None and (stuck(first, now) or preempted(first)):
        first = None
    if first is not None and first.started is not None:
        # One clock over all pods of the attempt.
        before: float = sum(seconds(pod) for pod in pods if pod.rank == 0 and pod is not first)
        since = first.started - before
        dead = dead_experts(progress)
        return replace(seen, phase=Phase.RUNNING, since=since, dead_experts=dead)
    trouble = next((text for pod in live if (text := trouble_of(pod, spec))), "")
    edited = bool(trouble) and job is not None and job.execution != execution(origin.stage)
    # Not since it was created: it may have been suspended for long, and released just now.
    since = None if job is None else job.started
    return replace(seen, since=since, trouble=trouble, obsolete=seen.obsolete or edited)


def settled(record: Record, now: float) -> bool:
    """Whether all that the pods of an ended Job had to say is known."""
    if any(not pod.ended and not stuck(pod, now) for pod in record.pods.values()):
        return False
    return record.complete_pods or any(pod.exit is not None for pod in record.pods.values())


def stuck(pod: PodObject, now: float) -> bool:
    """Its node does not answer: it should have been gone for long."""
    return not pod.ended and pod.deleted is not None and now > pod.deleted + STUCK_SECONDS


def preempted(pod: PodObject) -> bool:
    """It ended because its place was wanted, after a checkpoint or not."""
    return pod.ended and pod.exit != Exit.OK and (pod.disrupted or pod.exit == Exit.PREEMPTED)


def _replaced(pods: list[PodObject]) -> list[PodObject]:
    """Those that have a successor."""
    latest = {pod.rank: pod for pod in pods}
    return [pod for pod in pods if latest[pod.rank] is not pod]


def seconds(pod: PodObject) -> float:
    """Running time of an ended pod."""
    if pod.started is None or pod.finished is None:
        return 0.0
    return max(0.0, pod.finished - pod.started)


def ending(record: Record, pods: list[PodObject]) -> tuple[int | None, Result | None]:
    """Exit code and Result of an attempt that is over."""
    job, ended = record.job, [pod for pod in pods if pod.exit is not None]
    if job is not None and job.finished == "Complete":
        done = [pod for pod in ended if pod.exit == Exit.OK and pod.rank == 0]
        return Exit.OK, result_of(done[-1]) if done else None
    if not ended:
        # Nothing ran (an admission webhook, the node's own refusal), or nobody saw it end.
        return (Exit.PREEMPTED, None) if any(pod.disrupted for pod in pods) else (None, None)
    if job is not None and _rule(job.message) in PREEMPTION_RULES:
        return Exit.PREEMPTED, None
    last = _gravest(ended)
    code = _code(last)
    return code, result_of(last) or (None if code == Exit.PREEMPTED else said(last))


def _gravest(pods: Iterable[PodObject]) -> PodObject:
    """The latest of each node; of these the one whose exit code decides (stage.GRAVITY)."""
    latest = {pod.rank: pod for pod in pods}
    order = {code: place for place, code in enumerate(GRAVITY)}
    return min(
        latest.values(), key=lambda pod: (order.get(_code(pod), order[Exit.FAILED]), pod.rank)  # type: ignore[call-overload]  # any integer
    )  # fmt: skip


def _code(pod: PodObject) -> int | None:
    """The exit code as it counts: who was killed because he had to go did not fail."""
    if pod.disrupted and pod.exit not in (Exit.OK, Exit.CONFIGURATION):
        return Exit.PREEMPTED
    killed = pod.exit in KILLED and pod.reason != OOM
    return Exit.PREEMPTED if killed and pod.deleted is not None else pod.exit


def _rule(message: str) -> int | None:
    """Which rule of the podFailurePolicy ended a Job, by the controller's message."""
    found = re.search(r"matching FailJob rule at index (\d+)", message)
    return int(found[1]) if found else None


def result_of(pod: PodObject) -> Result | None:
    """The termination message, if it is a Result."""
    try:
        return Result.model_validate_json(pod.message)
    except ValidationError:
        return None


def said(pod: PodObject) -> Result | None:
    """Kubernetes' own words on a container that left none of ours."""
    if pod.reason == OOM:
        field = f"{block_path(pod.origin.stage)}.resources.limits.memory"
        return Result(problem=Problem(field=field, message=f"{OOM}: it needed more memory"))
    if pod.reason in ("", "Error", "Completed"):
        return None
    return Result(problem=Problem(field="pod", message=f"{pod.reason} {pod.message}".strip()))


def trouble_of(pod: PodObject, spec: BTXRunSpec | None) -> str:
    """Why a pod does not begin, with the field that a user would mend; empty: nothing is wrong."""
    if pod.started is not None:
        return ""
    if pod.reason in PULLS:
        # The kubelet changes between two reasons and several texts for one fact.
        return f"spec.execution.image: cannot pull {pod.image}"
    if pod.reason not in HELD:
        return ""
    found = re.search(r'(secret|configmap) "([^"]+)" not found', pod.message)
    if found is None:
        where = block_path(pod.origin.stage) if pod.reason == "Unschedulable" else "pod"
        return f"{where}: {pod.reason}: {pod.message}"[:200]
    return f"{_named(spec, found[2], pod.origin.stage)}: {found[1]} {found[2]!r} not found"


def _named(spec: BTXRunSpec | None, name: str, stage: str) -> str:
    """The field that names a Secret."""
    if spec is not None:
        keys, token = spec.storage.credentials_secret_ref, spec.seed.token_secret_ref
        if keys is not None and keys.name == name:
            return "spec.storage.credentialsSecretRef.name"
        if token is not None and token.name == name:
            return "spec.seed.tokenSecretRef.name"
    return f"{block_path(stage)}.env"
