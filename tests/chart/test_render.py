"""What the chart installs: generated parts are current, rights are least, pods are restricted."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from btx_api import names
from btx_operator.cluster import check, kube, resync
from btx_operator.cluster.chart_schema import FROM_OTHER_VALUES, settings_schema
from btx_operator.cluster.settings import Settings
from chart.tools import CHART, EVERYTHING, ROOT, VALUES, helm, one, render, settings, write_readme

CRD = f"{names.PLURAL}.{names.GROUP}"
MINORS = ("1.31", "1.37")
MONITORS = ("ServiceMonitor", "PodMonitor", "PrometheusRule")
NAMESPACED = EVERYTHING | {"namespaces": ["a", "b"]}


def test_the_chart_lints() -> None:
    """Warnings count as errors."""
    done = helm("lint", "--strict", CHART)

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_chart_packs_without_what_it_does_not_need(tmp_path: Path) -> None:
    """What is packed renders as the folder does."""
    assert helm("package", CHART, "--destination", tmp_path).returncode == 0
    (packed,) = tmp_path.glob("*.tgz")
    of_folder, of_package = (helm("template", "r", where).stdout for where in (CHART, packed))

    assert of_folder == of_package
    assert packed.stat().st_size < 200_000


def test_versions_are_those_of_the_product() -> None:
    """One number for package, chart and images."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (ROOT / "pyproject.toml").read_text()

    assert f'\nversion = "{chart["version"]}"\n' in project
    assert chart["appVersion"] == chart["version"]


def test_generated_parts_are_current() -> None:
    """`make generate` would change nothing: CRD, settings in the schema, README."""
    schema = json.loads((CHART / "values.schema.json").read_text())

    assert (CHART / "files" / f"{CRD}.yaml").read_bytes() == (
        ROOT / "crds" / f"{CRD}.yaml"
    ).read_bytes()
    assert schema["properties"]["settings"] == settings_schema()
    assert (CHART / "README.md").read_text() == write_readme.readme(
        (CHART / "values.yaml").read_text()
    )


def test_generate_writes_them(tmp_path: Path) -> None:
    """Into whatever chart it is given: the settings' part alone changes, the CRD is copied."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    schema["properties"]["settings"] = {}
    (tmp_path / "files").mkdir()
    (tmp_path / "values.schema.json").write_text(json.dumps(schema))
    command = [sys.executable, "-m", "btx_operator.cluster.chart_schema", tmp_path, ROOT / "crds"]
    subprocess.run(command, check=True)

    for name in ("values.schema.json", f"files/{CRD}.yaml"):
        assert (tmp_path / name).read_bytes() == (CHART / name).read_bytes()


def test_the_crd_is_the_generated_one_and_stays() -> None:
    """Rendered it differs by the labels, and by the annotation that keeps it at uninstall."""
    rendered = one(render(), "CustomResourceDefinition", CRD)
    generated = yaml.safe_load((ROOT / "crds" / f"{CRD}.yaml").read_text())

    assert rendered["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert rendered | {"metadata": {"name": CRD}} == generated


def test_values_and_settings_have_the_same_defaults() -> None:
    """A setting that is left out and one that is left alone are the same."""
    given = settings(render())
    defaults = Settings(trainer_image=given["trainerImage"])

    assert Settings.model_validate_json(json.dumps(given)) == defaults
    assert VALUES["settings"].keys() == {
        name for name in defaults.model_dump() if name not in FROM_OTHER_VALUES
    }
    assert defaults.model_dump().keys() == given.keys()


def test_bounds_of_settings_are_those_of_the_schema() -> None:
    """What the schema lets through, the operator can read."""
    for name, field in settings_schema()["properties"].items():
        assert "description" in field, name
        assert {"pattern", "minimum"} & field.keys() or field["type"] == "boolean", name


@pytest.mark.parametrize("values", [EVERYTHING, NAMESPACED], ids=["everywhere", "namespaces"])
@pytest.mark.parametrize("minor", MINORS)
def test_objects_fit_the_schemas_of_kubernetes(minor: str, values: dict[str, Any]) -> None:
    """Every object but the Prometheus operator's; unknown fields are errors."""
    checked = []
    for item in render(values, f"--kube-version={minor}.0"):
        if item["kind"] in MONITORS:
            continue
        checked.append(item["kind"])
        assert kubernetes_validate.validate(item, minor, strict=True) == minor

    assert {"Deployment", "CustomResourceDefinition", "NetworkPolicy", "Pod"} <= set(checked)


