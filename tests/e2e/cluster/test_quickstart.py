"""The quick start on a cluster, as a user types it: Succeeded, and a model in S3."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from btx_api.status import Status
from cluster.images import ROOT
from cluster.installation import RELEASE, SYSTEM, Installation, condition
from s3_server import BUCKET, written_down
from workspace import Workspace

MANIFEST = ROOT / "examples/quickstart-cluster.yaml"
STAGES = [
    "prepare-code", "prepare-prose", "prepare-math", "prepare-general", "train-code",
    "train-prose", "train-math", "average", "mix", "finetune", "evaluate",
]  # fmt: skip
COLUMNS = ["NAME", "STATE", "STAGE", "EXPERTS", "PROGRESS", "ETA", "AGE"]


class Finished:
    """The run, once it has ended."""

    def __init__(self, installed: Installation, namespace: str, item: dict[str, Any]) -> None:
        self.installed, self.namespace, self.item = installed, namespace, item
        self.status = Status.parse(item["status"])

    def kubectl(self, *words: str) -> str:
        """In its namespace."""
        return self.installed.kubectl(*words, f"--namespace={self.namespace}")


@pytest.fixture(scope="module")
def finished(installed: Installation, inputs: Workspace) -> Iterator[Finished]:
    """`kubectl apply` of the example, and its end."""
    namespace = installed.namespace()
    here = f"--namespace={namespace}"
    installed.kubectl("apply", "--server-side", here, "-f", MANIFEST)
    item = installed.ended(namespace, "quickstart")
    succeeded = condition(item, "Succeeded")
    assert succeeded["status"] == "True", installed.story(namespace)
    yield Finished(installed, namespace, item)


def test_every_stage_is_complete_after_one_attempt(finished: Finished) -> None:
    """Rows, conditions and Jobs agree; nothing was tried twice."""
    rows = {row.name: (row.state, row.attempt, row.failures) for row in finished.status.stages}
    jobs = json.loads(finished.kubectl("get", "jobs", "-o", "json"))["items"]
    stages = [job["metadata"]["labels"]["btx.dev/stage"] for job in jobs]

    assert rows == dict.fromkeys(rows, ("Complete", 1, 0))
    assert set(rows) == set(STAGES)
    assert sorted(stages) == sorted([*STAGES, "preflight"])
    assert {job["status"].get("succeeded") for job in jobs} == {1}


def test_the_model_in_s3_loads_with_stock_transformers(finished: Finished, tmp_path: Path) -> None:
    """`.status.model` names a folder of the bucket; the model has 4 experts and finite logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert finished.status.model.startswith(f"s3://{BUCKET}/quickstart/")
    folder = finished.installed.download(finished.status.model, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(folder)("(3 + 4) * 3 = 21", return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens).logits

    assert type(model).__name__ == "MixtralForCausalLM"
    assert model.config.num_local_experts == 4
    assert bool(torch.isfinite(logits).all())


def test_kubectl_get_and_describe_tell_the_run(finished: Finished) -> None:
    """The columns of `kubectl get btx`, and what `describe` says of conditions and events."""
    table = [
        re.split(r" {2,}", line.strip()) for line in finished.kubectl("get", "btx").splitlines()
    ]
    described = finished.kubectl("describe", "btx", "quickstart")

    assert table[0] == COLUMNS
    assert table[1][:2] == ["quickstart", "Succeeded"]
    assert "3/3" in table[1]
    assert re.search(r"Reason: +Complete\s+Status: +True\s+Type: +Succeeded", described)
    for stage in STAGES:
        assert re.search(rf"Normal +StageComplete .*\b{stage}\b", described), described
    assert "Warning" not in described


def test_pods_ran_under_the_restricted_standard(finished: Finished) -> None:
    """The namespace enforces it; every pod was admitted, none has a token of the API."""
    labels = json.loads(finished.kubectl("get", "namespace", finished.namespace, "-o", "json"))
    pods = json.loads(finished.kubectl("get", "pods", "-o", "json"))["items"]

    assert labels["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert len(pods) == len(STAGES) + 1
    assert not [pod for pod in pods if pod["spec"].get("automountServiceAccountToken", True)]
    assert {pod["spec"]["containers"][0]["image"] for pod in pods} == {
        finished.installed.images["trainer"].name
    }


def test_the_operator_used_its_own_service_account_only(finished: Finished) -> None:
    """By the audit log: it created the Jobs, and RBAC refused nothing that it asked for."""
    user = f"system:serviceaccount:{SYSTEM}:{RELEASE}"
    log = finished.installed.node.cluster.audit_log.read_text().splitlines()
    entries = [json.loads(line) for line in log]
    here = [e for e in entries if e.get("objectRef", {}).get("namespace") == finished.namespace]
    ours = [entry for entry in here if entry["user"]["username"] == user]
    jobs = [e for e in here if (e["verb"], e["objectRef"]["resource"]) == ("create", "jobs")]

    assert [e["user"]["username"] for e in jobs] == [user] * (len(STAGES) + 1)
    assert [e["requestURI"] for e in ours if decision(e) != "allow"] == []


def test_no_credential_is_written_down(finished: Finished, tmp_path: Path) -> None:
    """In nothing that the cluster keeps but the Secret itself, no log, metric or artifact."""
    kinds = "btx,jobs,pods,services,configmaps,serviceaccounts,events"
    objects = finished.kubectl("get", kinds, "-o", "yaml")
    texts = [objects, finished.kubectl("describe", "btx,jobs,pods")]
    for pod in finished.kubectl("get", "pods", "-o", "name").split():
        texts.append(finished.kubectl("logs", pod))
    installed, there = finished.installed, f"--namespace={SYSTEM}"
    texts.append(installed.kubectl("logs", f"deploy/{RELEASE}", there))
    proxy = f"/api/v1/namespaces/{SYSTEM}/services/{RELEASE}:http/proxy/metrics"
    texts.append(installed.kubectl("get", "--raw", proxy))
    folder = installed.download(f"s3://{BUCKET}/quickstart", tmp_path / "all")
    files = [path for path in folder.rglob("*") if path.is_file()]

    assert written_down(*texts, *(path.read_bytes() for path in files)) == []
    assert "btx_operator_reconciles_total" in texts[-1]
    assert "secretKeyRef" in objects or "secretRef" in objects
    assert sum(path.name == "manifest.json" for path in files) == len(STAGES)
    assert written_down(installed.kubectl("get", "secrets", "-A", "-o", "yaml"))


def decision(entry: dict[str, Any]) -> str:
    """Of the authorizer, in an entry of the audit log."""
    return str(entry["annotations"]["authorization.k8s.io/decision"])
