"""A run of one expert that something happens to, and what the node has of it."""

import contextlib
import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import yaml
from cluster.images import ROOT
from cluster.installation import Installation

SEEDS = itertools.count(100)
LONG = 409_600
"""Tokens of an expert that trains for about a minute: 200 steps."""
TRAIN = "train-code"
INDEX = "batch.kubernetes.io/job-completion-index"


class Case:
    """One namespace with one run of one trained expert."""

    def __init__(self, installed: Installation, *, tokens: int = 32_768) -> None:
        self.installed, self.namespace = installed, installed.namespace()
        text = (ROOT / "examples/quickstart-cluster.yaml").read_text()
        self.body: dict[str, Any] = yaml.safe_load(text)
        self.body["metadata"]["name"] = "case"
        spec = self.spec = self.body["spec"]
        spec["storage"]["uri"] = "s3://btx/accidents"
        spec["experts"] = spec["experts"][:1]
        spec["experts"][0]["tokens"] = tokens
        spec["train"]["randomSeed"] = next(SEEDS)
        spec["finetune"] |= {"data": [{"tokens": 4096, "domains": {"code": 1}}]}
        spec["finetune"]["routing"]["init"] = "Keep"  # the other one needs two domains
        spec["policy"] = {"maxRetries": 1, "backoffSeconds": 1}
        spec["execution"]["train"]["checkpointSeconds"] = 5
        del spec["general"]

    def apply(self) -> None:
        """Creates the run, or changes it to what `spec` says now."""
        self.installed.apply(self.namespace, self.body)

    def until(self, wanted: Any, seconds: int = 300) -> dict[str, Any]:
        """The run as soon as it is as wanted."""
        return self.installed.until(self.namespace, "case", wanted, seconds)

    def trained(self, seconds: int = 600) -> dict[str, Any]:
        """The row of the expert when it has ended, well or not."""
        item = self.until(lambda i: row(i).get("state") in ("Complete", "Failed"), seconds)
        return row(item)

    def training(self, step: int = 8) -> dict[str, Any]:
        """The expert's pod once it has done some steps."""
        self.until(lambda i: row(i).get("state") == "Running")
        deadline = time.monotonic() + 120
        while True:
            # Of several nodes only the first one tells of steps.
            pod = [p for p in self.pods(TRAIN) if p["metadata"]["labels"].get(INDEX, "0") == "0"][
                -1
            ]
            log = self.kubectl("logs", pod["metadata"]["name"])
            steps = [int(n) for n in re.findall(r"training step (\d+)/", log)]
            if steps and steps[-1] >= step:
                return pod
            assert time.monotonic() < deadline, self.installed.story(self.namespace)
            time.sleep(0.5)

    def pods(self, stage: str) -> list[dict[str, Any]]:
        """Of a stage, oldest first."""
        text = self.kubectl("get", "pods", f"-lbtx.dev/stage={stage}", "-o", "json")
        found: list[dict[str, Any]] = json.loads(text)["items"]
        return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def jobs(self, stage: str) -> list[str]:
        """Names of a stage's Jobs."""
        return self.kubectl("get", "jobs", f"-lbtx.dev/stage={stage}", "-o", "name").split()

    def events(self, reason: str) -> list[str]:
        """Messages of the run's events with a reason; they are posted a moment later."""
        time.sleep(3)
        items = json.loads(self.kubectl("get", "events", "-o", "json"))["items"]
        return [e["message"] for e in items if e["reason"] == reason]

    def kubectl(self, *words: str) -> str:
        """In the namespace."""
        return self.installed.kubectl(*words, f"--namespace={self.namespace}")


def row(item: dict[str, Any], stage: str = TRAIN) -> dict[str, Any]:
    """A row of a run's status; empty before there is one."""
    rows = item.get("status", {}).get("stages", ())
    return next((dict(r) for r in rows if r["name"] == stage), {})


def counts(found: dict[str, Any]) -> tuple[Any, ...]:
    """State, attempts, failures, preemptions, lost."""
    numbers = (found.get(key, 0) for key in ("attempt", "failures", "preemptions", "lost"))
    return (found["state"], *numbers)


def processes(pod: dict[str, Any]) -> list[int]:
    """Ids on this machine of a pod's Python processes, the trainer first."""
    uid, found = pod["metadata"]["uid"], []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mine = uid in (process / "cgroup").read_text()
            if mine and b"btx_trainer" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return sorted(found)
