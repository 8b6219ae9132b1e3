"""The chart on a real API server: what it installs, what it may, how it is upgraded and removed."""

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from btx_api.names import API_VERSION, GROUP, PLURAL, SETTINGS_ENV, VERSION
from btx_operator.cluster import check
from builders import a_spec
from chart.tools import CHART, EVERYTHING, one, render
from cluster import binaries, monitoring
from cluster.control_plane import Cluster
from kubernetes import client
from kubernetes.client import ApiException

CRD = f"{PLURAL}.{GROUP}"
RELEASE = "btx"
RIGHTS = [(where, verb) for where, verbs in check.RIGHTS.items() for verb in verbs]


class Admin:
    """helm and kubectl with the administrator's kubeconfig."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        self.api = cluster.client()
        self.extensions = client.ApiextensionsV1Api(self.api)
        self.runs = client.CustomObjectsApi(self.api)

    def helm(self, *words: str | Path, code: int = 0) -> str:
        """What it prints; fails unless it ends with this exit code."""
        done = subprocess.run(
            [binaries.helm(), *words, "--namespace", self.namespace],
            env=os.environ | {"KUBECONFIG": str(self.cluster.kubeconfig)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode != 0) == bool(code), done.stdout + done.stderr
        return done.stdout + done.stderr

    def dry_run(self, objects: list[dict[str, Any]]) -> str:
        """Server-side dry-run of a strict apply: every admission, nothing stored."""
        done = subprocess.run(
            [binaries.kubectl(), "--kubeconfig", self.cluster.kubeconfig, "apply", "--server-side",
             "--dry-run=server", "--validate=strict", "--filename=-"],
            input=yaml.safe_dump_all(objects), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def crd(self) -> dict[str, Any]:
        """The stored CRD as a mapping."""
        found = self.extensions.read_custom_resource_definition(CRD)
        return dict(self.api.sanitize_for_serialization(found))

    def create_run(self, name: str, **changes: Any) -> dict[str, Any]:
        """A stored run."""
        body = {
            "apiVersion": API_VERSION, "kind": "BTXRun", "metadata": {"name": name},
            "spec": a_spec(storage={"uri": "s3://bucket/prefix"}, **changes),
        }  # fmt: skip
        made: list[dict[str, Any]] = []

        def served() -> bool:
            make = self.runs.create_namespaced_custom_object
            try:
                made.append(
                    make(GROUP, VERSION, self.namespace, PLURAL, body, field_validation="Strict")
                )
            except ApiException as error:
                if error.status != HTTPStatus.NOT_FOUND:
                    raise
            return bool(made)

        # A moment after its CRD is there.
        self.cluster.wait_for("the kind", served, 30)
        return made[0]

    def run(self, name: str) -> dict[str, Any]:
        """The run as it is stored."""
        return dict(
            self.runs.get_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name)
        )


def values(**given: Any) -> list[str]:
    """As words of a command."""
    return [
        f"--set-json={key.replace('__', '.')}={json.dumps(value)}" for key, value in given.items()
    ]


@pytest.fixture
def admin(cluster: Cluster, namespace: str) -> Iterator[Admin]:
    """In a namespace of its own; no release and no CRD are left behind."""
    found = Admin(cluster, namespace)
    yield found
    for release in found.helm("list", "--short").split():
        found.helm("uninstall", release, "--wait")
    with contextlib.suppress(ApiException):
        found.extensions.delete_custom_resource_definition(CRD)
    cluster.wait_for("the end of the CRD", lambda: not crds(found))


def crds(admin: Admin) -> list[str]:
    """Names of the cluster's CRDs."""
    items = admin.extensions.list_custom_resource_definition().items
    return [item.metadata.name for item in items if item.metadata.name == CRD]


# What it installs.


def test_every_object_is_accepted(admin: Admin) -> None:
    """By strict validation and all admission of the real API server, the monitors by their CRDs."""
    paths = monitoring.crds()
    subprocess.run(
        [binaries.kubectl(), "--kubeconfig", admin.cluster.kubeconfig, "apply", "--server-side",
         *(f"--filename={path}" for path in paths)],
        check=True, capture_output=True,
    )  # fmt: skip
    account = {"metadata": {"name": "r-btx-operator"}}
    client.CoreV1Api(admin.api).create_namespaced_service_account(admin.namespace, account)
    kinds = {yaml.safe_load(path.read_text())["spec"]["names"]["kind"] for path in paths}
    for given in (EVERYTHING, EVERYTHING | {"namespaces": [admin.namespace]}):
        objects = copy.deepcopy(render(given))
        for item in objects:
            if item["metadata"].get("namespace") == "sys":
                item["metadata"]["namespace"] = admin.namespace
        admin.dry_run(objects)
        assert kinds <= {item["kind"] for item in objects}


