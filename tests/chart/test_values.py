"""Every key of values.yaml does something, refuses what is wrong, and is documented."""

import json
from typing import Any

import pytest
from chart import tools
from chart.tools import CHART, VALUES, at_keys, leaves, one, render, settings, template

SYS = "sys"
DEPLOYMENT = ("Deployment", "r-btx-operator")
POD = "spec.template.spec"
CONTAINER = f"{POD}.containers.0"
MONITOR = {"metrics.serviceMonitor.enabled": True}
PODS = {"metrics.podMonitor.enabled": True}
RULES = {"metrics.rules.enabled": True}
BOARDS = {"metrics.dashboards.enabled": True}
POLICY = {"networkPolicy.enabled": True}
DIGEST = "sha256:" + 64 * "a"
TOLERATION = {"key": "cpu", "operator": "Exists"}
NODES = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}
ACCOUNT = {"name": "team", "create": True, "annotations": {"role": "arn"}}
PEER = {"namespaceSelector": {"matchLabels": {"team": "monitoring"}}}

# Key; value; other values that it needs; object; where in it; what is there then.
# "settings" as object: what the operator is given.
CASES: list[tuple[str, Any, dict[str, Any], tuple[str, str] | str, str, Any]] = [
    ("nameOverride", "other", {}, ("Deployment", "r-other"), "spec.replicas", 1),
    ("fullnameOverride", "other", {}, ("Deployment", "other"), "spec.replicas", 1),
    ("namespaces", ["a"], {}, ("Role", "r-btx-operator"), "metadata.namespace", "a"),
    ("namespaces", ["a"], {}, "settings", "namespaces", ["a"]),
    ("namespaces", ["a"], PODS, ("PodMonitor", "r-btx-operator-trainer"), "spec.namespaceSelector", {"matchNames": ["a"]}),
    ("image.repository", "reg/op", {}, DEPLOYMENT, f"{CONTAINER}.image", "reg/op:0.1.0"),
    ("image.tag", "v2", {}, DEPLOYMENT, f"{CONTAINER}.image", "btx-operator:v2"),
    ("image.digest", DIGEST, {}, DEPLOYMENT, f"{CONTAINER}.image", f"btx-operator@{DIGEST}"),
    ("image.pullPolicy", "Never", {}, DEPLOYMENT, f"{CONTAINER}.imagePullPolicy", "Never"),
    ("imagePullSecrets", ["pull"], {}, DEPLOYMENT, f"{POD}.imagePullSecrets", [{"name": "pull"}]),
    ("trainer.image.repository", "reg/tr", {}, "settings", "trainerImage", "reg/tr:0.1.0"),
    ("trainer.image.tag", "v2", {}, "settings", "trainerImage", "btx-trainer:v2"),
    ("trainer.image.digest", DIGEST, {}, "settings", "trainerImage", f"btx-trainer@{DIGEST}"),
    ("trainer.image.pullPolicy", "Never", {}, "settings", "imagePullPolicy", "Never"),
    ("trainer.imagePullSecrets", ["pull"], {}, "settings", "imagePullSecrets", ["pull"]),
    ("trainer.serviceAccounts", [ACCOUNT], {}, "settings", "serviceAccounts", ["team"]),
    ("trainer.serviceAccounts", [ACCOUNT], {}, ("ServiceAccount", "team"), "metadata.annotations", {"role": "arn"}),
    ("settings.scratchSize", "9Gi", {}, "settings", "scratchSize", "9Gi"),
    ("settings.sharedMemorySize", "9Gi", {}, "settings", "sharedMemorySize", "9Gi"),
    ("settings.jobTtlSeconds", 31_000_000, {}, "settings", "jobTtlSeconds", 31_000_000),
    ("settings.workers", 9, {}, "settings", "workers", 9),
    ("settings.requests", 9, {}, "settings", "requests", 9),
    ("settings.resyncSeconds", 9, {}, "settings", "resyncSeconds", 9),
    ("settings.progressSeconds", 9, {}, "settings", "progressSeconds", 9),
    ("settings.port", 9000, {}, "settings", "port", 9000),
    ("settings.port", 9000, {}, DEPLOYMENT, f"{CONTAINER}.ports.0.containerPort", 9000),
    ("settings.port", 9000, {}, ("Service", "r-btx-operator"), "spec.ports.0.port", 9000),
    ("settings.trainerPort", 9000, {}, "settings", "trainerPort", 9000),
    ("settings.trainerPort", 9000, POLICY, ("NetworkPolicy", "r-btx-operator"), "spec.egress.1.ports.0.port", 9000),
    ("settings.logLevel", "DEBUG", {}, "settings", "logLevel", "DEBUG"),
    ("settings.logJson", False, {}, "settings", "logJson", False),
    ("serviceAccount.name", "own", {}, DEPLOYMENT, f"{POD}.serviceAccountName", "own"),
    ("serviceAccount.name", "own", {}, ("ClusterRoleBinding", "r-btx-operator"), "subjects.0.name", "own"),
    ("serviceAccount.annotations", {"role": "arn"}, {}, ("ServiceAccount", "r-btx-operator"), "metadata.annotations", {"role": "arn"}),
    ("podLabels", {"team": "x"}, {}, DEPLOYMENT, "spec.template.metadata.labels.team", "x"),
    ("podAnnotations", {"team": "x"}, {}, DEPLOYMENT, "spec.template.metadata.annotations.team", "x"),
    ("resources", {"limits": {"memory": "1Gi"}}, {}, DEPLOYMENT, f"{CONTAINER}.resources.limits", {"memory": "1Gi"}),
    ("nodeSelector", {"pool": "cpu"}, {}, DEPLOYMENT, f"{POD}.nodeSelector", {"pool": "cpu"}),
    ("tolerations", [TOLERATION], {}, DEPLOYMENT, f"{POD}.tolerations", [TOLERATION]),
    ("affinity", NODES, {}, DEPLOYMENT, f"{POD}.affinity", NODES),
    ("priorityClassName", "high", {}, DEPLOYMENT, f"{POD}.priorityClassName", "high"),
    ("metrics.serviceMonitor.enabled", True, {}, ("ServiceMonitor", "r-btx-operator"), "spec.endpoints.0.port", "http"),
    ("metrics.serviceMonitor.labels", {"p": "x"}, MONITOR, ("ServiceMonitor", "r-btx-operator"), "metadata.labels.p", "x"),
    ("metrics.serviceMonitor.interval", "5s", MONITOR, ("ServiceMonitor", "r-btx-operator"), "spec.endpoints.0.interval", "5s"),
    ("metrics.podMonitor.enabled", True, {}, ("PodMonitor", "r-btx-operator-trainer"), "spec.namespaceSelector", {"any": True}),
    ("metrics.podMonitor.labels", {"p": "x"}, PODS, ("PodMonitor", "r-btx-operator-trainer"), "metadata.labels.p", "x"),
    ("metrics.podMonitor.interval", "5s", PODS, ("PodMonitor", "r-btx-operator-trainer"), "spec.podMetricsEndpoints.0.interval", "5s"),
    ("metrics.rules.enabled", True, {}, ("PrometheusRule", "r-btx-operator"), "spec.groups.0.name", "btx"),
    ("metrics.rules.labels", {"p": "x"}, RULES, ("PrometheusRule", "r-btx-operator"), "metadata.labels.p", "x"),
    ("metrics.dashboards.enabled", True, {}, ("ConfigMap", "r-btx-operator-dashboard-run"), "metadata.labels.grafana_dashboard", "1"),
    ("metrics.dashboards.labels", {"p": "x"}, BOARDS, ("ConfigMap", "r-btx-operator-dashboard-fleet"), "metadata.labels.p", "x"),
    ("metrics.dashboards.annotations", {"folder": "x"}, BOARDS, ("ConfigMap", "r-btx-operator-dashboard-run"), "metadata.annotations", {"folder": "x"}),
    ("networkPolicy.enabled", True, {}, ("NetworkPolicy", "r-btx-operator"), "spec.ingress", [{"ports": [{"port": "http"}]}]),
    ("networkPolicy.ingressFrom", [PEER], POLICY, ("NetworkPolicy", "r-btx-operator"), "spec.ingress.0.from", [PEER]),
    ("networkPolicy.apiServerPorts", [8443], POLICY, ("NetworkPolicy", "r-btx-operator"), "spec.egress.0.ports.2.port", 8443),
]  # fmt: skip
# Key: value that takes an object away, the object, and other values that it needs.
ABSENT: dict[str, tuple[Any, tuple[str, str], dict[str, Any]]] = {
    "crds.install": (False, ("CustomResourceDefinition", "btxruns.btx.dev"), {}),
    "rbac.create": (False, ("ClusterRole", "r-btx-operator"), {}),
    "serviceAccount.create": (False, ("ServiceAccount", "x"), {"serviceAccount.name": "x"}),
}
# Key of metrics.rules: value; what every rule together says then.
IN_RULES: dict[str, tuple[Any, str]] = {
    "metrics.rules.runbookUrl": ("at/", "at/btxnoprogress"),
    "metrics.rules.peakTflops": (312.5, "* 312.5e12)"),
    "metrics.rules.noProgressSeconds": (77, "progress_age:seconds > 77"),
    "metrics.rules.checkpointAgeSeconds": (77, "checkpoint_age:seconds > 77"),
    "metrics.rules.queueStuckSeconds": (77, "queue_depth[77s]) > 0"),
    "metrics.rules.watchStaleSeconds": (77, "listed_timestamp_seconds > 77"),
}
BAD: dict[str, Any] = {
    "nameOverride": "Upper", "fullnameOverride": "under_score", "namespaces": "a",
    "crds.install": "yes", "image.repository": "", "image.tag": "a b", "image.digest": "md5:0",
    "image.pullPolicy": "Sometimes", "imagePullSecrets": [{"name": "a"}],
    "trainer.image.repository": "", "trainer.image.tag": "-", "trainer.image.digest": "x",
    "trainer.image.pullPolicy": "", "trainer.imagePullSecrets": "a",
    "trainer.serviceAccounts": [], "settings.scratchSize": "50", "settings.sharedMemorySize": "1GB",
    "settings.jobTtlSeconds": -1, "settings.workers": 0, "settings.requests": 0.5,
    "settings.resyncSeconds": 4, "settings.progressSeconds": "30", "settings.port": 65_536,
    "settings.trainerPort": 80, "settings.logLevel": "debug", "settings.logJson": "no",
    "rbac.create": 1, "serviceAccount.create": "", "serviceAccount.name": "A",
    "serviceAccount.annotations": {"a": 1}, "podLabels": {"a": 1}, "podAnnotations": [],
    "resources": {"memory": "1Gi"}, "nodeSelector": {"a": True}, "tolerations": ["a"],
    "affinity": {"node": {}}, "priorityClassName": 1, "metrics.serviceMonitor.enabled": "on",
    "metrics.serviceMonitor.labels": "a", "metrics.serviceMonitor.interval": "30",
    "metrics.podMonitor.enabled": "on", "metrics.podMonitor.labels": {"a": 1},
    "metrics.podMonitor.interval": "fast", "metrics.rules.enabled": "on",
    "metrics.rules.labels": {"a": 1}, "metrics.rules.runbookUrl": 'a"', "metrics.rules.peakTflops": 0,
    "metrics.rules.noProgressSeconds": 0, "metrics.rules.checkpointAgeSeconds": "1h",
    "metrics.rules.queueStuckSeconds": 1.5, "metrics.rules.watchStaleSeconds": -1,
    "metrics.dashboards.enabled": 1, "metrics.dashboards.labels": {"a": 1},
    "metrics.dashboards.annotations": {"a": 1}, "networkPolicy.enabled": "x",
    "networkPolicy.ingressFrom": {}, "networkPolicy.apiServerPorts": ["https"],
}  # fmt: skip


