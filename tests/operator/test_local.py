"""The local backend: folders, locks, cores, processes; and what is left when the engine is killed."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import stand_in
from btx_api.spec import BTXRunSpec
from btx_api.stage import Exit
from btx_api.status import ConditionType, Reason, State
from btx_operator.errors import LockedError, NotFoundError, UserError
from btx_operator.local import LocalBackend, annotate, exit_code, saved, saved_runs, settled
from btx_operator.processes import read_result
from builders import spec_of
from machine import Machine, wait_for
from simulator import problem

SUCCEEDED = ConditionType.SUCCEEDED


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """Real processes that end when the test says so."""
    found = Machine(tmp_path)
    yield found
    found.close()


def prepared(machine: Machine, spec: BTXRunSpec, run: str = "run") -> None:
    """Up to the moment when the experts train."""
    machine.submit(run, spec)
    machine.settle()
    machine.end("preflight", run=run)
    machine.settle()
    while stages := [stage for stage in running(machine, run) if stage.startswith("prepare-")]:
        machine.end(stages[0], run=run)
        machine.settle()


def running(machine: Machine, run: str = "run") -> list[str]:
    """Stages with a process, in the order of their starts."""
    return [c.start.name for c in machine._live(run) if c.trainer is not None]


def pids(machine: Machine) -> list[int]:
    """Of all processes that run."""
    return [c.trainer.process.pid for c in machine._live() if c.trainer is not None]


def alive(pid: int) -> bool:
    """Whether there is such a process that is not a zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def has_ended(watched: int) -> bool:
    """Of a process that is not ours, by its descriptor; waits for it."""
    try:
        return bool(select.select([watched], [], [], 60)[0])
    finally:
        os.close(watched)


# Folder and lock


def test_a_run_is_a_folder(machine: Machine) -> None:
    """What is written can be read without the lock, by name."""
    prepared(machine, spec_of())

    found = saved(machine.root, "run")

    assert saved_runs(machine.root) == ["run"]
    assert found.pid == os.getpid()
    assert found.spec == spec_of()
    assert found.status == machine.status("run")
    machine.close()
    assert saved(machine.root, "run").pid is None


def test_the_generation_rises_only_with_the_canonical_spec(tmp_path: Path) -> None:
    """A default that is written out, or `1.0` for `1`, is no edit; the uid is drawn once."""
    seen = []
    specs = [spec_of(), spec_of(policy={"maxRetries": 2}), spec_of(policy={"maxRetries": 3})]
    for spec in [*specs, specs[-1]]:
        backend = LocalBackend(tmp_path)
        backend.open("run", spec)
        found = saved(tmp_path, "run")
        seen.append((found.uid, found.generation))
        backend.close()

    assert [generation for _, generation in seen] == [1, 1, 2, 2]
    assert len({uid for uid, _ in seen}) == 1


def test_a_run_has_one_engine(machine: Machine) -> None:
    """The second one names the first, and leaves everything alone."""
    machine.submit("run", spec_of())
    before = saved(machine.root, "run")

    with pytest.raises(LockedError, match=f"process {os.getpid()} works on it"):
        LocalBackend(machine.root).open("run", spec_of(policy={"maxRetries": 7}))

    assert saved(machine.root, "run") == before


def test_an_unknown_run_is_named(tmp_path: Path) -> None:
    """By status, retry and refresh alike."""
    for ask in (saved, annotate):
        with pytest.raises(NotFoundError, match="run 'nobody': not found in"):
            ask(tmp_path, "nobody")


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """In one line; and the lock is free again."""
    backend = LocalBackend(tmp_path)
    backend.open("run", spec_of())
    backend.close()
    (tmp_path / "runs/run/status.json").write_text('{"stages": [{}]}')

    for _ in range(2):
        with pytest.raises(UserError, match=r"run 'run': .*/runs/run cannot be read") as caught:
            LocalBackend(tmp_path).open("run", spec_of())

    assert "\n" not in str(caught.value)


# Processes


