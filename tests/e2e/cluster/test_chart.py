"""The chart on a real node: `helm test`, and a Prometheus that finds operator and trainers by it."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.cases import INDEX, TRAIN, Case, processes, row
from cluster.images import ROOT
from cluster.installation import CHART, RELEASE, SYSTEM, Installation, condition
from cluster.monitoring import Prometheus, at_once, empty_panels, firing, prometheus
from kubernetes import client
from workspace import Workspace

HERE = f"--namespace={SYSTEM}"
MONITORED = [
    f"--set=metrics.{name}.enabled=true" for name in ("serviceMonitor", "podMonitor", "rules")
]
SOON = [f"--set=metrics.rules.{name}=10" for name in ("noProgressSeconds", "checkpointAgeSeconds")]
EXPERTS = 3
"""Of the quick start, each on a GPU of its own."""


# helm test.


def test_helm_test_passes(installed: Installation) -> None:
    """The operator is ready and may do all that it needs; the pod goes."""
    said = installed.helm("test", RELEASE, HERE, "--timeout=3m")

    assert "Phase:          Succeeded" in said, said
    assert f"{RELEASE}-check" not in installed.kubectl("get", "pods", HERE)


def test_helm_test_fails_when_a_right_is_missing(installed: Installation) -> None:
    """The pod stays, and its log names the verb; with the right back it passes."""
    rbac = client.RbacAuthorizationV1Api(installed.node.cluster.client())
    role = json.loads(installed.kubectl("get", "clusterrole", RELEASE, "-o", "json"))
    rules = [
        rule | {"verbs": [verb for verb in rule["verbs"] if verb != "create"]}
        for rule in role["rules"]
    ]

    def give(rules: list[dict[str, Any]]) -> None:
        patch = [{"op": "replace", "path": "/rules", "value": [r for r in rules if r["verbs"]]}]
        rbac.patch_cluster_role(RELEASE, patch)

    give(rules)
    try:
        time.sleep(2)
        installed.helm("test", RELEASE, HERE, "--timeout=3m", code=1)
        log = installed.kubectl("logs", f"{RELEASE}-check", HERE)
    finally:
        give(role["rules"])

    assert "rights: must not create jobs in every namespace" in log
    assert "operator: ready" in log
    time.sleep(2)
    installed.helm("test", RELEASE, HERE, "--timeout=3m")


# Prometheus.


@pytest.fixture
def watching(installed: Installation, tmp_path: Path) -> Iterator[Prometheus]:
    """With the release's monitors and rules; it has found the operator."""
    text = installed.helm("template", RELEASE, CHART, HERE, *MONITORED, *SOON)
    objects = [item for item in yaml.load_all(text, yaml.CSafeLoader) if item]
    with prometheus(tmp_path, at_once(objects), installed.node.cluster) as started:
        started.wait_for("btx_operator_queue_depth", 120)
        yield started


@pytest.fixture
def gpus(installed: Installation) -> Iterator[None]:
    """The node advertises GPUs that it has not; trainers that find none compute on the CPU.

    The rest is as it would be: limits of the pods, the scheduler, hours and utilisation by GPU.
    """
    core = client.CoreV1Api(installed.node.cluster.client())
    (node,) = core.list_node().items
    paths = [f"/status/{part}/nvidia.com~1gpu" for part in ("capacity", "allocatable")]
    more = [{"op": "add", "path": path, "value": str(EXPERTS)} for path in paths]
    core.patch_node_status(node.metadata.name, more)
    yield
    core.patch_node_status(node.metadata.name, [{"op": "remove", "path": path} for path in paths])


def manifest(name: str, prefix: str) -> dict[str, Any]:
    """The quick start, in a storage where nothing is there yet, with checkpoints all the time."""
    body: dict[str, Any] = yaml.safe_load((ROOT / "examples/quickstart-cluster.yaml").read_text())
    body["metadata"]["name"] = name
    body["spec"]["storage"]["uri"] = f"s3://btx/{prefix}"
    for kind in ("train", "finetune"):
        body["spec"]["execution"].setdefault(kind, {})["checkpointSeconds"] = 1
    return body


def test_every_panel_has_data_of_a_real_run(
    installed: Installation, inputs: Workspace, team: str, watching: Prometheus, gpus: None
) -> None:
    """Real trainers export under the labels of their pods; a refused run is told of."""
    since = time.time()
    refused = manifest("refused", "watched")
    refused["spec"]["seed"]["uri"] = "s3://btx/nowhere"
    run = manifest("run", "watched")
    run["spec"]["execution"]["train"]["gpus"] = 1
    installed.apply(team, run, refused)
    item = installed.ended(team, "run")
    assert condition(item, "Succeeded")["status"] == "True", installed.story(team)
    installed.apply(team, manifest("again", "watched"))
    installed.ended(team, "again")

    deadline = time.monotonic() + 60
    while empty := empty_panels(watching, since, team, "run"):
        assert time.monotonic() < deadline, empty
        time.sleep(2)
    [alert] = firing(watching)["BTXPreflightFailed"]
    assert (alert["namespace"], alert["run"]) == (team, "refused")
    labels = f'namespace="{team}", run="run", stage="train-code", expert="code"'
    assert watching.query(f"last_over_time(btx_trainer_loss_nats{{{labels}}}[1h])")


def test_alerts_fire_for_an_expert_that_hangs_and_then_fails(
    long_case: Case, watching: Prometheus
) -> None:
    """One of its two ranks is stopped: no step, no checkpoint. It is killed: the run has failed."""
    case, wait_for = long_case, long_case.installed.node.cluster.wait_for
    case.spec["policy"]["maxRetries"] = 0
    case.spec["execution"]["train"] |= {"nodes": 2, "checkpointSeconds": 1}
    case.apply()
    case.training()
    stored = f'btx_trainer_checkpoint_timestamp_seconds{{namespace="{case.namespace}"}}'
    watching.wait_for(stored)
    second = next(p for p in case.pods(TRAIN) if p["metadata"]["labels"][INDEX] == "1")
    ranks = processes(second)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)

    def fires(name: str, **labels: str) -> bool:
        return any(labels.items() <= found.items() for found in firing(watching).get(name, ()))

    for name in ("BTXNoProgress", "BTXCheckpointOld"):
        labels = {"namespace": case.namespace, "run": "case", "stage": TRAIN}
        wait_for(name, lambda name=name, labels=labels: fires(name, **labels), 120)

    def failed() -> float:
        return float(watching.query('sum(btx_runs{state="Failed"})')[0]["value"][1])

    before = failed()
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    case.until(lambda item: row(item).get("state") == "Failed")
    wait_for("BTXRunFailed", lambda: fires("BTXRunFailed"), 120)
    assert failed() > before