def ids(case: tuple[Any, ...]) -> str:
    """`key -> object path`."""
    where = case[3] if isinstance(case[3], str) else case[3][0]
    return f"{case[0]} -> {where} {case[4]}"


def test_every_key_has_a_case() -> None:
    """A new value needs a row that shows what it does, and one that shows what it refuses."""
    keys = set(leaves(VALUES))

    assert {case[0] for case in CASES} | ABSENT.keys() | IN_RULES.keys() == keys
    assert BAD.keys() == keys


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_value_arrives_where_it_belongs(case: tuple[Any, ...]) -> None:
    """It stands where it should, and something else stood there before."""
    key, value, given, where, path, expected = case

    def seen(values: dict[str, Any]) -> Any:
        objects = render(values)
        if where == "settings":
            return at_keys(settings(objects), path)
        found = [o for o in objects if (o["kind"], o["metadata"]["name"]) == where]
        return at_keys(found[0], path) if found else None

    assert seen(given | {key: value}) == expected
    assert seen(given) != expected


@pytest.mark.parametrize("key", ABSENT)
def test_a_switch_takes_an_object_away(key: str) -> None:
    """There with the default, gone with the other value."""
    value, (kind, name), given = ABSENT[key]

    assert one(render(given), kind, name)
    assert not [
        o
        for o in render(given | {key: value})
        if (o["kind"], o["metadata"]["name"]) == (kind, name)
    ]


