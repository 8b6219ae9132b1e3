"""The local backend: attempts are processes, a run is a folder. `btx run` is this and a display.

<root>/runs/<name>/{spec.json,status.json,annotations.json,lock,logs/,attempts/}
"""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from btx_api.names import API_VERSION, KIND, REFRESH_ANNOTATION, RETRY_ANNOTATION
from btx_api.spec import BTXRunSpec
from btx_api.stage import (
    TASK_SCHEMA,
    VERSIONS,
    Exit,
    Kind,
    Problem,
    Progress,
    Stage,
    Task,
    canonical,
)
from btx_api.status import ACTIVE, ConditionType, Reason, Release, State, Status

from btx_operator import processes
from btx_operator.errors import LockedError, NotFoundError, UserError
from btx_operator.fork_server import ForkServer
from btx_operator.observed import (
    Attempt,
    Claim,
    Event,
    Observed,
    Phase,
    Start,
    index,
    storage_key,
)
from btx_operator.processes import Trainer, dead_experts, launch
from btx_operator.reconcile import reconcile

INTERRUPTED = 130
"""Exit code of an interrupted command, as the shell's after SIGINT."""
SPEC, STATUS, NOTES = "spec.json", "status.json", "annotations.json"
TICK = 1.0
"""Seconds between two looks at progress, deadlines and annotations."""
LOADING = (Kind.TRAIN, Kind.FINETUNE, Kind.STITCH, Kind.EVALUATE)
"""Kinds that load torch: seconds each, so they wait for the fork server that did it already."""


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A run's folder as it was last written."""

    name: str
    uid: str
    generation: int
    created: float
    spec: BTXRunSpec
    status: Status
    pid: int | None = None
    """Process that works on it now."""


@dataclass(kw_only=True)
class _Child:
    """One attempt: waiting for cores, running, or ended."""

    start: Start
    stopping: bool = False
    kill_at: float | None = None
    trainer: Trainer | None = None
    threads: int = 0
    began: float | None = None
    ended: float | None = None
    exit: int | None = None

    def attempt(self) -> Attempt:
        """As the engine sees it."""
        start, trainer = self.start, self.trainer
        phase = Phase.PENDING if trainer is None else Phase.RUNNING
        seconds = 0.0
        if self.exit is not None:
            phase, seconds = Phase.ENDED, (self.ended or 0.0) - (self.began or self.ended or 0.0)
        return Attempt(
            stage=start.name, number=start.attempt, digest=start.digest,
            handle=str(trainer.process.pid) if trainer else "waiting", phase=phase,
            # Waiting for a core is no reason to give up: the clock of PENDING stands.
            since=self.began if phase is Phase.RUNNING else None, stopping=self.stopping,
            exit=self.exit, seconds=seconds,
            result=trainer.result() if trainer and self.exit is not None else None,
            dead_experts=dead_experts(trainer.progress if trainer else None),
        )  # fmt: skip


@dataclass(kw_only=True)
class _Run:
    """An opened run: its lock is held by this process."""

    saved: SavedRun
    folder: Path
    lock: int
    verify: bool
    children: list[_Child] = field(default_factory=list)
    recovered: tuple[Attempt, ...] = ()
    """Attempts of an engine that was killed, which had left their results."""
    reserved: Status | None = None


