"""The parent of several ranks: what it starts, how it ends, and that nothing survives it."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from attempts import attempt, outcome
from btx_api.artifact import log_key
from btx_api.spec import Scheduling, Storage
from btx_api.stage import Exit, Gc, Kind, Task, TaskExecution
from btx_trainer import launch
from btx_trainer.errors import ConfigurationError
from btx_trainer.launch import Crew, RankError, crew_of
from training import Studio, train_recipe
from workspace import MARK, Workspace

RANK = """
import json, os, pathlib, signal, sys
from btx_api.stage import Problem, Result, Task
place = json.loads(os.environ["BTX_RANK"])
plan = json.loads(sys.argv[1])[place["local"]]
task = Task.model_validate_json(pathlib.Path(os.environ["BTX_TASK"][1:]).read_text())
signal.signal(signal.SIGTERM, signal.SIG_IGN if plan.get("deaf") else lambda *_: os._exit(75))
said = Result(problem=Problem(message=plan["says"])) if "says" in plan else None
if said:
    pathlib.Path(task.execution.result).write_text(said.line())
if plan.get("held"):
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    sys.exit(0 if signal.SIGTERM in held else 1)
if plan.get("ready"):
    pathlib.Path(plan["ready"]).touch()
if "signal" in plan:
    os.kill(os.getpid(), plan["signal"])
while plan.get("waits"):
    signal.sigwait({signal.SIGUSR1}) if plan.get("deaf") else (
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]), signal.pause())
sys.exit(plan.get("exit", 0))
"""
"""A rank that does what it is told."""


def ended(*plans: dict[str, object], stopping: bool = False) -> RankError | None:
    """How a crew of scripted ranks ended; none of its processes is left."""
    storage = Storage(uri="file:///nowhere")
    scheduling = Scheduling(termination_grace_period_seconds=5)
    task = Task(gc=Gc(keep_days=1), execution=TaskExecution(storage=storage, scheduling=scheduling))
    command, before = [sys.executable, "-c", RANK, json.dumps(plans)], children()
    try:
        launch.run(task, Crew(processes=len(plans)), lambda: stopping, command)
    except RankError as error:
        return error
    finally:
        assert children() == before
    return None


def children() -> set[str]:
    """Processes that this one has started and not waited for; the session's server may be one."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it may have ended since
            parent = path.read_text().rpartition(")")[2].split()[1]
            found |= {path.parent.name} if parent == str(os.getpid()) else set()
    return found


# Which code, and whose words.


@pytest.mark.parametrize(
    ("codes", "gravest"),
    [
        ((75, 75, 75), 75), ((0, 75, 0), 75), ((1, 75, 1), 1), ((70, 1, 75), 70),
        ((1, 65, 70), 65), ((78, 65, 1), 78), ((66, 70, 0), 66), ((3, 75, 0), 1),
    ],
)  # fmt: skip
def test_the_gravest_code_of_the_ranks_counts(codes: tuple[int, ...], gravest: int) -> None:
    """Configuration before corrupt, missing, stalled, failed, preempted; unknown ones are failed."""
    error = ended(*({"exit": code, "says": f"rank with {code}"} for code in codes))
    assert error
    assert error.exit == gravest
    first = next(code for code in codes if code == gravest or code not in list(Exit))
    assert error.problem.message == f"rank with {first}"


def test_the_rank_that_a_signal_ended_is_the_cause() -> None:
    """The other only says that it lost it."""
    error = ended({"exit": 1, "says": "connection closed by peer"}, {"signal": signal.SIGKILL})
    assert error
    assert (error.exit, error.problem.message) == (1, "rank 1 was ended by signal 9")


def test_when_a_rank_fails_the_others_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even those that never look: by SIGKILL, once they have had time to say why."""
    monkeypatch.setattr(launch, "LAST_WORDS", 0.5)
    error = ended({"waits": True, "deaf": True}, {"exit": 78, "says": "bad recipe"}, {"waits": 1})
    assert error
    assert (error.exit, error.problem.message) == (78, "bad recipe")


def test_a_rank_that_does_not_stop_is_killed_within_the_grace_period(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SIGTERM goes to all; who is deaf does not see the end of the grace period."""
    monkeypatch.setattr(launch, "GRACE_USED", 0.5)
    error = ended({"waits": True}, {"waits": True, "deaf": True}, stopping=True)
    assert error
    assert (error.exit, error.problem.message) == (1, "rank 1 did not end and was killed")


