"""The operator as a process beside a test's control plane, under a service account of its own."""

import contextlib
import json
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from btx_api.names import SETTINGS_ENV
from btx_operator.cluster import check
from cluster.control_plane import Cluster
from kubernetes import client
from s3_server import free_ports

RULES = [
    {"apiGroups": [group], "resources": [resource], "verbs": list(verbs)}
    for (group, resource), verbs in check.RIGHTS.items()
]
"""What the chart's role grants (tests/chart/test_render.py compares them)."""
USER = "btx-operator"


def grant(cluster: Cluster, rules: list[dict[str, list[str]]] = RULES) -> Path:
    """A kubeconfig for a user with these rights and no other."""
    rbac = client.RbacAuthorizationV1Api(cluster.client())
    with contextlib.suppress(client.ApiException):
        rbac.delete_cluster_role(USER)
    rbac.create_cluster_role({"metadata": {"name": USER}, "rules": rules})
    with contextlib.suppress(client.ApiException):
        rbac.create_cluster_role_binding(
            {
                "metadata": {"name": USER},
                "roleRef": {
                    "kind": "ClusterRole",
                    "name": USER,
                    "apiGroup": "rbac.authorization.k8s.io",
                },
                "subjects": [
                    {"kind": "User", "name": USER, "apiGroup": "rbac.authorization.k8s.io"}
                ],
            }
        )
    path = cluster.folder / f"certificates/{USER}.kubeconfig"
    return path if path.exists() else cluster.authority.kubeconfig(USER, cluster.address, user=USER)


class Operator:
    """One operator process; started again with the same settings."""

    module = "btx_operator.cluster"
    environment: Mapping[str, str] = {}

    def __init__(
        self, cluster: Cluster, kubeconfig: Path, *, name: str = "operator", **settings: Any
    ) -> None:
        self.cluster, self.name = cluster, name
        (self.port,) = free_ports(1)
        self.settings = {
            "trainerImage": "trainer:test", "port": self.port, "logJson": False, "workers": 8,
            "resyncSeconds": 60, "progressSeconds": 2, "logLevel": "INFO", **settings,
        }  # fmt: skip
        self.kubeconfig = kubeconfig

    def start(self) -> None:
        """Starts it; does not wait."""
        if self.name in self.cluster.parts:
            self.cluster.parts[self.name].start()
            return
        self.cluster.add(
            self.name, sys.executable, "-m", self.module, KUBECONFIG=str(self.kubeconfig),
            **{SETTINGS_ENV: json.dumps(self.settings)}, **self.environment,
        )  # fmt: skip

    def stop(self, *, kill: bool = False) -> None:
        """SIGTERM, or SIGKILL."""
        self.cluster.parts[self.name].stop(kill=kill)

    def wait_ready(self, seconds: float = 60) -> None:
        """Until it has listed the cluster."""
        self.cluster.wait_for("the operator", lambda: self.get("/readyz")[0] == 200, seconds)

    def get(self, path: str) -> tuple[int, str]:
        """Status (0: no answer) and text."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def log(self) -> str:
        """All that it printed."""
        return self.cluster.parts[self.name].log.read_text(errors="replace")


@contextlib.contextmanager
def operator(cluster: Cluster, **settings: Any) -> Iterator[Operator]:
    """An operator of the whole cluster, ready; stopped at the end."""
    started = Operator(cluster, grant(cluster), **settings)
    started.start()
    try:
        started.wait_ready()
        yield started
    finally:
        started.stop()
        del cluster.parts[started.name]
