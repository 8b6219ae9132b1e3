"""The parent of several ranks: starts them, passes SIGTERM on, leaves no process behind.

No torch: a plain child per rank (docs/decisions/0011). Called by __main__ for the kinds that train.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from btx_api.names import (
    MASTER_ADDR_ENV,
    MASTER_PORT_ENV,
    NODE_RANK_ENV,
    NODES_ENV,
    RANK_ENV,
    TASK_ENV,
)
from btx_api.spec import Scheduling
from btx_api.stage import GRAVITY, Exit, Kind, Problem, Result, Task
from pydantic import ValidationError

from btx_trainer.errors import ConfigurationError, TrainerError
from btx_trainer.ranks import Place

RANKED = (Kind.TRAIN, Kind.FINETUNE, Kind.STITCH)
"""Kinds that run on several ranks; the others are one process whatever was asked."""
TRAINER = (sys.executable, "-m", "btx_trainer")
LAST_WORDS = 10.0
"""Seconds that the others have to say why they fail too, once a rank has failed."""
GRACE_USED = 0.9
"""Part of the grace period after which ranks that have not ended are killed."""
POLL = 0.1


class RankError(TrainerError):
    """What the gravest of the ranks said."""

    def __init__(self, code: Exit, result: Result) -> None:
        problem = result.problem or Problem(message=f"ended with {code.name}")
        super().__init__(problem.field, problem.message)
        self.exit, self.corrupt = code, result.corrupt


@dataclass(frozen=True, kw_only=True, slots=True)
class Crew:
    """The ranks of one node, to be started."""

    processes: int = 1
    """On each node."""
    nodes: int = 1
    node: int = 0
    """Which of them this is."""
    address: str = ""
    """host:port of node 0 where all meet; empty with one node."""

    @property
    def world(self) -> int:
        """Ranks on all nodes."""
        return self.processes * self.nodes

    def places(self, folder: Path) -> list[Place]:
        """Of this node's ranks. One node meets in a file of `folder`: no port can be taken."""
        meeting = f"tcp://{self.address}" if self.address else f"file://{folder}/meeting"
        return [
            Place(
                rank=self.node * self.processes + local, world=self.world, local=local,
                meeting=meeting, parent=os.getpid(),
            )
            for local in range(self.processes)
        ]  # fmt: skip


def crew_of(kind: Kind, scheduling: Scheduling) -> Crew:
    """Ranks that a stage of this kind runs on: per node `processes`, else one per GPU, else one.

    Raises ConfigurationError naming what the environment of a node among several lacks.
    """
    if kind not in RANKED:
        return Crew()
    processes = scheduling.processes or max(1, scheduling.gpus)
    if scheduling.nodes == 1:
        return Crew(processes=processes)
    names = (NODES_ENV, NODE_RANK_ENV, MASTER_ADDR_ENV, MASTER_PORT_ENV)
    for name in names:
        if not os.environ.get(name):
            raise ConfigurationError(
                name, f"is not set, and the stage has {scheduling.nodes} nodes"
            )
    nodes, node, host, port = (os.environ[name] for name in names)
    return Crew(processes=processes, nodes=int(nodes), node=int(node), address=f"{host}:{port}")


def run(
    task: Task, crew: Crew, stopping: Callable[[], bool], command: Sequence[str] = TRAINER
) -> Result:
    """Runs this node's ranks to their end; the Result of the first.

    Raises RankError with the gravest exit code of the ranks, and what that rank said.
    """
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    places = crew.places(folder)
    results = [folder / f"{place.local}.json" for place in places]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with _signals_held():
            for place, result in zip(places, results, strict=True):
                processes.append(_start(task, place, result, len(places), command))
        grace = task.execution.scheduling.termination_grace_period_seconds * GRACE_USED
        ended = _watched(processes, stopping, grace)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return _outcome(ended, results)


def _start(
    task: Task, place: Place, result: Path, processes: int, command: Sequence[str]
) -> "subprocess.Popen[bytes]":
    execution = task.execution.model_copy(
        update={
            "result": str(result), "scratch": str(result.parent),
            "listen": "" if place.rank else task.execution.listen,
        }
    )  # fmt: skip
    plain = task.model_copy(update={"execution": execution}).model_dump_json(exclude_defaults=True)
    file = result.with_suffix(".task")
    file.write_text(plain)
    environment = {**os.environ, TASK_ENV: f"@{file}", RANK_ENV: place.plain()}
    environment.setdefault(
        "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes))
    )
    if place.meeting.startswith("file://"):
        # The name of a pod or a laptop may not resolve.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Children start with SIGTERM held back until they can take it (`Place`'s process lets go)."""
    held = {signal.SIGTERM, signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ended:
    """How a rank ended."""

    number: int
    """Within the node."""
    code: int
    """-n after signal n."""
    killed: bool
    """By us."""

    @property
    def exit(self) -> Exit:
        """A signal, or a code that is not ours, is a failure."""
        return Exit(self.code) if self.code in GRAVITY else Exit.FAILED

    def line(self) -> str:
        """For the Result of one that left none."""
        if self.killed:
            return f"rank {self.number} did not end and was killed"
        if self.code < 0:
            return f"rank {self.number} was ended by signal {-self.code}"
        return f"rank {self.number} ended with code {self.code}"


def _watched(
    processes: Sequence["subprocess.Popen[bytes]"], stopping: Callable[[], bool], grace: float
) -> list[_Ended]:
    """All ranks, in the order of their ends."""
    ended: list[_Ended] = []
    left = dict(enumerate(processes))
    deadline, told, killed = float("inf"), False, False
    while left:
        for number in [number for number, process in left.items() if process.poll() is not None]:
            ended.append(_Ended(number=number, code=left.pop(number).returncode, killed=killed))
            if ended[-1].exit not in (Exit.OK, Exit.PREEMPTED):
                deadline = min(deadline, time.monotonic() + LAST_WORDS)
        if stopping() and not told:
            told, deadline = True, min(deadline, time.monotonic() + grace)
            _send(signal.SIGTERM, left.values())
        if killed := killed or time.monotonic() >= deadline:
            _send(signal.SIGKILL, left.values())
        time.sleep(POLL)
    return ended


def _send(number: int, processes: Iterable["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        process.send_signal(number)


def _outcome(ended: Sequence[_Ended], results: Sequence[Path]) -> Result:
    gravest = min((one.exit for one in ended), key=GRAVITY.index)
    if gravest is Exit.OK:
        return _read(results[0]) or Result()
    # Who a signal ended is the cause of what the others complain of; whom we killed is not.
    cause = min(
        (one for one in ended if one.exit is gravest), key=lambda one: (one.killed, one.code >= 0)
    )
    said = _read(results[cause.number]) or Result(problem=Problem(message=cause.line()))
    raise RankError(gravest, said)


def _read(path: Path) -> Result | None:
    with suppress(OSError, ValidationError):
        return Result.model_validate_json(path.read_bytes())
    return None
