"""The real node: pods run in the real kubelet, find each other by name, and end. Needs root."""

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from cluster.conftest import BUILD
from cluster.control_plane import Cluster
from cluster.node import PROBE, real_cluster
from cluster.test_control_plane import ended, gone, last, until
from kubernetes import client


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A control plane and a real node in a network namespace, in place of the hollow one."""
    assert os.geteuid() == 0, "the node needs root; without it: --ignore tests/cluster/test_node.py"
    with real_cluster(BUILD / "node") as started:
        yield started


@pytest.fixture
def restricted(api: client.ApiClient, namespace: str) -> str:
    """A namespace under the restricted Pod Security Standard."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    client.CoreV1Api(api).patch_namespace(namespace, {"metadata": {"labels": labels}})
    return namespace


def probe(*words: str) -> dict[str, Any]:
    """A pod's spec: the probe as a restricted, read-only container."""
    security = {
        "runAsNonRoot": True, "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    resources = {"limits": {"cpu": "500m", "memory": "64Mi"}}
    container = {
        "name": "main", "image": PROBE, "imagePullPolicy": "Never", "args": list(words),
        "securityContext": security, "resources": resources,
    }  # fmt: skip
    return {"restartPolicy": "Never", "terminationGracePeriodSeconds": 5, "containers": [container]}


def serve(core: client.CoreV1Api, namespace: str) -> client.V1Pod:
    """A running pod `server` that answers 'hello' behind the Service `web`."""
    core.create_namespaced_service(
        namespace,
        {
            "metadata": {"name": "web"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
        },
    )
    meta = {"name": "server", "labels": {"app": "web"}}
    core.create_namespaced_pod(
        namespace, {"metadata": meta, "spec": probe("serve", ":8080", "hello")}
    )
    return until(core.list_namespaced_pod, namespace, lambda pod: pod.status.phase == "Running")


def test_a_node_leaves_nothing_behind() -> None:
    """Processes, mounts, namespaces, interfaces, cgroups: after the end as before the start.

    First in this file: there is one node on a machine at a time.
    """

    def traces() -> list[str]:
        commands = (
            ["ip", "-o", "-br", "link"], ["ip", "netns"], ["ip", "route"], ["mount"],
            ["find", "/sys/fs/cgroup", "-maxdepth", "2", "-name", "kubepods"],
            ["pgrep", "-af", str(BUILD / "brief")],
        )  # fmt: skip
        return [
            subprocess.run(c, capture_output=True, text=True, check=False).stdout for c in commands
        ]

    before = traces()
    with real_cluster(BUILD / "brief") as cluster:
        core = client.CoreV1Api(cluster.client())
        body = {"metadata": {"name": "pod"}, "spec": probe("pause")}
        core.create_namespaced_pod("default", body)
        until(core.list_namespaced_pod, "default", lambda pod: pod.status.phase == "Running")

    assert traces() == before


def test_a_job_reaches_another_pod_by_the_name_of_its_service(
    api: client.ApiClient, restricted: str
) -> None:
    """DNS, kube-proxy, CNI, restricted pods, the Job controller and logs, all real."""
    core, batch = client.CoreV1Api(api), client.BatchV1Api(api)
    serve(core, restricted)
    name = f"web.{restricted}.svc.cluster.local"
    template = {"spec": probe("get", name, f"http://web.{restricted}/")}
    body = {"metadata": {"name": "job"}, "spec": {"backoffLimit": 0, "template": template}}
    batch.create_namespaced_job(restricted, body)

    done = until(batch.list_namespaced_job, restricted, ended)
    [pod] = core.list_namespaced_pod(restricted, label_selector="job-name=job").items
    log = core.read_namespaced_pod_log(pod.metadata.name, restricted)
    address = core.read_namespaced_service("web", restricted).spec.cluster_ip
    assert last(done)[0] == "Complete", log
    assert log.split() == [f"[{address}]", "hello"]


def test_an_evicted_pod_gets_its_signal_and_goes(
    api: client.ApiClient, cluster: Cluster, restricted: str
) -> None:
    """The eviction API: DisruptionTarget, SIGTERM within the grace period, exit code 143."""
    core = client.CoreV1Api(api)
    began = serve(core, restricted)
    eviction = {"metadata": {"name": "server", "namespace": restricted}}
    core.create_namespaced_pod_eviction("server", restricted, eviction)

    pods = core.list_namespaced_pod
    pod = until(pods, restricted, lambda pod: pod.status.phase == "Failed", began)
    gone(pods, restricted)
    assert pod.status.container_statuses[0].state.terminated.exit_code == 143
    assert "DisruptionTarget" in [c.type for c in pod.status.conditions]
