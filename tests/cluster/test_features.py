"""The operator's behaviours on a cluster, and that each has a test beside this file.

The tests are in test_features_*.py, marked with the behaviours that they show: on the real control
plane, with pods that a hollow node plays. What needs a real node (the last lines of a log, a drain,
a lost node, a grace period that is too short) is in tests/e2e.
"""

import ast
from pathlib import Path

import pytest

BEHAVIOURS = {
    # Attempts
    "graph": "The method decides which stages there are; each is one row and, run once, one Job.",
    "order-of-writes": "Status with the intent, then creates, then events.",
    "one-post": "A Job is POSTed once and never patched; the operator writes nothing but statuses, "
    "Jobs, Services and events.",
    "job-name": "A Job's name is run, stage and 8 digits of what tells the attempt from any other.",
    "job-shape": "Labels, annotations, owner that blocks nothing, backoffLimit 0, TTL.",
    "task": "The Task in the environment is complete: image, listen, scratch, run, attempt.",
    "restricted-pod": "Pods meet the restricted standard: read-only root, no token, no rights.",
    "scratch": "Sized volumes for scratch and /dev/shm.",
    "adopt-intent": "An intent without a Job: the same one is made, under the same name.",
    "adopt-job": "A Job that status does not know yet is adopted, and its result taken.",
    "create-retried": "A create that is refused for now is said and repeated; nothing is counted.",
    "killed-while-running": "What ends while the operator is down is read afterwards.",
    "terminating-waits": "While an attempt's Job is terminating the next one waits.",
    "foreign-job": "A Job of the same name that is not ours is an error, never touched.",
    "job-deleted": "A Job deleted by hand: preempted or lost, next attempt, no failure.",
    "lost": "Uid recorded, object gone, no result: lost, counted apart.",
    "finished-jobs-deleted": "Finished Jobs may be deleted: results are in status.",
    "ttl": "Jobs that go by their TTL run nothing again.",
    "result-by-must-exist": "Complete without a Result: a CPU attempt reads it from the manifest.",
    "must-exist-missing": "There is none: exit 66, lost, and the stage runs.",
    "pod-force-deleted": "A pod is gone before its result is read: full metrics all the same.",
    # Ends
    "configuration-final": "78 fails the Job by its policy; never tried again by itself.",
    "disruption-replaced": "DisruptionTarget: replaced within the Job, a preemption, no failure.",
    "preempted-replaced": "75: replaced within the Job, a preemption, no failure.",
    "failure-retried": "1, 137, 70, 71: a failure, and another attempt.",
    "backoff": "The next attempt waits for policy.backoffSeconds.",
    "given-up": "After policy.maxRetries the stage is given up.",
    "corrupt-replaced": "65: the producer replaces that copy, then the reader goes on.",
    "active-deadline": "policy.activeDeadlineSeconds ends a stage that runs too long.",
    "pending-deadline": "policy.pendingDeadlineSeconds ends an attempt whose pod does not start.",
    "fail-run": "failurePolicy FailRun: one failed expert fails the run.",
    "give-up-stops-others": "The attempts of a run that failed are stopped.",
    "retry": "`btx retry` (annotation) forgives failures.",
    # Members
    "quorum": "failurePolicy Quorum: a failed expert counts as missing.",
    "too-few-experts": "The run fails once minExperts cannot be reached, and not before.",
    "expert-deadline": "policy.expertDeadlineSeconds leaves late experts out.",
    "members-frozen": "Members are decided once, before the mix starts, and told.",
    "members-again": "They are decided again when the policy that chose them changes.",
    "no-gain-dropped": "onNoGain Drop leaves out an expert that gained nothing.",
    "max-parallel": "maxParallelExperts limits train stages, in spec order.",
    # Runs among each other
    "single-flight": "One artifact is made once over all runs of a storage.",
    "waiting-for": "Who waits says for whom: WaitingFor=<run>/<stage>.",
    "take-over": "A waiter takes over from a suspended, queued, failed or deleted holder.",
    "single-flight-scope": "Other namespaces and storages share nothing.",
    "status-conflict": "Two operators cannot both act on one status.",
    # Edits
    "prune": "A Job that nothing asks for is deleted.",
    "dropped-expert": "An expert that an edit drops is stopped and forgotten.",
    "added-expert": "An expert that an edit adds is trained.",
    "changed-recipe": "An untrained expert's recipe may change: next attempt, other digest.",
    "edit-pending": "While an edit is looked at, attempts go on, nothing starts or is pruned.",
    "edit-accepted": "The accepted edit is worked to; status says which generation.",
    "same-digest-kept": "Rows of the same name and digest are kept.",
    "would-retrain": "A trained expert is not trained again without permission; the message says "
    "what to do.",
    "revert": "Reverting a refused edit is enough.",
    "allow-retrain": "policy.allowRetrain permits it.",
    "policy-at-once": "policy acts at once, without preflight.",
    "suspend": "Suspend deletes active Jobs; resume is the next attempt.",
    "suspend-uncounted": "Neither is counted as failure, preemption or loss.",
    "suspend-under-refusal": "Suspend acts at once under a refused spec.",
    "scheduling-next-attempt": "Edits of scheduling apply from the next attempt.",
    "immutable": "method, seed.uri and storage.uri stay as they were accepted.",
    "invalid-spec": "What the schema cannot refuse becomes Accepted=False with the field.",
    "refresh": "`btx refresh` (annotation) asks for one more preflight.",
    # Upgrades
    "upgrade-keeps-image": "A run keeps the image that it was accepted with.",
    "upgrade-new-run": "A new run gets the new image.",
    "image-too-old": "An image whose Task is too old: Accepted=False, ImageTooOld.",
    # Kueue
    "kueue-label": "With queueName a Job is created suspended, with Kueue's label.",
    "kueue-queued": "Suspended from outside is Queued.",
    "kueue-injects": "What is injected at admission is never undone.",
    "kueue-evicts": "Eviction: SIGTERM, 75, Queued, on again in the same Job; no failure.",
    "externally-suspended": "Without a queue's name: ExternallySuspended.",
    "deadlines-pause": "Deadlines pause while suspended from outside.",
    # Several nodes
    "multi-node": "An Indexed Job with torchrun's environment.",
    "headless-service": "A headless Service of the run, owned by it.",
    "rank-fails": "One rank fails: all stop, next attempt, one failure.",
    "rank-preempted": "One rank is evicted or exits 75: charged as a preemption.",
    # Pods
    "credentials-secret": "S3 credentials by Secret: envFrom.",
    "token-secret": "The token of Hugging Face by Secret: envFrom.",
    "ca-bundle": "A CA bundle by ConfigMap: mounted, its path in the Task.",
    "pull-secrets": "Image pull secrets of the settings.",
    "service-account": "Service accounts of the settings' list, the first by default.",
    "pod-fields": "The allowed fields reach the pod; an expert's block overlays its kind's.",
    "gpus": "GPUs are limits of the container.",
    "volumes": "emptyDir, persistentVolumeClaim and configMap volumes.",
    "least-power": "Nothing else: host paths, our labels, other accounts.",
    "refused-pod-fields": "What is not allowed is refused, naming the field.",
    "api-refuses": "What the API server refuses gives the stage up, naming the block.",
    # Bad input
    "message-names-field": "Messages of conditions and events name the field.",
    "image-pull": "An image that cannot be pulled is said within seconds.",
    "missing-secret": "So is a Secret that is not there.",
    "unschedulable": "So is a pod for which there is no node.",
    "problems-found": "What preflight finds becomes Accepted=False.",
    "preflight-again": "Preflight looks again by itself.",
    "correction-heals": "A correction heals the run without a new name.",
    # What people see
    "conditions": "Five conditions, always.",
    "status-rows": "One row per stage.",
    "status-size": "Status stays below 10 kB at 16 experts and 32 kB at 64.",
    "progress": "Progress of rank 0 by HTTP.",
    "eta": "And the time that is left.",
    "progress-rate": "Written at most once in settings.progressSeconds.",
    "dead-experts": "Dead experts are told once.",
    "no-kill-without-progress": "Nobody is killed because progress could not be read.",
    "metrics": "Names and labels of metrics.ENGINE.",
    # The process
    "liveness-alone": "Liveness does not depend on the API server.",
    "stuck-loop": "A loop that stands does not answer.",
    "readiness": "Ready once the cluster was listed.",
    "ends-on-sigterm": "SIGTERM ends it at once, with 0.",
    "run-deleted": "A deleted run's children go by garbage collection.",
    "no-finalizers": "Nothing of ours has a finalizer.",
    "namespace-deleted": "A namespace goes while the operator is down.",
}


def marks(path: Path) -> dict[str, set[str]]:
    """The behaviours of every test of a file, by the test's name."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            calls = [d for d in node.decorator_list if isinstance(d, ast.Call)]
            shows = [call for call in calls if ast.unparse(call.func) == "pytest.mark.shows"]
            found[node.name] = {ast.literal_eval(arg) for call in shows for arg in call.args}
    return found


def shown() -> dict[str, set[str]]:
    """Of all files."""
    files = sorted(Path(__file__).parent.glob("test_features_*.py"))
    return {f"{file.stem}.{name}": rows for file in files for name, rows in marks(file).items()}


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_every_behaviour_is_shown(behaviour: str) -> None:
    """By at least one test."""
    assert [name for name, rows in shown().items() if behaviour in rows]


def test_every_test_shows_a_behaviour() -> None:
    """Of the table, and is not skipped."""
    unknown = {name: rows - BEHAVIOURS.keys() for name, rows in shown().items()}
    files = sorted(Path(__file__).parent.glob("test_features_*.py"))

    assert {name: rows for name, rows in unknown.items() if rows} == {}
    assert [name for name, rows in shown().items() if not rows] == []
    assert [
        file.name for file in files if "skip" in file.read_text().replace("fmt: skip", "")
    ] == []
