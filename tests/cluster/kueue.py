"""A real Kueue beside a test's control plane, when its binary and manifests are given.

`KUEUE_MANAGER` names the manager (`go build ./cmd/kueue` of a release), `KUEUE_MANIFESTS` a file or a
folder with its CRDs (`config/components/crd/bases`). Of the manifests only the CRDs are applied: the
manager is a process here, and its webhooks, which only default and check what users write, are left
out.
"""

import contextlib
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cluster.control_plane import Cluster
from cluster.runs import established
from kubernetes import client
from s3_server import free_ports

GROUP, VERSION = "kueue.x-k8s.io", "v1beta2"
GIVEN = ("KUEUE_MANAGER", "KUEUE_MANIFESTS")
FLAVOUR_LABELS = {"hollow.test/node": "true"}
IN_ITS_OWN_ETC = """
mount -t tmpfs tmpfs /etc && mkdir -p /etc/kueue/metrics && cp -r "$0" /etc/kueue/metrics/certs &&
exec "$@"
"""
"""The manager insists on a certificate for its metrics at this place. Mounting needs root."""
RESOURCES = ["cpu", "memory", "pods", "nvidia.com/gpu"]


def missing() -> str:
    """What the environment does not give, for a person; empty: it is all there."""
    return " and ".join(name for name in GIVEN if not os.environ.get(name))


@contextlib.contextmanager
def manager(cluster: Cluster) -> Iterator[None]:
    """Its CRDs, a flavour, and the process."""
    api, names = cluster.client(), []
    for body in _crds(Path(os.environ["KUEUE_MANIFESTS"])):
        # Without the webhook that converts between versions: one version is used.
        body["spec"].pop("conversion", None)
        client.ApiextensionsV1Api(api).create_custom_resource_definition(body)
        names.append(body["metadata"]["name"])
    for name in names:
        established(cluster, api, name)
    folder = cluster.folder / "kueue"
    folder.mkdir(exist_ok=True)
    certificate = cluster.authority.issue("kueue", user="kueue", hosts=["127.0.0.1"])
    for source, name in ((certificate, "tls.crt"), (certificate.with_suffix(".key"), "tls.key")):
        (folder / name).write_bytes(source.read_bytes())
    health, metrics, webhook = free_ports(3)
    settings = {
        "apiVersion": f"config.kueue.x-k8s.io/{VERSION}", "kind": "Configuration",
        "namespace": "default",
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        "metrics": {"bindAddress": f"127.0.0.1:{metrics}"},
        "webhook": {"host": "127.0.0.1", "port": webhook, "certDir": str(folder)},
        "leaderElection": {"leaderElect": False}, "internalCertManagement": {"enable": False},
        "manageJobsWithoutQueueName": False, "integrations": {"frameworks": ["batch/job"]},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    part = cluster.add(
        "kueue", "unshare", "--mount", "sh", "-c", IN_ITS_OWN_ETC, folder,
        os.environ["KUEUE_MANAGER"], f"--config={folder / 'config.yaml'}",
        "--feature-gates=VisibilityOnDemand=false", KUBECONFIG=str(cluster.kubeconfig),
    )  # fmt: skip
    try:
        cluster.wait_for("Kueue", lambda: _ready(health))
        labels = {"nodeLabels": FLAVOUR_LABELS}
        _create(cluster, "resourceflavors", "ResourceFlavor", "spot", labels)
        yield
    finally:
        part.stop()
        del cluster.parts["kueue"]


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _crds(place: Path) -> Iterator[dict[str, Any]]:
    files = sorted(place.glob("*.yaml")) if place.is_dir() else [place]
    for file in files:
        for body in yaml.safe_load_all(file.read_text()):
            if body and body["kind"] == "CustomResourceDefinition":
                yield body


def _create(cluster: Cluster, plural: str, kind: str, name: str, spec: dict[str, Any]) -> None:
    body = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": kind,
        "metadata": {"name": name},
        "spec": spec,
    }
    client.CustomObjectsApi(cluster.client()).create_cluster_custom_object(
        GROUP, VERSION, plural, body
    )


@dataclass(frozen=True)
class Queue:
    """A ClusterQueue with room for everything, and its LocalQueue `gpus` in a namespace."""

    cluster: Cluster
    namespace: str

    @property
    def name(self) -> str:
        """Of the ClusterQueue."""
        return f"queue-{self.namespace}"

    def create(self) -> None:
        """Both; nothing is admitted before `open`."""
        quotas = [{"name": name, "nominalQuota": "1000"} for name in RESOURCES]
        group = {
            "coveredResources": RESOURCES,
            "flavors": [{"name": "spot", "resources": quotas}],
        }
        spec = {"namespaceSelector": {}, "resourceGroups": [group], "stopPolicy": "Hold"}
        _create(self.cluster, "clusterqueues", "ClusterQueue", self.name, spec)
        body = {
            "apiVersion": f"{GROUP}/{VERSION}", "kind": "LocalQueue", "metadata": {"name": "gpus"},
            "spec": {"clusterQueue": self.name},
        }  # fmt: skip
        client.CustomObjectsApi(self.cluster.client()).create_namespaced_custom_object(
            GROUP, VERSION, self.namespace, "localqueues", body
        )

    def set(self, policy: str) -> None:
        """`None` admits, `HoldAndDrain` evicts what was admitted."""
        client.CustomObjectsApi(self.cluster.client()).patch_cluster_custom_object(
            GROUP, VERSION, "clusterqueues", self.name, {"spec": {"stopPolicy": policy}},
            _content_type="application/merge-patch+json",
        )  # fmt: skip
