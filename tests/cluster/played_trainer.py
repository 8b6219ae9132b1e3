"""What the trainer would leave, for pods that a hollow node plays: Results, and a ledger of commits.

The ledger is the oracle of "no stage ran twice": one JSON line for each artifact that a pod committed,
written by the player and by nobody else.
"""

import json
import time
from pathlib import Path
from typing import Any

from btx_api.names import TASK_ENV
from btx_api.stage import Exit, Result, Task
from simulator import Storage


def task_of(pod: dict[str, Any]) -> Task | None:
    """The task of a trainer's pod; None when it is another pod."""
    env = pod["spec"]["containers"][0].get("env", [])
    text = next((e["value"] for e in env if e["name"] == TASK_ENV), None)
    return None if text is None else Task.model_validate_json(text)


class PlayedTrainer:
    """Storages by URI, in memory; every commit also goes to a file."""

    def __init__(self, ledger: Path) -> None:
        self._ledger = ledger
        self._storages: dict[str, Storage] = {}

    def end(self, pod: dict[str, Any], task: Task) -> tuple[int, str]:
        """Exit code and termination message of a pod whose work is done."""
        storage = self._storages.setdefault(task.execution.storage.uri, Storage())
        stage = task.stage
        if task.execution.must_exist and stage and stage.digest not in storage.complete:
            return Exit.MISSING, Result().line()
        result = storage.run(task)
        if stage is not None and not result.reused:
            meta = pod["metadata"]
            line = {
                "namespace": meta["namespace"], "run": task.execution.run, "pod": meta["name"],
                "stage": task.execution.name, "digest": stage.digest, "time": time.time(),
                "storage": task.execution.storage.uri,
            }  # fmt: skip
            with self._ledger.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return Exit.OK, result.line()


def commits(ledger: Path) -> list[dict[str, Any]]:
    """Every commit so far, oldest first."""
    return [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