def test_a_task_is_completed_by_the_backend(machine: Machine) -> None:
    """Where to listen and where to leave the Result; threads also in the environment."""
    machine.submit("run", spec_of())
    machine.settle()
    (pid,) = pids(machine)
    environment = dict(
        item.split("=", 1) for item in Path(f"/proc/{pid}/environ").read_text().split("\0") if item
    )
    task = json.loads(Path(environment["BTX_TASK"][1:]).read_text())

    assert task["execution"]["listen"].startswith("127.0.0.1:")
    assert Path(task["execution"]["result"]).is_absolute()
    threads = str(machine.slots)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT", "MKL_CBWR")
    assert [environment[name] for name in names] == [threads, threads, "1000", "AVX2"]
    assert os.getpgid(pid) == pid
    machine.end("preflight")
    assert "waiting for run.preflight-1" in machine.log("run", "preflight", 1).read_text()


@pytest.mark.parametrize(
    ("explicit", "slots", "expected"),
    [
        ({}, 2, [("train-a", 1), ("train-b", 1)]),
        ({}, 3, [("train-a", 1), ("train-b", 1), ("train-c", 1)]),
        ({"threads": 2}, 3, [("train-a", 2)]),
        ({"threads": 2}, 4, [("train-a", 2), ("train-b", 2)]),
        ({"threads": 9}, 2, [("train-a", 9)]),
        ({"processes": 2}, 4, [("train-a", 1), ("train-b", 1)]),
        ({"processes": 2, "threads": 2, "gpus": 8}, 7, [("train-a", 2)]),
    ],
)
def test_attempts_share_the_cores(
    tmp_path: Path, explicit: dict[str, int], slots: int, expected: list[tuple[str, int]]
) -> None:
    """One thread each, as many as there are cores, in spec order; more only where asked for.

    Every process of a stage has its threads.
    """
    machine = Machine(tmp_path, slots=slots)
    experts = [{"name": n, "tokens": 10, "data": [{"uri": f"file://{n}"}]} for n in "abc"]
    prepared(machine, spec_of(experts=experts, execution={"train": explicit}))

    children = [c for c in machine._live() if c.trainer is not None]
    tasks = [c.trainer.result_file.with_suffix(".task.json") for c in children if c.trainer]
    threads = [json.loads(t.read_text())["execution"]["scheduling"]["threads"] for t in tasks]
    assert list(zip(running(machine), threads, strict=True)) == expected
    asked = [json.loads(t.read_text())["execution"]["scheduling"]["processes"] for t in tasks]
    assert set(asked) == {explicit.get("processes", 1)}, "GPUs are a cluster's"
    assert all(machine.row(f"train-{n}").state in (State.STARTING, State.RUNNING) for n in "abc")
    machine.close()


def test_a_lone_attempt_gets_all_cores(tmp_path: Path) -> None:
    """As finetune does, after the experts had one each."""
    machine = Machine(tmp_path, slots=4)
    prepared(machine, spec_of())
    for stage in ("train-code", "train-math", "average", "mix"):
        machine.end(stage)
        machine.settle()

    (child,) = machine._live()
    assert (child.start.name, child.threads) == ("finetune", 4)
    machine.close()


def test_runs_share_cores_and_artifacts(tmp_path: Path) -> None:
    """Two manifests over one storage: what they have in common is made once."""
    machine = Machine(tmp_path)
    machine.submit("btx", spec_of())
    machine.submit("dense", spec_of(method="Dense"))
    machine.settle()
    machine.end("preflight", run="btx")
    machine.end("preflight", run="dense")
    machine.settle()
    assert running(machine, "dense") == []
    for run, stages in {
        "btx": ["prepare-code", "prepare-math", "prepare-general", "train-code", "train-math",
                "average", "mix", "finetune", "evaluate"],
        "dense": ["train-dense", "evaluate"],
    }.items():  # fmt: skip
        for stage in stages:
            machine.end(stage, run=run)
            machine.settle()

    for run in ("btx", "dense"):
        assert machine.status(run).condition(SUCCEEDED).status == "True"
        assert settled(machine.status(run)) and exit_code(machine.status(run)) == 0
    assert machine.row("prepare-code", "dense").attempt == 0
    machine.close()