def test_ranks_that_stop_are_preempted() -> None:
    """All heard SIGTERM, which could not reach them before they listened."""
    error = ended({"waits": True}, {"waits": True}, stopping=True)
    assert error and error.exit == Exit.PREEMPTED
    assert ended({"held": True}, {"held": True}) is None


# How many, and where.


def test_one_rank_per_gpu_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only kinds that train run on several ranks; several nodes tell of themselves."""
    assert crew_of(Kind.TRAIN, Scheduling()).world == 1
    assert crew_of(Kind.TRAIN, Scheduling(gpus=8)).world == 8
    assert crew_of(Kind.FINETUNE, Scheduling(gpus=8, processes=2)).world == 2
    assert crew_of(Kind.EVALUATE, Scheduling(gpus=8, processes=2)).world == 1
    two = Scheduling(nodes=2, gpus=4)
    with pytest.raises(ConfigurationError, match="NNODES: is not set"):
        crew_of(Kind.TRAIN, two)
    node = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    for name, value in node.items():
        monkeypatch.setenv(name, value)
    places = crew_of(Kind.TRAIN, two).places(Path("/scratch"))
    assert [(place.rank, place.local, place.world) for place in places] == [
        (4, 0, 8), (5, 1, 8), (6, 2, 8), (7, 3, 8),
    ]  # fmt: skip
    assert {place.meeting for place in places} == {"tcp://first:29500"}


# Real ranks.


STEPS = 40


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(tmp_path_factory.mktemp("studio"))


def test_ranks_that_are_stopped_and_killed_end_in_the_same_bits(
    studio: Studio, tmp_path: Path
) -> None:
    """SIGTERM to the parent, SIGKILL to a rank, SIGKILL to the parent: nobody survives any."""
    how = {"processes": 2, "threads": 1, "checkpoint_seconds": 1}
    whole, broken = (studio.task(train_recipe(STEPS), ["seed", "letters"], **how) for _ in "ab")
    mark = {MARK: str(tmp_path), "OMP_NUM_THREADS": "1"}
    space = Workspace(tmp_path)
    with attempt(studio, broken, **mark) as parent:
        while len(started := ranks(space)) < 2:
            with pytest.raises(subprocess.TimeoutExpired):
                parent.process.wait(0.05)
        watched = [os.pidfd_open(pid) for pid in started]
        parent.process.kill()
        for pidfd in watched:
            # Readable once its process has ended.
            select.select([pidfd], [], [])
            os.close(pidfd)
    assert space.survivors() == []
    with attempt(studio, broken, **mark) as parent:
        parent.reaches(5)
        assert len(ranks(space)) == 2
        parent.process.terminate()
        result = parent.ends(Exit.PREEMPTED)
        assert result.problem and "asked to stop after step" in result.problem.message
    assert space.survivors() == []
    with attempt(studio, broken, **mark) as parent:
        parent.reaches(12)
        os.kill(ranks(space)[1], signal.SIGKILL)
        result = parent.ends(Exit.FAILED)
        assert result.problem and result.problem.message == "rank 1 was ended by signal 9"
    assert space.survivors() == []
    with attempt(studio, broken, **mark) as parent:
        assert parent.ends(Exit.OK).resumed_step >= 5
    with attempt(studio, whole, **mark) as parent:
        assert parent.ends(Exit.OK).resumed_step == 0
    found, expected = outcome(studio, broken), outcome(studio, whole)
    assert [name for name, data in expected[0].items() if found[0][name] != data] == []
    assert found == expected
    assert space.survivors() == []
    stage = whole.stage
    assert stage
    text = studio.store.read(log_key(stage.kind, stage.digest, "test", 1)).decode()
    assert f"step {STEPS}/{STEPS}" in text


def ranks(space: Workspace) -> list[int]:
    """Processes of the ranks, the first first."""
    found = {}
    for pid in space.processes():
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        place = next((v[9:] for v in environment if v.startswith("BTX_RANK=")), None)
        if place:
            found[json.loads(place)["rank"]] = pid
    return [pid for _, pid in sorted(found.items())]


def test_two_nodes_meet_and_make_one_artifact(studio: Studio) -> None:
    """A parent per node, one rank each: node 0 commits, and its Result is the stage's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    task = studio.task(train_recipe(3), ["seed", "letters"], nodes=2, threads=1)
    node = {
        "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with (
        attempt(studio, task, NODE_RANK="1", **node) as second,
        attempt(studio, task, NODE_RANK="0", **node) as first,
    ):
        result = first.ends(Exit.OK)
        second.ends(Exit.OK)
    files, metrics = outcome(studio, task)
    assert result.metrics == metrics
    assert "model.safetensors" in files
