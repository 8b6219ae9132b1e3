"""A real Prometheus by the chart's monitors, rules and dashboards, over a run of a real operator.

Pods are played, but what they export is the trainer's own telemetry.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from btx_api.metrics import ENGINE, TRAINER, MetricType
from btx_api.stage import Kind, Progress
from btx_trainer.telemetry import Telemetry
from chart.tools import EVERYTHING, one, render
from cluster.control_plane import Cluster
from cluster.monitoring import Prometheus, at_once, empty_panels, firing, prometheus
from cluster.operator_process import Operator
from cluster.space import PATIENCE, Space, scripted
from kubernetes import client

SYSTEM = "sys"
ELSEWHERE = "10.9.9.9"
"""Where the operator's Service points to; no address of loopback may stand there."""
SOON = {
    "metrics.rules.noProgressSeconds": 3, "metrics.rules.checkpointAgeSeconds": 3,
    "metrics.rules.queueStuckSeconds": 60, "metrics.rules.watchStaleSeconds": 600,
}  # fmt: skip
TOLD = {"end": "told"}
ADDRESSES = {"train-code": "127.0.1.1", "train-math": "127.0.1.2", "finetune": "127.0.1.3"}


@dataclass
class Trainer:
    """What one played stage exports."""

    telemetry: Telemetry

    def publish(self, **fields: Any) -> None:
        """One more step."""
        known = {
            "phase": "training", "step": 20, "steps": 100, "tokens": 2000, "tokens_per_second": 100.0,
            "loss": 2.5, "grad_norm": 0.5, "lr": 1e-4, "eta_seconds": 80.0, "checkpoint_step": 10,
            "checkpoint_time": time.time(),
        }  # fmt: skip
        self.telemetry.publish(Progress(**known | fields))


@contextlib.contextmanager
def trainer(run: str, stage: str, port: int) -> Iterator[Trainer]:
    """A stage's telemetry at the address of its pod."""
    telemetry = Telemetry(run=run, stage=stage, kind=Kind(stage.partition("-")[0]))
    server = telemetry.serve(f"{ADDRESSES[stage]}:{port}")
    try:
        yield Trainer(telemetry)
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def watching(cluster: Cluster, engine: Operator, tmp_path: Path) -> Iterator[Prometheus]:
    """A Prometheus that found the operator; alerts do not wait."""
    objects = at_once(render(EVERYTHING | SOON))
    core = client.CoreV1Api(cluster.client())
    service = one(objects, "Service")
    core.create_namespace({"metadata": {"name": SYSTEM}})
    core.create_namespaced_service(SYSTEM, service)
    client.DiscoveryV1Api(cluster.client()).create_namespaced_endpoint_slice(SYSTEM, {
        "metadata": {"name": "own", "labels": {
            "kubernetes.io/service-name": service["metadata"]["name"]}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": engine.port}],
        "endpoints": [{"addresses": [ELSEWHERE]}],
    })  # fmt: skip
    there = {
        "source_labels": ["__address__"], "regex": rf"{ELSEWHERE.replace('.', '[.]')}:(.*)",
        "target_label": "__address__", "replacement": "127.0.0.1:$1",
    }  # fmt: skip
    with prometheus(tmp_path / "prometheus", objects, cluster, relabel=[there]) as started:
        started.wait_for("btx_operator_queue_depth")
        yield started


def told(stages: list[str]) -> dict[str, Any]:
    """Scripts: each stage at its address, until it is told to end."""
    return {"stages": {stage: TOLD | {"ip": ADDRESSES[stage]} for stage in stages}}


def test_a_run_is_seen(
    cluster: Cluster, engine: Operator, space: Space, watching: Prometheus, trainer_port: int
) -> None:
    """Every panel has data, every metric is exported, and what goes wrong is told.

    Two experts train, one stops to publish; then the router, with a dead expert and no checkpoint.
    """
    since = time.time()
    blocks = scripted(train=told(["train-code", "train-math"]), finetune=told(["finetune"]))
    blocks["train"]["gpus"], blocks["finetune"]["gpus"] = 1, 2
    space.run(execution=blocks)
    space.run("refused", execution=scripted(prepare={"stages": {"preflight": {"exit": 78}}}))

    with contextlib.ExitStack() as stack:
        code, math = (
            stack.enter_context(trainer("run", stage, trainer_port))
            for stage in ("train-code", "train-math")
        )
        code.publish(checkpoint_time=time.time() - 60)

        def both_are_seen() -> bool:
            math.publish()
            found = watching.query(f'btx_trainer_loss_nats{{namespace="{space.name}"}}')
            stages = {series["metric"]["stage"] for series in found}
            alerts = firing(watching)
            return (
                stages == {"train-code", "train-math"}
                and {"BTXNoProgress", "BTXCheckpointOld", "BTXPreflightFailed"} <= alerts.keys()
                and bool(watching.query("btx_stage_gpus"))
            )

        cluster.wait_for("two experts and three alerts", both_are_seen, PATIENCE)
        alerts = firing(watching)
        for name in ("BTXNoProgress", "BTXCheckpointOld"):
            stages = {(a["namespace"], a["run"], a["stage"]) for a in alerts[name]}
            assert stages == {(space.name, "run", "train-code")}, name
        [refused] = alerts["BTXPreflightFailed"]
        assert (refused["run"], refused["reason"]) == ("refused", "PreflightFailed")
        [loss] = watching.query('btx_trainer_loss_nats{stage="train-code"}')
        labels = {"namespace": space.name, "run": "run", "stage": "train-code", "expert": "code"}
        assert labels.items() <= loss["metric"].items()
        assert not [label for label in loss["metric"] if label.startswith("exported_")]
        for stage in ("train-code", "train-math"):
            space.release(stage)

    with trainer("run", "finetune", trainer_port) as router:

        def experts_are_seen() -> bool:
            router.publish(
                balance=1.2, expert_load=(0.9, 0.1), dead_experts=("0.1",), checkpoint_time=0.0
            )
            return {"BTXDeadExpert", "BTXCheckpointMissing"} <= firing(watching).keys()

        cluster.wait_for("the dead expert", experts_are_seen, PATIENCE)
        [dead] = firing(watching)["BTXDeadExpert"]
        assert (dead["run"], dead["stage"]) == ("run", "finetune")
        space.release("finetune")

    space.succeeded()
    space.run("again", execution=blocks)
    cluster.wait_for(
        "every panel", lambda: not empty_panels(watching, since, space.name, "run"), PATIENCE
    )
    exported = set(watching.get("label/__name__/values"))
    for metric in (*TRAINER.values(), *ENGINE.values()):
        suffix = "_count" if metric.type is MetricType.HISTOGRAM else ""
        assert metric.name + suffix in exported

    engine.stop()
    cluster.wait_for("the alert", lambda: "BTXOperatorDown" in firing(watching), PATIENCE)
    engine.start()
    engine.wait_ready()
    cluster.wait_for("its end", lambda: "BTXOperatorDown" not in firing(watching), PATIENCE)