def test_a_failed_process_leaves_its_words(machine: Machine) -> None:
    """Message and exit code in the row, the whole problem and the log beside it."""
    prepared(machine, spec_of())
    said = problem("x" * 300, "train.batchTokens")

    machine.end("train-code", Exit.CONFIGURATION, result=said)
    machine.settle()

    row = machine.row("train-code")
    assert row.message.startswith("exit 78: train.batchTokens: xxx")
    assert machine.problem("run", "train-code", 1) == said.problem
    assert exit_code(machine.status("run")) == Exit.CONFIGURATION
    assert settled(machine.status("run"))


def test_what_a_process_started_goes_with_it(machine: Machine) -> None:
    """Its whole group, even when it ended well itself."""
    machine.command = (
        sys.executable, "-S", "-c",
        "import subprocess, sys; print(subprocess.Popen(['sleep', '1000']).pid, flush=True)",
    )  # fmt: skip
    machine.submit("run", spec_of())
    asyncio.run(machine._step())
    (pid,) = pids(machine)
    wait_for(pid)
    grandchild = os.pidfd_open(int(machine.log("run", "preflight", 1).read_text()))

    machine._reap()

    assert has_ended(grandchild)


def test_a_process_that_ignores_sigterm_is_killed_after_its_grace_period(tmp_path: Path) -> None:
    """terminationGracePeriodSeconds, then SIGKILL for the group."""
    machine = Machine(tmp_path)
    grace = {"train": {"terminationGracePeriodSeconds": 30}}
    prepared(machine, spec_of(execution=grace), run="deaf")
    before, pipes = pids(machine), machine.listening("deaf")
    machine.submit("deaf", spec_of(execution=grace, suspend=True))
    asyncio.run(machine._step())
    machine.advance(29)
    asyncio.run(machine._step())
    assert pids(machine) == before
    machine.advance(1)
    asyncio.run(machine._step())
    for pid in before:
        wait_for(pid)
    machine.settle()

    assert pids(machine) == []
    for pipe in pipes:
        os.close(pipe)
    assert machine.row("train-code", "deaf").failures == 0
    assert machine.status("deaf").condition(ConditionType.SUSPENDED).reason is Reason.SUSPENDED
    machine.close()


# A killed engine


def test_results_survive_the_engine(tmp_path: Path) -> None:
    """An attempt that had left its Result is complete; one that had not was lost."""
    first = Machine(tmp_path)
    prepared(first, spec_of())
    first.settle()
    assert first.row("train-code").handle
    first.end("train-code")
    # As after SIGKILL: nothing more is written, the lock is free, the processes are gone.
    first.close()
    second = LocalBackend(tmp_path, clock=lambda: first.now)
    second.open("run", spec_of())

    (attempt,) = second.observe("run").attempts

    assert (attempt.stage, attempt.number, attempt.exit) == ("train-code", 1, Exit.OK)
    assert attempt.result is not None and attempt.result.digest == attempt.digest
    second.close()


def test_lost_attempts_are_resumed(tmp_path: Path) -> None:
    """By the next number, counted apart; nothing is prepared again."""
    first = Machine(tmp_path)
    prepared(first, spec_of())
    first.settle()
    first.close()

    second = Machine.after(first)
    second.submit("run", spec_of())
    second.settle()
    second.end("preflight")
    second.settle()

    assert sorted(running(second)) == ["train-code", "train-math"]
    row = second.row("train-code")
    assert (row.attempt, row.lost, row.failures) == (2, 1, 0)
    assert second.row("prepare-code").attempt == 1
    second.close()


ENGINE = """
import asyncio, json, os, sys
from pathlib import Path
sys.path[:0] = {path!r}
from btx_api.spec import BTXRunSpec
from btx_operator.local import LocalBackend
from builders import spec_of
root = Path({root!r})
backend = LocalBackend(root, command=(sys.executable, "-S", {stand_in!r}, {root!r}))
backend.open({name!r}, spec_of())
loop = asyncio.new_event_loop()
import signal
loop.add_signal_handler(signal.SIGINT, backend.interrupt)
def tick():
    pids = [c.trainer.process.pid for c in backend._live() if c.trainer]
    print(json.dumps(pids), flush=True)
loop.run_until_complete(backend.run_until_done(tick=tick))
backend.close()
"""


