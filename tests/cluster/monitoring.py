"""A real Prometheus that does what the Prometheus operator would make it do with the chart's objects.

ServiceMonitor, PodMonitor and PrometheusRule become scrape_configs and a rule file; their schemas
are those of the Prometheus operator's own CRDs. Debian's Prometheus is built without discovery in
Kubernetes: `Discovery` writes the same targets, with the same labels, into files that it watches.
"""

import contextlib
import copy
import itertools
import json
import os
import re
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from chart.tools import dashboards, panels
from cluster import binaries
from cluster.control_plane import Cluster
from cluster.parts import Part
from kubernetes import client
from s3_server import free_ports

MODULE = "github.com/prometheus-operator/prometheus-operator"
VERSION, SUM = "v0.85.0", "h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s="
PODS, SLICES = "pods.json", "slices.json"
Object = dict[str, Any]


def crds() -> list[Path]:
    """Files with the CRDs of the kinds that the chart uses, from the Go module of their operator."""
    with tempfile.TemporaryDirectory() as folder:
        found = json.loads(
            subprocess.run(
                ["go", "mod", "download", "-json", f"{MODULE}@{VERSION}"],
                cwd=folder, env=os.environ | {"GOTOOLCHAIN": "local", "GOFLAGS": ""},
                capture_output=True, check=True,
            ).stdout
        )  # fmt: skip
    assert found["Sum"] == SUM, found["Sum"]
    kinds = ("servicemonitors", "podmonitors", "prometheusrules")
    where = Path(found["Dir"]) / "example/prometheus-operator-crd"
    return [where / f"monitoring.coreos.com_{kind}.yaml" for kind in kinds]


def label(name: str) -> str:
    """As service discovery writes a label's name."""
    return "".join(c if c.isalnum() else "_" for c in name)


def scrape_configs(objects: Sequence[Object], folder: Path, interval: str = "") -> list[Object]:
    """Of every monitor, targets being in files of a folder; `interval` replaces theirs."""
    found = []
    for item in objects:
        monitor = {"ServiceMonitor": _service, "PodMonitor": _pod}.get(item["kind"])
        for number in range(0 if monitor is None else len(_endpoints(item))):
            assert monitor is not None
            found.append(monitor(item, number, folder, interval))
    return found


def _endpoints(item: Object) -> list[Object]:
    return list(item["spec"].get("endpoints") or item["spec"]["podMetricsEndpoints"])


def _service(item: Object, number: int, folder: Path, interval: str) -> Object:
    config = _common(item, number, folder / SLICES, "service_label", interval)
    port = _endpoints(item)[number]["port"]
    named = "__meta_kubernetes_endpointslice_port_name"
    config["relabel_configs"] += [
        {"source_labels": [named], "regex": port, "action": "keep"},
        {"source_labels": ["__meta_kubernetes_service_name"], "target_label": "service"},
        *_own_rules(item, number),
    ]
    return config


def _pod(item: Object, number: int, folder: Path, interval: str) -> Object:
    config = _common(item, number, folder / PODS, "pod_label", interval)
    port = _endpoints(item)[number]["port"]
    phase, named = "__meta_kubernetes_pod_phase", "__meta_kubernetes_pod_container_port_name"
    config["relabel_configs"] += [
        {"source_labels": [phase], "regex": "(Failed|Succeeded)", "action": "drop"},
        {"source_labels": [named], "regex": port, "action": "keep"},
        *_own_rules(item, number),
    ]
    return config


