"""Real train and finetune processes on a real S3 server, killed anywhere, end in the same bits.

A proxy sees what a process sends, so that a kill can be aimed: in the middle of an upload, before
and after the commit. `TRIALS=all`: 20 points for each stage and signal.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from btx_api.artifact import checkpoints_folder, manifest_key
from btx_api.names import TASK_ENV, stage_folder
from btx_api.spec import Routing, Storage
from btx_api.stage import Exit, Progress, Result, Task
from btx_trainer.artifacts import find
from btx_trainer.storage import open_store
from builders import trials
from fault_proxy import Cut, Proxy, Request, faulty
from s3_server import BUCKET
from training import Studio, finetune_recipe, train_recipe

STEPS = {"train": 500, "finetune": 90}
PLACES = ("step", "commit", "checkpoint", "upload", "start")
LIFE = ("start", "checkpoint", "step", "upload", "commit")
"""The same in the order in which a stage comes by."""


@pytest.fixture(scope="module")
def proxy(s3_endpoint: str) -> Iterator[Proxy]:
    """In front of the S3 server; it breaks nothing but what it is told to."""
    with faulty(s3_endpoint) as running:
        yield running


@pytest.fixture(scope="module")
def studio(proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """One storage for all processes, behind the proxy."""
    storage = Storage(
        uri=f"s3://{BUCKET}/kills", endpoint=proxy.endpoint, region="us-east-1", path_style=True
    )
    return Studio(tmp_path_factory.mktemp("studio"), storage)


def task_of(studio: Studio, kind: str) -> Task:
    """A fresh task that takes some seconds and saves every second."""
    how = {"threads": 1, "checkpoint_seconds": 1, "dead_expert_steps": 3}
    if kind == "train":
        return studio.task(train_recipe(STEPS[kind]), ["seed", "letters"], **how)
    routing = Routing(init="DomainMean")
    recipe = finetune_recipe(STEPS[kind], routing=routing, experts=(1, 2, 0, 0))
    return studio.task(recipe, ["mixed", "letters", "sums"], micro_batch=5, **how)


class Attempt:
    """One process of the trainer."""

    def __init__(self, studio: Studio, task: Task) -> None:
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
                env={**os.environ, TASK_ENV: task.model_dump_json(exclude_defaults=True)},
            )  # fmt: skip

    def reaches(self, step: int) -> None:
        """Returns at or soon after this step, or at its end."""
        while self.process.poll() is None:
            progress = self._progress()
            if progress and progress.phase == "training" and progress.step >= step:
                return
            time.sleep(0.02)

    def _progress(self) -> Progress | None:
        try:
            with urlopen(f"http://{self.address}/progress", timeout=10) as answer:
                return Progress.parse(json.load(answer))
        except (URLError, ConnectionError):
            return None

    def ends(self, *codes: int) -> Result:
        """Its result."""
        assert self.process.wait(600) in codes, self.log.read_text()
        text = self.result.read_text() if self.result.exists() else "{}"
        return Result.parse(json.loads(text))


@contextmanager
def attempt(studio: Studio, task: Task) -> Iterator[Attempt]:
    """A process that does not outlive the test."""
    started = Attempt(studio, task)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()


Outcome = tuple[dict[str, str], dict[str, float]]


def outcome(studio: Studio, task: Task) -> Outcome:
    """CRC32C of each file, and the metrics, of a committed stage whose bytes are all right."""
    stage = task.stage
    assert stage
    found = find(studio.store, stage.kind, stage.digest)
    assert found
    found.verify()
    return {entry.name: entry.crc32c for entry in found.manifest.files}, found.manifest.metrics


class Interrupter:
    """Sends one signal to one process at one point of its life."""

    def __init__(self, proxy: Proxy, number: signal.Signals, draw: random.Random) -> None:
        self._proxy, self._number, self._draw = proxy, number, draw
        self.hits: Counter[str] = Counter()

    def once(self, studio: Studio, task: Task, place: str) -> bool:
        """One attempt, interrupted at a random point of this place; whether it ended all the same."""
        kind, digest = task.stage.kind, task.stage.digest
        with self._armed(place, kind, digest) as armed, attempt(studio, task) as process:
            armed.append(process)
            if place == "start":
                with pytest.raises(subprocess.TimeoutExpired):
                    process.process.wait(self._draw.uniform(0.05, 4))
                process.process.send_signal(self._number)
            elif place == "step":
                process.reaches(self._draw.randrange(STEPS[kind]))
                process.process.send_signal(self._number)
            ends = (-9,) if self._number == signal.SIGKILL else (-15, Exit.PREEMPTED)
            process.ends(*ends, Exit.OK)
            code = process.process.returncode
        self.hits[place] += code in ends or len(armed) > 1
        return code == Exit.OK

    @contextmanager
    def _armed(self, place: str, kind: str, digest: str) -> Iterator[list[object]]:
        """The proxy fires at the n-th write of this place; the yielded list gets the process."""
        armed: list[object] = []
        part = {
            "checkpoint": checkpoints_folder(kind, digest),
            "upload": f"{stage_folder(kind, digest)}/attempts",
            "commit": manifest_key(kind, digest),
        }.get(place)
        left, lock = self._draw.randint(1, 1 if place == "commit" else 3), threading.Lock()

        def fire(request: Request) -> None:
            nonlocal left
            if part is None or request.method == "GET" or part not in request.path:
                return
            if request.method in ("HEAD", "DELETE") or not armed:
                return
            with lock:
                left -= 1
                if left:
                    return
            process = armed[0]
            assert isinstance(process, Attempt)
            armed.append("fired")
            process.process.send_signal(self._number)
            if self._number == signal.SIGKILL:
                process.process.wait()
                raise Cut

        before: Callable[[Request], None] | None = fire
        after: Callable[[Request], None] | None = None
        if self._draw.random() < 0.5:
            before, after = after, before
        self._proxy.watch(before, after)
        try:
            yield armed
        finally:
            self._proxy.watch()


@pytest.fixture(scope="module")
def alone(studio: Studio) -> dict[str, Outcome]:
    """What each stage ends in when nobody interrupts it."""
    found = {}
    for kind in STEPS:
        task = task_of(studio, kind)
        with attempt(studio, task) as process:
            assert process.ends(Exit.OK).resumed_step == 0
        found[kind] = outcome(studio, task)
    return found


COMBINATIONS = [(kind, number) for kind in STEPS for number in (signal.SIGKILL, signal.SIGTERM)]


@pytest.mark.parametrize(
    ("kind", "number"), COMBINATIONS, ids=lambda value: getattr(value, "name", value)
)
def test_an_interrupted_stage_ends_in_the_same_bits(
    studio: Studio,
    proxy: Proxy,
    alone: dict[str, Outcome],
    kind: str,
    number: signal.Signals,
) -> None:
    """Files and metrics are those of a run left alone; nothing but the artifact is left."""
    first = 2 * COMBINATIONS.index((kind, number))
    points = [PLACES[(first + i) % len(PLACES)] for i in range(trials(20, few=2))]
    interrupter = Interrupter(proxy, number, random.Random(f"{kind} {number}"))
    task = task_of(studio, kind)
    for start in range(0, len(points), len(LIFE)):
        for place in sorted(points[start : start + len(LIFE)], key=LIFE.index):
            if interrupter.once(studio, task, place):
                # Asked to stop after its last step a stage ends: the next point needs another.
                settle(studio, task, alone[kind])
                task = task_of(studio, kind)
        settle(studio, task, alone[kind])
        task = task_of(studio, kind)
    print(f"{kind} {number.name}: {dict(interrupter.hits)} of {dict(Counter(points))}")
    assert sum(interrupter.hits.values()) >= len(points) * 9 // 10


def settle(studio: Studio, task: Task, alone: Outcome) -> None:
    """The next attempt ends the stage; what it is, and that no checkpoint is left."""
    with attempt(studio, task) as process:
        process.ends(Exit.OK)
    assert outcome(studio, task) == alone
    assert task.stage
    folder = checkpoints_folder(task.stage.kind, task.stage.digest)
    assert list(open_store(studio.storage).list(folder)) == []