@pytest.mark.parametrize("key", IN_RULES)
def test_a_threshold_is_in_the_rules(key: str) -> None:
    """Put in where files/rules.yaml names it, and nothing is left to be put in."""
    value, text = IN_RULES[key]
    rules = [
        json.dumps(one(render(RULES | given), "PrometheusRule")["spec"])
        for given in ({key: value}, {})
    ]

    assert text in rules[0]
    assert text not in rules[1]
    assert "<" not in rules[0]


@pytest.mark.parametrize("key", BAD)
def test_a_wrong_value_is_refused_by_name(key: str) -> None:
    """The last part of the key is in the message; nothing is rendered."""
    done = template({key: BAD[key]})

    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
    assert f"/{key.replace('.', '/')}" in done.stderr, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("section", ["", *tools.sections(VALUES), "resources"])
def test_an_unknown_key_is_refused_by_name(section: str) -> None:
    """A misspelled key is never ignored."""
    done = template({f"{section}.bogus" if section else "bogus": 1})

    assert done.returncode != 0
    assert "'bogus' not allowed" in done.stderr, done.stderr


def test_an_account_of_somebody_else_must_be_named() -> None:
    """No name can be made up for it."""
    done = template({"serviceAccount.create": False})

    assert done.returncode != 0
    assert "serviceAccount.name: needed when serviceAccount.create is false" in done.stderr


def test_the_schema_describes_exactly_these_keys() -> None:
    """values.yaml has every key of the schema, and each of both is documented."""
    schema = json.loads((CHART / "values.schema.json").read_text())

    def walk(node: dict[str, Any], values: Any, path: str) -> None:
        assert node.get("description") or not path, path
        if "properties" in node and path not in ("resources", "affinity"):
            known = node["properties"].keys() - ({"global"} if not path else set())
            assert known == values.keys(), path
            for key in known:
                walk(node["properties"][key], values[key], f"{path}.{key}".strip("."))

    walk(schema, VALUES, "")