def _common(item: Object, number: int, targets: Path, labels: str, interval: str) -> Object:
    """What both kinds have: where to look, whom to keep, which labels a target gets."""
    spec, endpoint = item["spec"], _endpoints(item)[number]
    where = spec.get("namespaceSelector", {"matchNames": [item["metadata"]["namespace"]]})
    namespaces = ".*" if where.get("any") else "|".join(where["matchNames"])
    relabel: list[Object] = [
        {
            "source_labels": ["__meta_kubernetes_namespace"], "regex": namespaces,
            "action": "keep",
        },
    ]  # fmt: skip
    relabel += [
        {
            "source_labels": [f"__meta_kubernetes_{labels}_{label(name)}"],
            "regex": value, "action": "keep",
        }
        for name, value in spec["selector"]["matchLabels"].items()
    ]  # fmt: skip
    relabel += [
        {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
        {"source_labels": ["__meta_kubernetes_pod_name"], "target_label": "pod"},
    ]
    return {
        "job_name": f"{item['kind']}/{item['metadata']['name']}/{number}",
        "honor_labels": endpoint.get("honorLabels", False),
        "metrics_path": endpoint["path"],
        "scrape_interval": interval or endpoint["interval"],
        "scrape_timeout": interval or endpoint["interval"],
        "file_sd_configs": [{"files": [str(targets)]}],
        "relabel_configs": relabel,
        "metric_relabel_configs": [_rule(r) for r in endpoint.get("metricRelabelings", ())],
    }


def _own_rules(item: Object, number: int) -> list[Object]:
    return [_rule(rule) for rule in _endpoints(item)[number].get("relabelings", ())]


def _rule(rule: Object) -> Object:
    renamed = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    return {renamed.get(key, key): value for key, value in rule.items()}


class Discovery:
    """Targets of all pods and EndpointSlices, as `kubernetes_sd_configs` would find them."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._folder, self._end = folder, threading.Event()
        api = cluster.client()
        self._core, self._slices = client.CoreV1Api(api), client.DiscoveryV1Api(api)
        self._thread = threading.Thread(target=self._keep_writing, daemon=True)

    def __enter__(self) -> "Discovery":
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _keep_writing(self) -> None:
        while not self._end.wait(0.5):
            self._write()

    def _write(self) -> None:
        pods = self._core.list_pod_for_all_namespaces().items
        services = {
            (item.metadata.namespace, item.metadata.name): item
            for item in self._core.list_service_for_all_namespaces().items
        }
        slices = self._slices.list_endpoint_slice_for_all_namespaces().items
        for name, found in (
            (PODS, [target for pod in pods for target in _pod_targets(pod)]),
            (SLICES, [target for item in slices for target in _slice_targets(item, services)]),
        ):
            (self._folder / f"{name}.new").write_text(json.dumps(found))
            (self._folder / f"{name}.new").rename(self._folder / name)


def _labels(prefix: str, item: Any) -> dict[str, str]:
    return {
        f"__meta_kubernetes_{prefix}_label_{label(key)}": value
        for key, value in (item.metadata.labels or {}).items()
    }


def _pod_targets(pod: Any) -> Iterator[Object]:
    """One for each port of each container."""
    for container in pod.spec.containers if pod.status.pod_ip else ():
        for port in container.ports or ():
            labels = {
                "__meta_kubernetes_namespace": pod.metadata.namespace,
                "__meta_kubernetes_pod_name": pod.metadata.name,
                "__meta_kubernetes_pod_phase": pod.status.phase,
                "__meta_kubernetes_pod_container_name": container.name,
                "__meta_kubernetes_pod_container_port_name": port.name or "",
                **_labels("pod", pod),
            }
            yield {"targets": [f"{pod.status.pod_ip}:{port.container_port}"], "labels": labels}


def _slice_targets(item: Any, services: Mapping[tuple[str, str], Any]) -> Iterator[Object]:
    """One for each address and port of a Service."""
    name = (item.metadata.labels or {}).get("kubernetes.io/service-name", "")
    service = services.get((item.metadata.namespace, name))
    for endpoint in (item.endpoints or ()) if service else ():
        for address, port in itertools.product(endpoint.addresses, item.ports or ()):
            labels = {
                "__meta_kubernetes_namespace": item.metadata.namespace,
                "__meta_kubernetes_service_name": name,
                "__meta_kubernetes_endpointslice_port_name": port.name,
                **_labels("service", service),
            }
            if endpoint.target_ref is not None and endpoint.target_ref.kind == "Pod":
                labels["__meta_kubernetes_pod_name"] = endpoint.target_ref.name
            yield {"targets": [f"{address}:{port.port}"], "labels": labels}


class Prometheus:
    """A server that runs."""

    def __init__(self, port: int, part: Part) -> None:
        self.address, self.part = f"http://127.0.0.1:{port}", part

    def answers(self) -> bool:
        """Whether it is up; fails when it has ended."""
        self.part.check()
        with contextlib.suppress(OSError):
            return bool(self.query("vector(1)"))
        return False

    def get(self, path: str, **query: str) -> Any:
        """`data` of an answer of its API."""
        url = f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, promql: str) -> list[Object]:
        """The series of an instant query."""
        return list(self.get("query", query=promql)["result"])

    def wait_for(self, promql: str, seconds: float = 60) -> list[Object]:
        """The series of a query, once there are any."""
        until = time.monotonic() + seconds
        while not (found := self.query(promql)):
            self.part.check()
            assert time.monotonic() < until, f"no data for {promql}: {self.get('targets')}"
            time.sleep(0.3)
        return found


@contextlib.contextmanager
def prometheus(
    folder: Path, objects: Sequence[Object], cluster: Cluster, *,
    interval: str = "1s", relabel: Sequence[Object] = (),
) -> Iterator[Prometheus]:  # fmt: skip
    """A Prometheus with the monitors and rules among `objects`, stopped at the end.

    `relabel` are rules after all others, for targets that are elsewhere than their pods say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scrapes = scrape_configs(objects, folder, interval)
    for scrape in scrapes:
        scrape["relabel_configs"] += relabel
    rules = [item["spec"] for item in objects if item["kind"] == "PrometheusRule"]
    files = [folder / f"rules-{number}.yaml" for number in range(len(rules))]
    for path, spec in zip(files, rules, strict=True):
        path.write_text(yaml.safe_dump(spec))
    config = folder / "prometheus.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "global": {"evaluation_interval": interval},
                "rule_files": [str(path) for path in files],
                "scrape_configs": scrapes,
            }
        )
    )
    (port,) = free_ports(1)
    part = Part(
        "prometheus",
        (
            binaries.prometheus() / "prometheus", f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}",
        ),
        folder / "prometheus.log",
        {},
    )  # fmt: skip
    found = Prometheus(port, part)
    with Discovery(cluster, folder):
        part.start()
        try:
            cluster.wait_for("Prometheus", found.answers)
            yield found
        finally:
            part.stop()


