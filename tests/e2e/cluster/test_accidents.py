"""What happens to pods of a real node, with the real trainer: condition, event, attempts of each.

The inputs are prepared once; every test has a namespace and a run of its own, in which one expert is
trained on another random seed.
"""

import json
import os
import signal
import time

from cluster.cases import INDEX, LONG, TRAIN, Case, counts, processes, row
from cluster.hollow_node import hollow_node
from cluster.installation import RELEASE, SECRET, SYSTEM, Installation, condition
from kubernetes import client
from workspace import Workspace


def test_an_evicted_pod_goes_on_within_its_attempt(long_case: Case) -> None:
    """The API's eviction, as a drain or an autoscaler asks for it: a checkpoint, a new pod."""
    case = long_case
    case.apply()
    pod = case.training()
    core = client.CoreV1Api(case.installed.node.cluster.client())
    name = pod["metadata"]["name"]
    body = {"metadata": {"name": name, "namespace": case.namespace}}
    core.create_namespaced_pod_eviction(name, case.namespace, body)
    found = case.trained()

    assert counts(found) == ("Complete", 1, 0, 1, 0)
    assert len(case.jobs(TRAIN)) == 1
    assert case.events("AttemptPreempted") == [f"{TRAIN}: attempt 1: preempted"]
    assert resumed(case) >= 8


def resumed(case: Case) -> int:
    """The step of the checkpoint from which the expert's last pod of rank 0 began."""
    first = [p for p in case.pods(TRAIN) if p["metadata"]["labels"].get(INDEX, "0") == "0"]
    states = first[-1]["status"]["containerStatuses"][0]["state"]
    return int(json.loads(states["terminated"]["message"]).get("resumedStep", 0))


def last_pod(case: Case) -> str:
    """Name of the newest pod of the expert."""
    return str(case.pods(TRAIN)[-1]["metadata"]["name"])


def test_a_drained_node(long_case: Case) -> None:
    """Operator and trainer are evicted alike; both come back with the node, nothing ran twice."""
    case = long_case
    case.apply()
    case.training()
    node = case.installed.node.name
    case.installed.kubectl(
        "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=120s"
    )
    case.installed.kubectl("uncordon", node)
    found = case.trained()

    assert (found["state"], found["attempt"], found.get("failures", 0)) == ("Complete", 1, 0)
    assert len(case.jobs(TRAIN)) == 1


def test_a_node_that_does_not_answer(long_case: Case) -> None:
    """Its pods are tainted away, cannot be killed, and go on when the node is back."""
    case, cluster = long_case, long_case.installed.node.cluster
    case.spec["execution"]["train"]["tolerations"] = [
        {"key": f"node.kubernetes.io/{key}", "operator": "Exists", "effect": "NoExecute",
         "tolerationSeconds": 2}
        for key in ("not-ready", "unreachable")
    ]  # fmt: skip
    case.spec["execution"]["train"]["terminationGracePeriodSeconds"] = 60
    # It trains on alone while nobody can reach it, and is not to be done before its node is back.
    case.spec["experts"][0]["tokens"] *= 2
    case.apply()
    case.training()
    core = client.CoreV1Api(cluster.client())
    # Where every node is silent Kubernetes may take itself for cut off, and evicts nothing.
    with hollow_node(cluster) as another:
        core.patch_node(another, {"spec": {"unschedulable": True}})
        cluster.stop("kubelet")
        try:
            deadline = time.monotonic() + 180
            while not any(p["metadata"].get("deletionTimestamp") for p in case.pods(TRAIN)):
                assert time.monotonic() < deadline, case.kubectl("get", "pods", "-o", "wide")
                time.sleep(1)
        finally:
            cluster.start("kubelet")
    core.delete_node(another)
    found = case.trained()

    assert (found["state"], found["attempt"], found.get("failures", 0)) == ("Complete", 1, 0)
    assert found["preemptions"] == 1


def test_out_of_memory(case: Case) -> None:
    """A failure with a name, the field to mend, and as many attempts as the policy allows."""
    case.spec["execution"]["train"]["resources"] = {"limits": {"memory": "96Mi"}}
    case.apply()
    found = case.trained()
    item = case.until(lambda i: condition(i, "Succeeded").get("status") == "False")

    assert counts(found) == ("Failed", 2, 2, 0, 0)
    assert found["exit"] == 137 and "OOMKilled" in found["message"]
    assert condition(item, "Succeeded")["reason"] == "ExpertFailed"
    failed = case.events("AttemptFailed")
    assert len(failed) == 2
    assert all("spec.execution.train.resources.limits.memory" in text for text in failed)


def test_a_wrong_image(case: Case) -> None:
    """Said within a minute with its field; the right one heals the run under its name."""
    case.spec["execution"]["image"] = "localhost/none:1"
    begun = time.monotonic()
    case.apply()
    item = case.until(
        lambda i: "spec.execution.image" in condition(i, "Accepted").get("message", "")
    )
    print(f"told after {time.monotonic() - begun:.0f} s")
    assert condition(item, "Accepted")["status"] == "Unknown"
    assert condition(item, "Running")["reason"] == "Blocked"
    assert time.monotonic() - begun < 3 * 60
    del case.spec["execution"]["image"]
    case.apply()
    found = case.trained()

    assert counts(found) == ("Complete", 1, 0, 0, 0)
    assert any("spec.execution.image" in text for text in case.events("AttemptBlocked"))