def test_its_pods_keep_the_restricted_standard(admin: Admin) -> None:
    """Admitted where the namespace enforces it."""
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    client.CoreV1Api(admin.api).patch_namespace(admin.namespace, {"metadata": {"labels": label}})
    objects = render(EVERYTHING)
    template = one(objects, "Deployment")["spec"]["template"]
    for number, pod in enumerate((template, one(objects, "Pod"))):
        body = {
            "apiVersion": "v1", "kind": "Pod", "spec": {**pod["spec"], "serviceAccountName": "default"},
            "metadata": {"name": f"pod-{number}", "namespace": admin.namespace},
        }  # fmt: skip
        admin.dry_run([body])


# What it may.


def account_kubeconfig(admin: Admin, name: str) -> Path:
    """Of a service account, by a token of its own."""
    request = {"spec": {"expirationSeconds": 3600}}
    token = client.CoreV1Api(admin.api).create_namespaced_service_account_token(
        name, admin.namespace, request
    )
    config = yaml.safe_load(admin.cluster.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token.status.token}
    path = admin.cluster.folder / f"certificates/{admin.namespace}-{name}.kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def well() -> Iterator[str]:
    """A page that answers 200, as the operator's /readyz does."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/readyz"
        server.shutdown()


def checked(admin: Admin, kubeconfig: Path, url: str) -> tuple[int, list[str]]:
    """Exit code and lines of the test pod's program, run as it."""
    objects = yaml.safe_load_all(admin.helm("get", "manifest", RELEASE))
    pod = one([item for item in objects if item], "Deployment")["spec"]["template"]["spec"]
    settings = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    done = subprocess.run(
        [sys.executable, "-m", "btx_operator.cluster.check", url],
        env=os.environ | settings | {"KUBECONFIG": str(kubeconfig)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert SETTINGS_ENV in settings
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("where", ["namespaced", "cluster-wide"])
def test_the_operators_account_may_do_its_work(admin: Admin, well: str, where: str) -> None:
    """`helm test`'s program finds every right, and nothing beside them is allowed."""
    named = {"namespaces": [admin.namespace]} if where == "namespaced" else {}
    admin.helm("install", RELEASE, CHART, *values(**named))
    account = account_kubeconfig(admin, "btx-operator")

    assert checked(admin, account, well) == (
        0,
        ["rights: all that the operator needs", "operator: ready"],
    )

    review = client.AuthorizationV1Api(admin.api)
    user = f"system:serviceaccount:{admin.namespace}:btx-operator"

    def allowed(namespace: str, verb: str, group: str, resource: str) -> bool:
        attributes = {"namespace": namespace, "verb": verb, "group": group, "resource": resource}
        body = {"spec": {"user": user, "resourceAttributes": attributes}}
        return bool(review.create_subject_access_review(body).status.allowed)

    for resource in ("secrets", "configmaps", "serviceaccounts", "nodes", "namespaces"):
        assert not any(allowed(admin.namespace, verb, "", resource) for verb in ("get", "list"))
    for verb in ("update", "patch", "delete", "deletecollection"):
        assert not allowed(admin.namespace, verb, GROUP, PLURAL)
        assert not allowed(admin.namespace, verb, "", "pods")
    assert allowed("default", "list", "batch", "jobs") == (where == "cluster-wide")


def test_each_missing_right_is_named(admin: Admin, well: str) -> None:
    """The check fails, and says which verb on what; the others are not complained of."""
    admin.helm("install", RELEASE, CHART, *values(namespaces=[admin.namespace]))
    account = account_kubeconfig(admin, "btx-operator")
    rbac = client.RbacAuthorizationV1Api(admin.api)
    role = rbac.read_namespaced_role("btx-operator", admin.namespace)
    whole = admin.api.sanitize_for_serialization(role)["rules"]
    assert len(RIGHTS) == sum(len(rule["verbs"]) for rule in whole)
    for (_, resource), verb in RIGHTS:
        rules = copy.deepcopy(whole)
        (rule,) = (rule for rule in rules if rule["resources"] == [resource])
        rule["verbs"].remove(verb)
        body = [{"op": "replace", "path": "/rules", "value": [r for r in rules if r["verbs"]]}]
        rbac.patch_namespaced_role("btx-operator", admin.namespace, body)
        # The authorizer hears of a changed role a moment later.
        wanted = f"rights: must not {verb} {resource} in {admin.namespace}"
        until = time.monotonic() + 20
        while (found := complaints(admin, account, well)) != [wanted]:
            assert time.monotonic() < until, found


def complaints(admin: Admin, account: Path, url: str) -> list[str]:
    """What the check says of rights; it fails unless it is content."""
    code, lines = checked(admin, account, url)
    assert code == (lines[0] != "rights: all that the operator needs")
    return [line for line in lines if line.startswith("rights")]


def test_helm_test_runs_the_check_and_cleans_up(admin: Admin, hollow: str) -> None:
    """Its pod is made as the chart says, and goes when it was content (a played pod is)."""
    admin.helm("install", RELEASE, CHART, *values(namespaces=[admin.namespace]))
    before = everything(admin)
    said = admin.helm("test", RELEASE, "--timeout=2m")

    assert "Phase:          Succeeded" in said, said
    left = {name for name in everything(admin) - before if not name.startswith("Pod btx-operator-")}
    assert left == set()
    assert "Pod btx-operator-check" not in everything(admin)


# The CRD.


def older_chart(folder: Path) -> Path:
    """This chart as it was before `suspend` was a field."""
    chart = folder / "older"
    shutil.copytree(CHART, chart)
    path = chart / f"files/{CRD}.yaml"
    crd = yaml.safe_load(path.read_text())
    del schema_of(crd)["suspend"]
    path.write_text(yaml.safe_dump(crd, sort_keys=False))
    return chart


def schema_of(crd: dict[str, Any]) -> dict[str, Any]:
    """Fields of the spec."""
    root = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return dict_in_place(root["properties"])


def dict_in_place(value: Any) -> dict[str, Any]:
    """The very mapping, for mypy."""
    assert isinstance(value, dict)
    return value


def test_upgrade_and_rollback_bring_the_crd(admin: Admin, tmp_path: Path) -> None:
    """A new field is accepted after the upgrade, and dropped after the rollback; the run stays."""
    admin.helm("install", RELEASE, older_chart(tmp_path))
    uid = admin.create_run("early")["metadata"]["uid"]
    with pytest.raises(ApiException, match="unknown field"):
        admin.create_run("late", suspend=True)

    admin.helm("upgrade", RELEASE, CHART)
    admin.cluster.wait_for("the new schema", lambda: suspends(admin, "late"))
    assert admin.run("early")["metadata"]["uid"] == uid

    admin.helm("rollback", RELEASE, "1")
    assert "suspend" not in schema_of(admin.crd())
    assert admin.run("early")["metadata"]["uid"] == uid


def suspends(admin: Admin, name: str) -> bool:
    """Whether a run with the new field can be made."""
    try:
        return bool(admin.create_run(name, suspend=True)["spec"]["suspend"])
    except ApiException as error:
        assert "unknown field" in error.body
        return False


def test_uninstalling_keeps_the_crd_and_the_runs(admin: Admin) -> None:
    """And nothing else; the same release takes them back."""
    before = everything(admin)
    admin.helm("install", RELEASE, CHART, *values(metrics__dashboards__enabled=True))
    uid = admin.create_run("kept")["metadata"]["uid"]
    assert everything(admin) > before

    admin.helm("uninstall", RELEASE, "--wait")
    assert everything(admin) == before | {f"CustomResourceDefinition {CRD}"}
    assert admin.run("kept")["metadata"]["uid"] == uid

    admin.helm("install", RELEASE, CHART)
    assert admin.run("kept")["metadata"]["uid"] == uid


def test_another_release_takes_the_crd_when_told(admin: Admin) -> None:
    """Without --take-ownership it is refused; with crds.install=false it needs none."""
    admin.helm("install", RELEASE, CHART)
    admin.helm("uninstall", RELEASE, "--wait")

    refused = admin.helm("install", "other", CHART, code=1)
    assert "invalid ownership metadata" in refused
    admin.helm("install", "other", CHART, "--take-ownership")
    assert admin.crd()["metadata"]["annotations"]["meta.helm.sh/release-name"] == "other"
    admin.helm(
        "install", "third", CHART, *values(crds__install=False, namespaces=[admin.namespace])
    )


def everything(admin: Admin) -> set[str]:
    """`Kind name` of all that a release could leave in its namespace or in the cluster."""
    rbac, core = client.RbacAuthorizationV1Api(admin.api), client.CoreV1Api(admin.api)
    apps, nets = client.AppsV1Api(admin.api), client.NetworkingV1Api(admin.api)
    lists = {
        "ClusterRole": rbac.list_cluster_role(), "Secret": core.list_namespaced_secret(admin.namespace),
        "ClusterRoleBinding": rbac.list_cluster_role_binding(),
        "Role": rbac.list_role_for_all_namespaces(),
        "RoleBinding": rbac.list_role_binding_for_all_namespaces(),
        "ServiceAccount": core.list_namespaced_service_account(admin.namespace),
        "ConfigMap": core.list_namespaced_config_map(admin.namespace),
        "Service": core.list_namespaced_service(admin.namespace),
        "Pod": core.list_namespaced_pod(admin.namespace),
        "Deployment": apps.list_namespaced_deployment(admin.namespace),
        "ReplicaSet": apps.list_namespaced_replica_set(admin.namespace),
        "NetworkPolicy": nets.list_namespaced_network_policy(admin.namespace),
    }  # fmt: skip
    found = {f"{kind} {item.metadata.name}" for kind, some in lists.items() for item in some.items}
    return found | {f"CustomResourceDefinition {name}" for name in crds(admin)}
