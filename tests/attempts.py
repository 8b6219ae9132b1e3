"""Trainer processes on the tasks of a Studio: started, followed by their progress, ended."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from btx_api.artifact import Manifest, manifest_key
from btx_api.names import TASK_ENV
from btx_api.stage import Progress, Result, Task
from training import Studio


class Attempt:
    """One process of the trainer."""

    def __init__(self, studio: Studio, task: Task, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        folder = Path(tempfile.mkdtemp(dir=studio.folder))
        self.result, self.log = folder / "result.json", folder / "log.txt"
        place = {"listen": self.address, "result": str(self.result)}
        task = task.model_copy(update={"execution": task.execution.model_copy(update=place)})
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "btx_trainer"], stdout=log, stderr=log,
                env={
                    **os.environ, **environment,
                    TASK_ENV: task.model_dump_json(exclude_defaults=True),
                },
            )  # fmt: skip

    def reaches(self, step: int) -> Progress:
        """Its progress at or soon after this step; fails if it ends before."""
        while True:
            progress = self._progress()
            if progress and progress.phase == "training" and progress.step >= step:
                return progress
            with pytest.raises(subprocess.TimeoutExpired):
                self.process.wait(0.05)

    def _progress(self) -> Progress | None:
        try:
            with urlopen(f"http://{self.address}/progress", timeout=10) as answer:
                return Progress.parse(json.load(answer))
        except URLError:
            return None

    def ends(self, code: int) -> Result:
        """Its result."""
        assert self.process.wait(600) == code, self.log.read_text()
        return Result.parse(json.loads(self.result.read_text()))


@contextmanager
def attempt(studio: Studio, task: Task, **environment: str) -> Iterator[Attempt]:
    """A process that does not outlive the test."""
    started = Attempt(studio, task, **environment)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()


def outcome(studio: Studio, task: Task) -> tuple[dict[str, bytes], dict[str, float]]:
    """Files and metrics of a committed stage."""
    stage = task.stage
    assert stage
    key = manifest_key(stage.kind, stage.digest)
    manifest = Manifest.parse(json.loads(studio.store.read(key)))
    folder = Path(key).parent / "attempts" / manifest.token
    files = {entry.name: studio.store.read(f"{folder}/{entry.name}") for entry in manifest.files}
    return files, manifest.metrics
