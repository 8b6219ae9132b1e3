"""What the trainer would leave, for pods that a hollow node plays: Results, commits, and a ledger.

The ledger has one JSON line for each artifact that a pod committed, written by the player and by nobody
else. A storage with an endpoint is a real one: there the trainer's own code looks for the artifact and
commits it, and what the storage holds is an oracle of "no stage ran twice" too.
"""

import json
import threading
import time
from pathlib import Path
from typing import Any

from btx_api.artifact import Maker
from btx_api.names import TASK_ENV
from btx_api.stage import Exit, Result, Task
from btx_trainer.artifacts import Artifact, Attempt, find
from btx_trainer.storage import Store, open_store
from simulator import Storage


def task_of(pod: dict[str, Any]) -> Task | None:
    """The task of a trainer's pod; None when it is another pod."""
    env = pod["spec"]["containers"][0].get("env", [])
    text = next((e["value"] for e in env if e["name"] == TASK_ENV), None)
    return None if text is None else Task.model_validate_json(text)


class PlayedTrainer:
    """Storages by URI, in memory and, with an endpoint, there; every commit also goes to a file."""

    def __init__(self, ledger: Path) -> None:
        self._ledger = ledger
        self._storages: dict[str, Storage] = {}
        self._stores: dict[str, Store] = {}
        self._lock = threading.Lock()

    def end(self, pod: dict[str, Any], task: Task) -> tuple[int, str]:
        """Exit code and termination message of a pod whose work is done."""
        storage = self._storages.setdefault(task.execution.storage.uri, Storage())
        stage = task.stage
        if task.execution.must_exist and stage and stage.digest not in storage.complete:
            return Exit.MISSING, Result().line()
        with self._lock:
            result = storage.run(task)
        if stage is not None and task.execution.storage.endpoint:
            made, reused = self._commit(task, pod, result)
            storage.complete[stage.digest] = made.tag
            result = result.model_copy(
                update={"token": made.token, "tag": made.tag, "reused": reused}
            )
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

    def _commit(self, task: Task, pod: dict[str, Any], result: Result) -> tuple[Artifact, bool]:
        """The artifact, and whether it was there."""
        stage, execution = task.stage, task.execution
        assert stage is not None
        if (store := self._stores.get(execution.storage.uri)) is None:
            store = self._stores[execution.storage.uri] = open_store(execution.storage)
        found = find(store, stage.kind, stage.digest, ignoring=execution.replaces)
        if found is not None:
            return found, True
        attempt = Attempt(store, stage, replaces=execution.replaces)
        attempt.put("pod", pod["metadata"]["name"].encode())
        maker = Maker(run=execution.run, attempt=execution.attempt)
        made = attempt.commit(metrics=result.metrics, deviations=(), maker=maker, parents=())
        return made, made.token != attempt.token


def commits(ledger: Path) -> list[dict[str, Any]]:
    """Every commit so far, oldest first."""
    return [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