def test_a_missing_secret(case: Case) -> None:
    """Said within a minute with its field; making it heals the run, without a word to the run."""
    case.spec["storage"]["credentialsSecretRef"] = {"name": "later"}
    begun = time.monotonic()
    case.apply()
    field = "spec.storage.credentialsSecretRef.name"
    case.until(lambda i: field in condition(i, "Accepted").get("message", ""))
    print(f"told after {time.monotonic() - begun:.0f} s")
    assert time.monotonic() - begun < 3 * 60
    data = json.loads(case.kubectl("get", "secret", SECRET, "-o", "json"))["data"]
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "later"}, "data": data}
    case.installed.apply(case.namespace, secret)
    item = case.until(lambda i: condition(i, "Accepted").get("status") == "True", 300)

    assert item["status"]["preflight"]["attempt"] == 1


def test_a_grace_period_that_is_too_short(long_case: Case) -> None:
    """Killed before its checkpoint: preempted all the same, and resumed from the one before."""
    case = long_case
    case.spec["execution"]["train"]["terminationGracePeriodSeconds"] = 5
    case.apply()
    pod = case.training(step=24)
    for process in processes(pod):
        os.kill(process, signal.SIGSTOP)  # as a checkpoint that takes too long
    core = client.CoreV1Api(case.installed.node.cluster.client())
    name = pod["metadata"]["name"]
    body = {"metadata": {"name": name, "namespace": case.namespace}}
    core.create_namespaced_pod_eviction(name, case.namespace, body)
    found = case.trained()

    assert counts(found) == ("Complete", 1, 0, 1, 0)
    assert resumed(case) > 0


def test_a_termination_message_that_is_too_long(long_case: Case) -> None:
    """Whatever was written there before: the Result is read, or found again in storage."""
    case = long_case
    case.apply()
    pod = case.training(step=1)
    fill = "open('/dev/termination-log', 'w').write('x' * 8192)"
    where = (f"--namespace={case.namespace}", pod["metadata"]["name"])
    case.installed.kubectl("exec", *where, "--", "python", "-c", fill)
    found = case.trained()

    assert found["state"] == "Complete" and found.get("failures", 0) == 0
    assert "gain" in found and found["token"]


def test_a_pod_that_somebody_deleted(long_case: Case) -> None:
    """Politely: its checkpoint is written and the Job makes another. By force: the next attempt.

    By force it is told of as preempted, or as lost if nobody saw how it ended.
    """
    case = long_case
    case.apply()
    pod = case.training()
    case.kubectl("delete", "pod", pod["metadata"]["name"])
    case.until(lambda i: row(i).get("preemptions") == 1)
    case.training()
    case.kubectl("delete", "pod", last_pod(case), "--force", "--grace-period=0")
    found = case.trained()

    # Seen to end by SIGTERM, its Job makes another pod; not seen, the Job has failed.
    lost = found.get("lost", 0)
    assert (found["state"], found["attempt"]) == ("Complete", 1 + lost)
    assert (found["preemptions"] + lost, found.get("failures", 0)) == (2, 0)
    told = case.events("AttemptLost") + case.events("AttemptPreempted")
    assert len(told) == 2


def test_an_upgrade_between_train_and_mix(case: Case) -> None:
    """Another operator takes over a run whose experts are trained: none is trained again."""
    case.apply()
    case.trained()
    case.installed.install(case.installed.images, podAnnotations={"upgrade": case.namespace})
    item = case.installed.ended(case.namespace, "case")

    assert condition(item, "Succeeded")["status"] == "True", case.installed.story(case.namespace)
    attempts = {r["name"]: r.get("attempt", 0) for r in item["status"]["stages"]}
    assert {name: n for name, n in attempts.items() if n > 1} == {}
    assert len(case.jobs(TRAIN)) == 1


def test_a_release_that_goes_while_an_expert_trains(
    installed: Installation, inputs: Workspace
) -> None:
    """Upgraded, uninstalled, installed again: the expert trains on in its pod, and the run ends."""
    case = Case(installed, tokens=2 * LONG)
    case.apply()
    pod = case.training()["metadata"]["uid"]
    installed.install(installed.images, podAnnotations={"upgrade": case.namespace})
    installed.helm("uninstall", RELEASE, f"--namespace={SYSTEM}", "--wait")
    try:
        found = json.loads(case.kubectl("get", "btx", "case", "-o", "json"))
        assert row(found)["state"] == "Running"
        assert [p["metadata"]["uid"] for p in case.pods(TRAIN)] == [pod]
    finally:
        installed.install(installed.images)
    item = installed.ended(case.namespace, "case")

    assert condition(item, "Succeeded")["status"] == "True", installed.story(case.namespace)
    assert counts(row(item)) == ("Complete", 1, 0, 0, 0)
    assert [p["metadata"]["uid"] for p in case.pods(TRAIN)] == [pod]
    installed.kubectl("delete", "namespace", case.namespace, "--wait=false")


def test_an_expert_on_two_nodes_loses_one_rank(long_case: Case) -> None:
    """One rank is killed: both stop, both begin again, and the run goes on from a checkpoint."""
    case = long_case
    case.spec["execution"]["train"] |= {"nodes": 2}
    case.apply()
    case.training()
    pods = case.pods(TRAIN)
    assert len(pods) == 2
    second = next(p for p in pods if p["metadata"]["labels"][INDEX] == "1")
    os.kill(processes(second)[0], signal.SIGKILL)
    found = case.trained()

    assert (found["state"], found["attempt"], found.get("failures", 0)) == ("Complete", 2, 1)
    # The Job of the first attempt took its other rank with it.
    done = [pod for pod in case.pods(TRAIN) if pod["status"]["phase"] == "Succeeded"]
    assert len(done) == 2 and len(case.jobs(TRAIN)) == 2
    assert resumed(case) > 0
    assert len(case.events("AttemptFailed")) == 1