def an_engine(tmp_path: Path, name: str = "run") -> tuple[subprocess.Popen[str], int]:
    """An engine in a process of its own, and the process of its preflight."""
    script = ENGINE.format(path=sys.path, root=str(tmp_path), stand_in=stand_in.__file__, name=name)
    engine = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    pids = json.loads(engine.stdout.readline())
    while not pids:
        pids = json.loads(engine.stdout.readline())
    log = tmp_path / f"runs/{name}/logs/preflight-1.log"
    while not (log.exists() and log.read_text()):
        engine.stdout.readline()
    return engine, pids[0]


def test_a_killed_engine_leaves_no_process(tmp_path: Path) -> None:
    """SIGKILL cannot be handled, so the children ask the kernel to die with it."""
    engine, pid = an_engine(tmp_path)
    watched = os.pidfd_open(pid)

    engine.kill()
    engine.communicate()

    assert has_ended(watched)
    assert saved(tmp_path, "run").pid is None


def test_an_interrupted_engine_stops_its_processes_and_says_so(tmp_path: Path) -> None:
    """SIGTERM to the children, their end recorded, the lock free."""
    engine, pid = an_engine(tmp_path)

    engine.send_signal(signal.SIGINT)
    engine.communicate()

    assert engine.returncode == 0
    assert not alive(pid)
    found = saved(tmp_path, "run")
    assert found.pid is None
    assert found.status.condition(ConditionType.SUSPENDED).reason is Reason.INTERRUPTED
    assert found.status.preflight.preemptions == 0
    assert exit_code(found.status) == 130


def test_a_second_interrupt_kills(tmp_path: Path) -> None:
    """For a process that does not listen."""
    engine, pid = an_engine(tmp_path, name="deaf")
    assert engine.stdout is not None
    engine.send_signal(signal.SIGINT)
    # The next line is printed after the first interrupt was acted on, or just before it.
    engine.stdout.readline()
    engine.stdout.readline()
    assert alive(pid)

    engine.send_signal(signal.SIGINT)
    engine.communicate()

    assert engine.returncode == 0
    assert not alive(pid)


def test_annotations_reach_a_running_engine(machine: Machine) -> None:
    """`btx retry` writes beside the run; the engine looks at every step."""
    prepared(machine, spec_of(policy={"maxRetries": 0}))
    machine.end("train-code", Exit.FAILED)
    machine.settle()
    assert machine.status("run").condition(SUCCEEDED).status == "False"

    annotate(machine.root, "run", retry=True)
    machine.settle()

    assert machine.row("train-code").state in (State.STARTING, State.RUNNING)


def test_progress_is_pulled_from_the_process(tmp_path: Path) -> None:
    """Over the address that it was told to listen on."""
    server = tmp_path / "server.py"
    server.write_text(
        "import http.server, json, os\n"
        "task = json.load(open(os.environ['BTX_TASK'][1:]))\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200 if self.path == '/progress' else 404)\n"
        "        self.end_headers()\n"
        "        self.wfile.write(json.dumps({'step': 7, 'steps': 9}).encode())\n"
        "host, port = task['execution']['listen'].split(':')\n"
        "http.server.HTTPServer((host, int(port)), Handler).serve_forever()\n"
    )
    backend = LocalBackend(tmp_path, command=(sys.executable, str(server)))
    backend.open("run", spec_of())
    seen = []

    def tick() -> None:
        seen.append(backend.progress("run").get("preflight"))
        if seen[-1] is not None:
            backend.interrupt()

    asyncio.run(backend.run_until_done(tick=tick))
    backend.close()

    assert next(p for p in seen if p).step == 7


def test_an_unreadable_result_is_none(tmp_path: Path) -> None:
    """Half a file, or none: the engine then looks for the manifest."""
    (tmp_path / "half.json").write_text('{"digest": "0')

    assert read_result(tmp_path / "half.json") is None
    assert read_result(tmp_path / "none.json") is None
