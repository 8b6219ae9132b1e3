"""BTXRuns through the API server, as a user and the engine handle them."""

import json
import subprocess
from typing import Any

import pytest
from btx_api import names
from builders import a_spec
from cluster import binaries
from cluster.control_plane import Cluster
from kubernetes import client


def a_run(name: str = "x", **changes: Any) -> dict[str, Any]:
    """A BTXRun as a user writes it."""
    header = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}}
    return {**header, "spec": a_spec(**changes)}


class Runs:
    """BTXRuns of one namespace, through the API, unknown fields refused."""

    def __init__(self, api: client.ApiClient, namespace: str, group: str = names.GROUP) -> None:
        self._objects = client.CustomObjectsApi(api)
        self._where = (group, names.VERSION, namespace, names.PLURAL)

    def create(self, body: dict[str, Any], **options: Any) -> dict[str, Any]:
        """What is stored."""
        stored: dict[str, Any] = self._objects.create_namespaced_custom_object(
            *self._where, body, field_validation="Strict", **options
        )
        return stored

    def tried(self, body: dict[str, Any]) -> dict[str, Any]:
        """What would be stored."""
        return self.create(body, dry_run="All")

    def read(self, name: str = "x") -> dict[str, Any]:
        """As it is stored."""
        stored: dict[str, Any] = self._objects.get_namespaced_custom_object(*self._where, name)
        return stored

    def edit(self, changes: dict[str, Any], name: str = "x") -> dict[str, Any]:
        """Merges into the spec."""
        stored: dict[str, Any] = self._objects.patch_namespaced_custom_object(
            *self._where, name, {"spec": changes}, field_validation="Strict"
        )
        return stored

    def write_status(self, status: Any, name: str = "x") -> dict[str, Any]:
        """Replaces the status."""
        body = {**self.read(name), "status": status}
        stored: dict[str, Any] = self._objects.replace_namespaced_custom_object_status(
            *self._where, name, body, field_validation="Strict"
        )
        return stored


def kubectl(cluster: Cluster, *words: str, code: int = 0) -> str:
    """Output and errors of a kubectl command that ends with a code."""
    command = [binaries.kubectl(), "--kubeconfig", cluster.kubeconfig, *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def established(cluster: Cluster, api: client.ApiClient, name: str) -> None:
    """Until objects of a CRD can be made."""

    def done() -> bool:
        found = client.ApiextensionsV1Api(api).read_custom_resource_definition(name)
        truths = {c.type: c.status for c in found.status.conditions or ()}
        assert truths.get("NonStructuralSchema") != "True"
        return truths.get("Established") == "True"

    cluster.wait_for(name, done)


def refusal(call: Any, *arguments: Any) -> list[tuple[str, str]]:
    """(field, message) of each cause that something is refused for."""
    with pytest.raises(client.ApiException) as caught:
        call(*arguments)
    assert caught.value.status == 422, caught.value.body
    causes = json.loads(caught.value.body)["details"]["causes"]
    return [(cause["field"], cause["message"].partition(": ")[2]) for cause in causes]