class LocalBackend:
    """Backend of reconcile.py for any number of runs that share this machine's cores."""

    def __init__(
        self,
        root: Path = Path(".btx"),
        *,
        slots: int | None = None,
        command: Sequence[str] = processes.TRAINER,
        clock: Callable[[], float] = time.time,
        on_event: Callable[[str, Event], None] = lambda run, event: None,
    ) -> None:
        """`slots`: cores; default: those that this process may use."""
        self.root, self.command, self.clock, self.on_event = root, command, clock, on_event
        self.slots = slots or len(os.sched_getaffinity(0))
        self.closing = False
        self._runs: dict[str, _Run] = {}
        self._wake = asyncio.Event()
        # Whoever names a command of his own gets that.
        self._server = ForkServer() if command == processes.TRAINER else None

    def open(self, name: str, spec: BTXRunSpec, *, verify: bool = False) -> None:
        """Takes the run's lock, creates or edits it; looks at its inputs again and forgives.

        Raises LockedError naming the process that has it.
        """
        folder = run_folder(self.root, name)
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder, name)
        try:
            if (folder / SPEC).exists():
                found = saved(self.root, name)
            else:
                found = SavedRun(
                    name=name, uid=str(uuid.uuid4()), generation=1, created=self.clock(),
                    spec=spec, status=Status(),
                )  # fmt: skip
                _write_spec(folder, found)
        except BaseException:
            os.close(lock)
            raise
        self._runs[name] = _Run(
            saved=found, folder=folder, lock=lock, verify=verify,
            recovered=tuple(_recovered(folder, found.status)),
        )  # fmt: skip
        self.submit(name, spec)
        annotate(self.root, name, refresh=True, retry=True)

    def submit(self, name: str, spec: BTXRunSpec) -> None:
        """Edits an opened run; the generation rises only if the canonical spec differs."""
        run = self._runs[name]
        if _canonical(spec) != _canonical(run.saved.spec):
            run.saved = _changed(run.saved, spec=spec, generation=run.saved.generation + 1)
            _write_spec(run.folder, run.saved)
        self._wake.set()

    def status(self, name: str) -> Status:
        """Of an opened run."""
        return self._runs[name].saved.status

    def spec(self, name: str) -> BTXRunSpec:
        """Of an opened run."""
        return self._runs[name].saved.spec

    def progress(self, name: str) -> dict[str, Progress]:
        """Latest progress of the running attempts, by stage."""
        return {
            child.start.name: child.trainer.progress
            for child in self._live(name)
            if child.trainer is not None and child.trainer.progress is not None
        }

    def log(self, name: str, stage: str, attempt: int) -> Path:
        """Where an attempt's output is."""
        return processes.files(self._runs[name].folder, stage, attempt)[0]

    def problem(self, name: str, stage: str, attempt: int) -> Problem | None:
        """Why an attempt failed, in full; its row has the first words of it."""
        result = processes.read_result(processes.files(self._runs[name].folder, stage, attempt)[1])
        return result.problem if result else None

    def interrupt(self) -> None:
        """First call: attempts stop by SIGTERM, `run_until_done` returns. Second: by SIGKILL."""
        if self.closing:
            for child in self._live():
                if child.trainer is not None:
                    child.trainer.kill()
        self.closing = True
        self._wake.set()

    def close(self) -> None:
        """Kills what still runs and releases the locks."""
        for child in self._live():
            if child.trainer is not None:
                child.trainer.end()
        if self._server is not None:
            self._server.close()
        for run in self._runs.values():
            os.close(run.lock)
        self._runs.clear()

    async def run_until_done(self, *, tick: Callable[[], None] = lambda: None) -> None:
        """Works on all opened runs until each is settled and no process is left.

        `tick` is called after every change and about once a second.
        """
        loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        # Outside of the main thread there are no signals; the tick then does, more slowly.
        with contextlib.suppress(ValueError, RuntimeError):
            loop.add_signal_handler(signal.SIGCHLD, self._wake.set)
        watcher = asyncio.create_task(self._watch())
        try:
            while True:
                after = await self.step()
                tick()
                if not self._live() and all(map(self._settled, self._runs)):
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(TICK, TICK if after is None else after)):
                        await self._wake.wait()
        finally:
            watcher.cancel()
            loop.remove_signal_handler(signal.SIGCHLD)

    async def step(self) -> float | None:
        """One reconcile of every run; then processes for what was started, as cores allow."""
        self._wake.clear()
        self._reap()
        afters = [await reconcile(self, name, self.clock) for name in self._runs]
        self._dispatch()
        return min((after for after in afters if after is not None), default=None)

    # Backend ------------------------------------------------------------------------------------

    def observe(self, run: str) -> Observed:
        """See reconcile.Backend."""
        mine = self._runs[run]
        mine.reserved, saved = None, mine.saved
        notes = _read_json(mine.folder / NOTES)
        others = (r for r in self._runs.values() if r is not mine)
        claims = index(
            Claim(run=other.saved.name, uid=other.saved.uid, created=other.saved.created, row=row)
            for other in others
            if storage_key(other.saved.spec) == storage_key(saved.spec)
            for row in (other.reserved or other.saved.status).stages
        )
        return Observed(
            name=run, uid=saved.uid, created=saved.created, generation=saved.generation,
            spec=saved.spec, status=saved.status,
            release=Release(image="", task=TASK_SCHEMA, kinds=VERSIONS),
            attempts=(*mine.recovered, *(child.attempt() for child in mine.children)),
            claims=claims, refresh=notes.get(REFRESH_ANNOTATION, ""),
            retry=notes.get(RETRY_ANNOTATION, ""), verify=mine.verify, closing=self.closing,
        )  # fmt: skip

    def reserve(self, run: str, status: Status) -> None:
        """See reconcile.Backend."""
        self._runs[run].reserved = status

    def patience(self, run: str) -> float:
        """See reconcile.Backend; a file is quickly written."""
        return 0.0

    async def write_status(self, run: str, status: Status) -> None:
        """See reconcile.Backend; the lock makes this process the only writer."""
        mine = self._runs[run]
        _write(mine.folder / STATUS, status.line())
        mine.saved = _changed(mine.saved, status=status)
        wanted = {(row.name, row.attempt) for row in (*status.stages, status.preflight) if row}
        # An ended attempt is of interest until its row tells of it, or of a later one.
        mine.children = [
            child
            for child in mine.children
            if child.exit is None or (child.start.name, child.start.attempt) in wanted
        ]

    async def stop(self, run: str, attempt: Attempt) -> None:
        """See reconcile.Backend."""
        for child in self._live(run):
            start = child.start
            if (start.name, start.attempt, start.digest) != (
                attempt.stage, attempt.number, attempt.digest,
            ):  # fmt: skip
                continue
            child.stopping = True
            if child.trainer is None:
                child.exit, child.ended = Exit.PREEMPTED, self.clock()
                self._wake.set()
            else:
                grace = start.task.execution.scheduling.termination_grace_period_seconds
                child.kill_at = self.clock() + grace
                child.trainer.terminate()

    async def start(self, run: str, start: Start) -> None:
        """See reconcile.Backend. The process begins when there is a core for it."""
        children = self._runs[run].children
        known = ((c.start.name, c.start.attempt, c.start.digest) for c in children)
        if (start.name, start.attempt, start.digest) not in known:
            children.append(_Child(start=start))
            self._wake.set()

    async def emit(self, run: str, events: Sequence[Event]) -> None:
        """See reconcile.Backend."""
        for event in events:
            self.on_event(run, event)

    # Processes ----------------------------------------------------------------------------------

    def _live(self, run: str | None = None) -> list[_Child]:
        runs = self._runs.values() if run is None else (self._runs[run],)
        return [child for r in runs for child in r.children if child.exit is None]

    def _dispatch(self) -> None:
        """A lone attempt gets all cores; beside others each gets one, in the order of starts."""
        live = self._live()
        free = self.slots - sum(child.threads for child in live)
        for name, run in self._runs.items():
            for child in run.children:
                if child.exit is not None or child.trainer is not None:
                    continue
                if self._loading(child.start.task):
                    continue
                default = self.slots if len(live) == 1 else 1
                scheduling = child.start.task.execution.scheduling
                ranks = scheduling.processes or 1
                each = scheduling.threads or max(1, default // ranks)
                wish = min(each * ranks, self.slots)
                if wish > free:
                    return
                child.threads = wish
                free -= wish
                self._begin(name, child, each)

    def _loading(self, task: Task) -> bool:
        """Whether a task is to wait until the fork server has loaded what it needs."""
        if not isinstance(task.work, Stage) or task.work.kind not in LOADING or not self._server:
            return False
        self._server.look()
        if (news := self._server.begin()) is None:
            return False
        loop = asyncio.get_running_loop()

        def heard() -> None:
            loop.remove_reader(news)
            self._wake.set()

        loop.add_reader(news, heard)
        return True

    def _begin(self, run: str, child: _Child, threads: int) -> None:
        folder = self._runs[run].folder
        child.trainer = launch(
            child.start.task, folder=folder, command=self.command, threads=threads,
            server=self._server,
        )  # fmt: skip
        child.began = self.clock()
        self._wake.set()

    def _reap(self) -> None:
        for child in self._live():
            if child.trainer is None:
                continue
            if child.kill_at is not None and self.clock() >= child.kill_at:
                child.trainer.kill()
            child.exit = child.trainer.poll()
            if child.exit is not None:
                child.ended, child.threads = self.clock(), 0

    async def _watch(self) -> None:
        """Pulls progress; a slow answer delays nothing else."""
        while True:
            trainers = [child.trainer for child in self._live() if child.trainer]
            await asyncio.gather(*(trainer.refresh() for trainer in trainers))
            await asyncio.sleep(TICK)

    def _settled(self, name: str) -> bool:
        status = self.status(name)
        if any(row.state in (*ACTIVE, State.STOPPING) for row in status.rows):
            return False
        return settled(status)


def settled(status: Status) -> bool:
    """Whether the command has nothing more to wait for: done, failed, refused, or suspended."""
    truths = {c.type: c.status for c in status.conditions}
    accepted = truths.get(ConditionType.ACCEPTED)
    if accepted == "False" or truths.get(ConditionType.SUSPENDED) == "True":
        return True
    return accepted == "True" and status.over


def exit_code(status: Status) -> int:
    """Of the command: 0, 130 when interrupted, else the code of what went wrong first."""
    reasons = {c.type: c.reason for c in status.conditions}
    accepted = status.condition(ConditionType.ACCEPTED)
    succeeded = status.condition(ConditionType.SUCCEEDED)
    if reasons.get(ConditionType.SUSPENDED) is Reason.INTERRUPTED:
        return INTERRUPTED
    if accepted is not None and accepted.status == "False":
        failed = accepted.reason is Reason.PREFLIGHT_FAILED
        return Exit.FAILED if failed else Exit.CONFIGURATION
    if succeeded is None or succeeded.status != "False":
        return 0
    codes = [row.exit for row in status.stages if row.state is State.FAILED]
    return next((code for code in codes if code is not None and code > 0), Exit.FAILED)


def run_folder(root: Path, name: str) -> Path:
    """Where a run is kept."""
    return root / "runs" / name


def saved_runs(root: Path) -> list[str]:
    """Names of the runs below a root."""
    return sorted(path.parent.name for path in (root / "runs").glob(f"*/{SPEC}"))


def saved(root: Path, name: str) -> SavedRun:
    """A run as it was last written, whoever works on it.

    Raises NotFoundError; UserError naming the folder if another release wrote what is in it.
    """
    folder = run_folder(root, name)
    if not (folder / SPEC).is_file():
        raise NotFoundError(name, root)
    try:
        document = _read_json(folder / SPEC)
        metadata, status = document["metadata"], _read_json(folder / STATUS)
        return SavedRun(
            name=name, uid=metadata["uid"], generation=metadata["generation"],
            created=metadata["created"], spec=BTXRunSpec.parse(document["spec"]),
            status=Status.parse(status), pid=_holder(folder),
        )  # fmt: skip
    except (ValueError, KeyError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"run {name!r}: {folder} cannot be read: {what}") from None


def annotate(root: Path, name: str, *, refresh: bool = False, retry: bool = False) -> None:
    """`btx refresh`, `btx retry`: a process that works on the run sees it within a second."""
    path = run_folder(root, name) / NOTES
    if not path.parent.is_dir():
        raise NotFoundError(name, root)
    asked = {REFRESH_ANNOTATION: refresh, RETRY_ANNOTATION: retry}
    fresh = {key: uuid.uuid4().hex[:12] for key, wanted in asked.items() if wanted}
    _write(path, json.dumps({**_read_json(path), **fresh}))


def _recovered(folder: Path, status: Status) -> list[Attempt]:
    """Ended attempts of an engine that was killed: those whose Result tells of success."""
    found = []
    for row in status.rows:
        result = processes.read_result(processes.files(folder, row.name, row.attempt)[1])
        done = result and (result.digest == row.digest or (result.resolved and not result.problem))
        if row.handle and done:
            found.append(
                Attempt(
                    stage=row.name, number=row.attempt, digest=row.digest, handle=row.handle,
                    phase=Phase.ENDED, exit=Exit.OK, result=result,
                )
            )  # fmt: skip
    return found


def _locked(folder: Path, name: str) -> int:
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise LockedError(name, _holder(folder) or 0) from None
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    return lock


def _holder(folder: Path) -> int | None:
    """Process that holds the run's lock."""
    with contextlib.suppress(FileNotFoundError), (folder / "lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return int(lock.read() or 0)
    return None


def _write_spec(folder: Path, saved: SavedRun) -> None:
    metadata = {
        "name": saved.name, "uid": saved.uid, "generation": saved.generation,
        "created": saved.created,
    }  # fmt: skip
    document = {
        "apiVersion": API_VERSION, "kind": KIND, "metadata": metadata,
        "spec": saved.spec.model_dump(mode="json", exclude_unset=True),
    }  # fmt: skip
    _write(folder / SPEC, json.dumps(document, indent=1))


def _canonical(spec: BTXRunSpec) -> Any:
    return canonical(spec.model_dump(mode="json", exclude_defaults=True))


def _changed(saved: SavedRun, **fields: Any) -> SavedRun:
    return SavedRun(**{**vars(saved), **fields})


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    document: dict[str, Any] = json.loads(path.read_text())
    return document
