"""Attempts that a trainer with loaded libraries forks: like those that Popen starts, but sooner."""

import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from btx_api.names import TASK_ENV
from btx_api.stage import Exit, Task
from btx_operator import fork_server
from btx_operator.fork_server import Forked, ForkServer
from btx_operator.processes import Trainer, launch
from btx_trainer.artifacts import find
from training import Studio, train_recipe


def began() -> ForkServer:
    """One that has loaded everything."""
    server = ForkServer()
    news = server.begin()
    assert news is not None, "there is a GPU, or this is not Linux"
    while not server.ready:
        assert select.select([news], [], [], 120)[0]
        server.look()
        assert server.usable, "it has ended"
    return server


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """For all tests of this file but those that end theirs."""
    started = began()
    yield started
    started.close()


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    """A storage with a seed and two domains."""
    return Studio(tmp_path / "studio")


def waiting(server: ForkServer, folder: Path) -> Forked:
    """An attempt that waits for ever for its task."""
    os.mkfifo(folder / "task")
    with (folder / "log").open("ab") as log:
        changes = {TASK_ENV: f"@{folder}/task", "OMP_NUM_THREADS": "1"}
        forked = server.fork(changes, log.fileno())
    assert forked is not None
    return forked


def status(pid: int) -> dict[str, str]:
    """Of /proc, by name."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def ended(trainer: Trainer) -> int:
    """The exit code of an attempt, waited for as the engine does."""
    until = time.monotonic() + 300
    while trainer.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert trainer.exit is not None
    return trainer.exit


def named(task: Task, name: str) -> Task:
    """The attempt's files have this name."""
    return task.model_copy(update={"execution": task.execution.model_copy(update={"name": name})})


def words(trainer: Trainer) -> list[str]:
    """Of its log, without the numbers and times."""
    text = trainer.log.read_text().splitlines()
    return [word for line in text for word in line.split() if not any(map(str.isdigit, word))]


def test_it_has_one_thread(server: ForkServer) -> None:
    """A second one could hold a lock when it forks, and nobody in the attempt would let go."""
    assert server._process is not None
    assert status(server._process.pid)["Threads"] == "1"


def test_an_attempt_makes_what_a_process_of_its_own_makes(
    server: ForkServer, studio: Studio, tmp_path: Path
) -> None:
    """Equal bits on two threads, equal lines in the log."""
    made, said = [], []
    for name, by in (("forked", server), ("apart", None)):
        task = named(studio.task(train_recipe(8), ["seed", "letters"]), name)
        trainer = launch(task, folder=tmp_path, threads=2, server=by)
        assert isinstance(trainer.process, Forked) is (by is not None)

        assert ended(trainer) == Exit.OK, trainer.log.read_text()

        assert task.stage
        artifact = find(studio.store, task.stage.kind, task.stage.digest)
        assert artifact
        result = trainer.result()
        assert result and result.token == artifact.token
        made.append(
            ({f.name: f.crc32c for f in artifact.manifest.files}, artifact.manifest.metrics)
        )
        said.append([word.replace(name, "") for word in words(trainer)])
    assert made[0] == made[1]
    assert said[0] == said[1]


def test_a_failure_is_that_of_a_process_of_its_own(
    server: ForkServer, studio: Studio, tmp_path: Path
) -> None:
    """Exit code, Result, and what is printed."""
    missing = studio.task(train_recipe(), ["seed", "letters"])
    assert missing.stage
    wrong = missing.stage.model_copy(update={"version": 99})
    found = []
    for name, by in (("forked", server), ("apart", None)):
        task = named(missing.model_copy(update={"stage": wrong}), name)
        trainer = launch(task, folder=tmp_path, threads=1, server=by)
        code, result = ended(trainer), trainer.result()
        assert result and result.problem
        found.append((code, result.problem, words(trainer)))

    assert found[0] == found[1]
    assert found[0][0] == Exit.CONFIGURATION


def test_an_attempt_is_our_child_and_heads_its_group(server: ForkServer, tmp_path: Path) -> None:
    """So it is waited for, and killed with all that it started, as any other."""
    forked = waiting(server, tmp_path)

    assert status(forked.pid)["PPid"] == str(os.getpid())
    assert os.getpgid(forked.pid) == forked.pid

    os.killpg(forked.pid, signal.SIGKILL)
    assert forked.wait() == -signal.SIGKILL
    assert forked.wait() == -signal.SIGKILL, "told again"
    forked.terminate()  # of a process that is no more: nobody's


def test_an_attempt_outlives_the_server(tmp_path: Path) -> None:
    """And what is started after the server's end is a process of its own."""
    server = began()
    assert server._process is not None
    forked = waiting(server, tmp_path)

    server._process.kill()

    with (tmp_path / "log").open("ab") as log:
        assert server.fork({"OMP_NUM_THREADS": "1"}, log.fileno()) is None
    assert not server.usable
    assert server.begin() is None
    assert "State" in status(forked.pid)
    os.kill(forked.pid, signal.SIGTERM)
    # The trainer hears it and goes on reading its task; the second one ends it.
    until = time.monotonic() + 60
    while os.waitid(os.P_PID, forked.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        assert time.monotonic() < until
        time.sleep(0.05)
        os.kill(forked.pid, signal.SIGTERM)
    assert forked.wait() == -signal.SIGTERM


def test_an_attempt_that_nobody_wants_any_more_does_nothing(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has lost patience: it begins the attempt otherwise, and this one must not run."""
    lost = ForkServer()
    lost._channel, lost.ready = server._channel, True
    monkeypatch.setattr(fork_server, "ANSWER_SECONDS", 1e-6)
    monkeypatch.setattr(ForkServer, "close", lambda self: None)
    with (tmp_path / "log").open("ab") as log:
        assert lost.fork({TASK_ENV: "no task", "OMP_NUM_THREADS": "1"}, log.fileno()) is None
    monkeypatch.undo()

    os.killpg(waiting(server, tmp_path).pid, signal.SIGKILL)  # after it, in the server's order
    time.sleep(1)
    assert (tmp_path / "log").read_text() == ""


def test_a_server_that_cannot_load_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt, started by Popen, will say what is wrong."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.99')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = ForkServer()
    news = server.begin()
    assert news is not None

    assert select.select([news], [], [], 120)[0]
    server.look()

    assert not server.usable and not server.ready
    assert server.begin() is None


def test_where_there_is_a_gpu_there_is_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a driver knows of a process does not survive a fork."""
    monkeypatch.setattr(fork_server, "GPUS", (str(tmp_path),))

    server = ForkServer()

    assert not server.usable
    assert server.begin() is None