def at_once(objects: Sequence[Object]) -> list[Object]:
    """The same objects with alerts that do not wait before they fire."""
    found = copy.deepcopy(list(objects))
    for item in found:
        for group in item["spec"]["groups"] if item["kind"] == "PrometheusRule" else ():
            for rule in group["rules"]:
                rule.pop("for", None)
    return found


def empty_panels(watching: Prometheus, since: float, namespace: str, run: str) -> list[str]:
    """Panels of both dashboards of which a query has returned nothing since a time."""
    words = {"$namespace": namespace, "$run": run, "$__range": "1h"}
    empty = []
    for name, dashboard in dashboards().items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                query = re.sub(r"\$\w+", lambda word: words[word[0]], target["expr"])
                times = {"start": str(since), "end": str(time.time()), "step": "1"}
                if not watching.get("query_range", query=query, **times)["result"]:
                    empty.append(f"{name}: {panel['title']}")
    return empty


def firing(watching: Prometheus) -> dict[str, list[dict[str, str]]]:
    """Labels of the alerts that fire, by name."""
    found: dict[str, list[dict[str, str]]] = {}
    for alert in watching.get("alerts")["alerts"]:
        if alert["state"] == "firing":
            found.setdefault(alert["labels"]["alertname"], []).append(alert["labels"])
    return found
