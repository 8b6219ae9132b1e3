"""One trainer process on this machine: started, watched, stopped. No policy.

Called by local.py for the attempts of runs, and by the command line for errands outside of runs.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from btx_api.names import TASK_ENV
from btx_api.stage import Progress, Result, Task
from pydantic import ValidationError

from btx_operator.fork_server import Forked, ForkServer, die_with_parent

TRAINER = (sys.executable, "-m", "btx_trainer")
PROGRESS_TIMEOUT, PROGRESS_BYTES = 2.0, 65_536


@dataclass(kw_only=True)
class Trainer:
    """A process of its own group, with its log, result file and progress."""

    process: subprocess.Popen[bytes] | Forked
    log: Path
    result_file: Path
    port: int
    exit: int | None = None
    """Exit code once ended; -n after signal n."""
    progress: Progress | None = field(default=None)
    """The latest that it published."""

    def poll(self) -> int | None:
        """The exit code once the process and all that it started are gone."""
        if self.exit is None and _has_ended(self.process.pid):
            # Before it is reaped its group cannot be anybody else's.
            self.kill()
            self.exit = self.process.wait()
        return self.exit

    def terminate(self) -> None:
        """SIGTERM: it writes a checkpoint and exits."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    def kill(self) -> None:
        """SIGKILL for the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """SIGKILL, and no trace of it is left."""
        self.kill()
        self.process.wait()

    def result(self) -> Result | None:
        """What it left; None when there is nothing readable."""
        return read_result(self.result_file)

    async def refresh(self) -> None:
        """Pulls the progress; a process that does not answer keeps the last one."""
        self.progress = await pull(self.port) or self.progress


def launch(
    task: Task,
    *,
    folder: Path,
    command: Sequence[str] = TRAINER,
    threads: int,
    server: ForkServer | None = None,
) -> Trainer:
    """Starts the trainer on a task; its files are `<folder>/{logs,attempts}/<name>-<attempt>.*`.

    A `server` that is ready forks it; else it is `command`.
    """
    execution = task.execution
    log, result, task_file = files(folder, execution.name, execution.attempt)
    for path in (log, result):
        path.parent.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    port = _free_port()
    scheduling = execution.scheduling
    scheduling = scheduling.model_copy(
        # `gpus` and `nodes` are a cluster's.
        update={"threads": threads, "processes": scheduling.processes or 1, "nodes": 1}
    )
    execution = execution.model_copy(
        update={
            "listen": f"127.0.0.1:{port}",
            "result": str(result.absolute()),
            "scheduling": scheduling,
        }
    )
    task = task.model_copy(update={"execution": execution})
    task_file.write_text(task.model_dump_json(exclude_defaults=True))
    changes = {
        TASK_ENV: f"@{task_file.absolute()}",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # The default spins for long, and collapses beside a busy core.
        "GOMP_SPINCOUNT": "1000",
        # One code path of MKL, so that results do not depend on where memory happens to lie.
        "MKL_CBWR": "AVX2",
    }
    with log.open("ab") as out:
        process = (server and server.fork(changes, out.fileno())) or subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, **changes}, process_group=0, preexec_fn=die_with_parent,  # noqa: PLW1509 - the engine has one thread
        )  # fmt: skip
    return Trainer(process=process, log=log, result_file=result, port=port)


def files(folder: Path, name: str, attempt: int) -> tuple[Path, Path, Path]:
    """Log, result file and task file of an attempt."""
    stem = f"{name}-{attempt}"
    attempts = folder / "attempts"
    task = attempts / f"{stem}.task.json"
    return folder / "logs" / f"{stem}.log", attempts / f"{stem}.json", task


async def pull(port: int, host: str = "127.0.0.1") -> Progress | None:
    """The progress of whoever listens on a port of this machine or another; None: no answer."""
    with contextlib.suppress(OSError, TimeoutError, ValidationError):
        async with asyncio.timeout(PROGRESS_TIMEOUT):
            return Progress.model_validate_json(await _get(host, port, "/progress"))
    return None


def dead_experts(progress: Progress | None) -> tuple[str, ...] | None:
    """Those that it names; None when it is no word of experts (another phase, a dense model)."""
    return progress.dead_experts if progress and progress.expert_load else None


def port_of(task_file: Path) -> int | None:
    """Where the attempt of a task file listens; None when there is no such attempt."""
    with contextlib.suppress(OSError, ValidationError):
        listen = Task.model_validate_json(task_file.read_bytes()).execution.listen
        return int(listen.rpartition(":")[2])
    return None


def read_result(path: Path) -> Result | None:
    """A Result file; None when absent or unreadable."""
    try:
        return Result.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


async def run_task(
    task: Task,
    *,
    folder: Path,
    command: Sequence[str] = TRAINER,
    threads: int = 1,
    tick: Callable[[Trainer], None] | None = None,
) -> tuple[int, Result | None, Path]:
    """An errand outside of any run: exit code, Result, log. Leaves no process when cancelled."""
    trainer = launch(task, folder=folder, command=command, threads=threads)
    try:
        while trainer.poll() is None:
            if tick is not None:
                await trainer.refresh()
                tick(trainer)
            await asyncio.sleep(0.05)
    finally:
        trainer.end()
    assert trainer.exit is not None
    return trainer.exit, trainer.result(), trainer.log


def _has_ended(pid: int) -> bool:
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, pid, options) is not None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _get(host: str, port: int, path: str) -> bytes:
    """The body; no redirect is followed, and no more than PROGRESS_BYTES are read."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        answer = b""
        while len(answer) < PROGRESS_BYTES and (part := await reader.read(PROGRESS_BYTES)):
            answer += part
    finally:
        writer.close()
    return answer.partition(b"\r\n\r\n")[2]