def test_an_older_kubernetes_is_refused() -> None:
    """By Chart.yaml, before anything is installed."""
    done = helm("template", "r", CHART, "--kube-version=1.30.9")

    assert done.returncode != 0
    assert "chart requires kubeVersion: >=1.31.0-0" in done.stderr


def test_every_object_is_named_and_labelled() -> None:
    """Names fit, labels say what an object belongs to, none is without a namespace by accident."""
    cluster_wide = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}
    for item in [*render(EVERYTHING), *render(NAMESPACED)]:
        meta = item["metadata"]
        where = f"{item['kind']} {meta['name']}"
        keys = {
            f"app.kubernetes.io/{key}"
            for key in ("name", "instance", "component", "version", "part-of", "managed-by")
        }
        assert keys | {"helm.sh/chart"} <= meta["labels"].keys(), where
        assert len(meta["name"]) <= 63, where
        assert ("namespace" in meta) == (item["kind"] not in cluster_wide), where


@pytest.mark.parametrize(
    ("release", "name"),
    [("btx", "btx-operator"), ("team", "team-btx-operator"), ("my-btx-operator", "my-btx-operator"),
     ("b", "b-btx-operator")],
)  # fmt: skip
def test_objects_are_named_by_release_and_chart(release: str, name: str) -> None:
    """Neither is said twice."""
    done = helm("template", release, CHART, "--show-only=templates/service.yaml")

    assert yaml.safe_load(done.stdout)["metadata"]["name"] == name


def test_long_names_still_fit() -> None:
    """53 characters is the longest release name that Helm takes."""
    done = helm("template", "r" * 53, CHART, *(f"--set={v}" for v in (
        "metrics.dashboards.enabled=true", "metrics.podMonitor.enabled=true",
    )))  # fmt: skip
    assert done.returncode == 0, done.stderr
    for item in yaml.load_all(done.stdout, yaml.CSafeLoader):
        if item:
            dns = item["kind"] in ("Service", "Pod", "Deployment")
            assert len(item["metadata"]["name"]) <= (63 if dns else 253)
            assert all(len(str(v)) <= 63 for v in item["metadata"]["labels"].values())


# Rights.


def verbs(role: dict[str, Any]) -> dict[tuple[str, str], tuple[str, ...]]:
    """Verbs by API group and resource."""
    return {
        (group, resource): tuple(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def test_the_operator_has_exactly_the_rights_that_it_uses() -> None:
    """The chart's rules are those that `helm test` asks for; nothing on Secrets or ConfigMaps."""
    rights = verbs(one(render(), "ClusterRole"))

    assert rights == check.RIGHTS
    assert rights == {
        ("btx.dev", "btxruns"): ("get", "list", "watch"),
        ("btx.dev", "btxruns/status"): ("update",),
        ("batch", "jobs"): ("get", "list", "watch", "create", "delete"),
        ("", "pods"): ("list", "watch"),
        ("", "pods/log"): ("get",),
        ("", "services"): ("create",),
        ("", "events"): ("create",),
    }


def test_the_rights_are_those_of_the_code() -> None:
    """Every call of the Kubernetes client in the operator needs one, and each is needed by one."""
    found = {(resource.plural, "watch") for resource, _ in resync.KINDS.values()}
    found |= {(resource.plural, "list") for resource, _ in resync.KINDS.values()}
    folder = ROOT / "operator/btx_operator/cluster"
    # remote.py is `btx` on a user's machine, with the user's rights.
    for path in sorted(set(folder.glob("*.py")) - {folder / "remote.py", folder / "check.py"}):
        text = path.read_text()
        for verb, resource in re.findall(r"\b_?kube\.(\w+)\(\s*([A-Z]\w+)", text):
            name = getattr(kube, resource).plural
            found.add((f"{name}/status", "update") if verb == "replace_status" else (name, verb))
        if "kube.log(" in text:
            found.add(("pods/log", "get"))

    assert found == {(name, verb) for (_, name), verbs in check.RIGHTS.items() for verb in verbs}


def test_rights_are_bound_to_the_operator_alone() -> None:
    """By a ClusterRole, or by one Role in each served namespace, never both."""
    subject = {"kind": "ServiceAccount", "name": "r-btx-operator", "namespace": "sys"}
    everywhere, named = render(), render({"namespaces": ["a", "b"]})
    binding = one(everywhere, "ClusterRoleBinding")

    assert binding["subjects"] == [subject]
    assert binding["roleRef"]["name"] == one(everywhere, "ClusterRole")["metadata"]["name"]
    assert not [o for o in everywhere if o["kind"] in ("Role", "RoleBinding")]
    assert not [o for o in named if o["kind"] in ("ClusterRole", "ClusterRoleBinding")]
    for kind in ("Role", "RoleBinding"):
        found = [o for o in named if o["kind"] == kind]
        assert [o["metadata"]["namespace"] for o in found] == ["a", "b"]
    for role, bound in zip(
        (o for o in named if o["kind"] == "Role"),
        (o for o in named if o["kind"] == "RoleBinding"),
        strict=True,
    ):
        assert verbs(role) == check.RIGHTS
        assert bound["subjects"] == [subject]
        assert bound["roleRef"]["name"] == role["metadata"]["name"]


ACCOUNTS = {
    "namespaces": ["a", "b"],
    "trainer.serviceAccounts": [
        {"name": "first", "create": True, "annotations": {"eks.amazonaws.com/role-arn": "arn"}},
        {"name": "second", "create": True, "namespaces": ["b"], "rules": [
            {"apiGroups": ["security.openshift.io"], "resources": ["sccs"], "verbs": ["use"]}]},
        {"name": "third", "create": False},
    ],
}  # fmt: skip


def test_accounts_of_trainers() -> None:
    """Where they are asked for, annotated, without their token; roles for those with rules."""
    objects = render(ACCOUNTS)
    found = {
        (o["metadata"]["namespace"], o["metadata"]["name"]): o
        for o in objects
        if o["kind"] == "ServiceAccount" and o["metadata"]["name"] != "r-btx-operator"
    }
    extra = [o for o in objects if o["metadata"]["name"] == "r-btx-operator-second"]

    assert found.keys() == {("a", "first"), ("b", "first"), ("b", "second")}
    assert all(o["automountServiceAccountToken"] is False for o in found.values())
    assert found["a", "first"]["metadata"]["annotations"] == {"eks.amazonaws.com/role-arn": "arn"}
    assert [(o["kind"], o["metadata"]["namespace"]) for o in extra] == [
        ("Role", "b"),
        ("RoleBinding", "b"),
    ]
    assert verbs(extra[0]) == {("security.openshift.io", "sccs"): ("use",)}
    assert extra[1]["subjects"] == [{"kind": "ServiceAccount", "name": "second", "namespace": "b"}]
    assert settings(objects)["serviceAccounts"] == ["first", "second", "third"]


def test_an_account_without_namespaces_is_made_beside_the_operator() -> None:
    """When every namespace is served there is no list to make it in."""
    accounts = [{"name": "one", "create": True}]
    account = one(render({"trainer.serviceAccounts": accounts}), "ServiceAccount", "one")

    assert account["metadata"]["namespace"] == "sys"


# Pods.


def pods() -> list[tuple[str, dict[str, Any]]]:
    """Pod specs of the chart, with a name for each."""
    objects = render(EVERYTHING)
    return [
        ("operator", one(objects, "Deployment")["spec"]["template"]["spec"]),
        ("check", one(objects, "Pod")["spec"]),
    ]


@pytest.mark.parametrize(("name", "pod"), pods(), ids=[name for name, _ in pods()])
def test_pods_keep_the_restricted_standard(name: str, pod: dict[str, Any]) -> None:
    """Non-root, read-only root file system, no capabilities; requests and a memory limit."""
    (container,) = pod["containers"]
    context = container["securityContext"]

    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 65532
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert container["resources"]["limits"].keys() == {"memory"}
    assert pod["serviceAccountName"] == "r-btx-operator"


def test_one_operator_at_a_time() -> None:
    """A new one starts when the old one has gone; probes ask the two health pages."""
    deployment = one(render(), "Deployment")["spec"]
    (container,) = deployment["template"]["spec"]["containers"]

    assert deployment["replicas"] == 1
    assert deployment["strategy"] == {"type": "Recreate"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert container["ports"] == [
        {"name": "http", "containerPort": Settings(trainer_image="x").port}
    ]


def test_changed_settings_restart_the_operator() -> None:
    """And nothing else of the pod changes."""
    before, after = (
        one(render(values), "Deployment")["spec"]["template"]
        for values in ({}, {"settings.workers": 3})
    )
    name = "checksum/settings"

    def rest(template: dict[str, Any]) -> dict[str, Any]:
        rest = copy.deepcopy(template)
        del rest["metadata"]["annotations"][name], rest["spec"]["containers"][0]["env"]
        return rest

    assert before["metadata"]["annotations"][name] != after["metadata"]["annotations"][name]
    assert rest(before) == rest(after)


def test_services_and_policies_select_the_operator() -> None:
    """By labels that its pod has, and that a trainer's pod has not."""
    objects = render(EVERYTHING)
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    check_labels = one(objects, "Pod")["metadata"]["labels"]
    selectors = [
        one(objects, "Service")["spec"]["selector"],
        one(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        one(objects, "Deployment")["spec"]["selector"]["matchLabels"],
    ]

    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not selector.items() <= check_labels.items()
    monitor = one(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    assert monitor.items() <= one(objects, "Service")["metadata"]["labels"].items()


def test_the_test_pod_asks_the_service() -> None:
    """With the settings of the operator, at the address of its Service."""
    objects = render(EVERYTHING | {"settings.port": 9001})
    pod, service = one(objects, "Pod"), one(objects, "Service")
    (container,) = pod["spec"]["containers"]
    name = f"{service['metadata']['name']}.{service['metadata']['namespace']}"

    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert container["command"] == ["python", "-m", "btx_operator.cluster.check"]
    assert container["args"] == [f"http://{name}:9001/readyz"]
    assert (
        container["env"]
        == (one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"])
    )


def test_notes_name_the_next_command() -> None:
    """With release and namespace filled in; they warn of what was left to the user."""
    plain = helm("install", "r", CHART, "--namespace=sys", "--dry-run=client").stdout
    notes = plain[plain.index("NOTES:") :]
    shy = helm(
        "install", "r", CHART, "--namespace=sys", "--dry-run=client", "--set-json=namespaces=[\"a\"]",
        "--set=crds.install=false", "--set=rbac.create=false",
    ).stdout  # fmt: skip

    assert "helm test r --namespace sys" in notes
    assert "kubectl apply --server-side --namespace default" in notes
    assert "crds.install is false" not in notes
    assert "kubectl get btx --namespace a --watch" in shy
    assert "crds.install is false" in shy
    assert "rbac.create is false" in shy
