"""The local backend with processes that end when a test says so; driven like the simulator."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stand_in
from btx_api.spec import BTXRunSpec
from btx_api.stage import Exit, Result
from btx_api.status import Row, Status
from btx_operator.local import LocalBackend
from btx_operator.observed import Attempt, Event, Phase, Start
from simulator import Carried, Storage, check_invariants


class Machine(LocalBackend):
    """A LocalBackend that keeps every decision and checks every status."""

    def __init__(self, root: Path, *, slots: int = 64) -> None:
        self.now = 1_700_000_000.0
        self.fifos = root / "fifos"
        self.fifos.mkdir(parents=True, exist_ok=True)
        command = (sys.executable, "-S", "-E", stand_in.__file__, str(self.fifos))
        super().__init__(root, slots=slots, command=command, clock=lambda: self.now)
        self.storage = Storage()
        self.decisions: list[Carried] = []

    @classmethod
    def after(cls, first: "Machine") -> "Machine":
        """Another engine over the same folders and storage."""
        second = cls(first.root, slots=first.slots)
        second.storage, second.now = first.storage, first.now
        return second

    def reserve(self, run: str, status: Status) -> None:
        check_invariants(self.spec(run), self.status(run), status)
        self.decisions.append(Carried(run=run, status=status))
        super().reserve(run, status)

    async def stop(self, run: str, attempt: Attempt) -> None:
        self.decisions[-1].stops.append(attempt)
        await super().stop(run, attempt)

    async def start(self, run: str, start: Start) -> None:
        self.decisions[-1].starts.append(start)
        await super().start(run, start)

    async def emit(self, run: str, events: Sequence[Event]) -> None:
        self.decisions[-1].events += events
        await super().emit(run, events)

    def submit(self, name: str, spec: BTXRunSpec) -> None:
        if name in self._runs:
            super().submit(name, spec)
        else:
            self.open(name, spec)

    def settle(self) -> None:
        """Steps until nothing changes; whatever was asked to stop has ended."""
        for _ in range(100):
            before = self._picture()
            asyncio.run(self._step())
            for child in self._live():
                if child.stopping and child.trainer is not None:
                    wait_for(child.trainer.process.pid)
            if self._picture() == before:
                return
        raise AssertionError("the engine does not come to rest")

    async def _step(self) -> None:
        await self.step()

    def _picture(self) -> Any:
        states = [(run.saved.status, len(run.children)) for run in self._runs.values()]
        return states, len(self._live())

    def live(self, run: str = "run") -> dict[str, Attempt]:
        """Attempts that have not ended, by stage."""
        attempts = [child.attempt() for child in self._live(run)]
        return {a.stage: a for a in attempts if a.phase is not Phase.ENDED}

    def end(
        self, stage: str, code: int = Exit.OK, *, run: str = "run", result: Result | None = None,
        readable: bool = True,
    ) -> None:  # fmt: skip
        """The stage's process ends; with OK it has done its task."""
        child = next(c for c in self._live(run) if c.start.name == stage)
        assert child.trainer is not None, f"{stage} waits for a core"
        if code == Exit.OK and result is None:
            result = self.storage.run(child.start.task)
        answer = {"exit": int(code), "result": json.loads(result.line()) if result else None}
        if not readable:
            answer["result"] = None
        fifo = stand_in.fifo_of(self.fifos, run, stage, child.start.attempt)
        # Opened for both, so that it does not matter which side comes first.
        pipe = os.open(fifo, os.O_RDWR)
        os.write(pipe, (json.dumps(answer) + "\n").encode())
        wait_for(child.trainer.process.pid)
        os.close(pipe)

    def listening(self, run: str) -> list[int]:
        """Waits until every process of a run listens to signals; descriptors to be closed."""
        children = [child.start for child in self._live(run) if child.trainer is not None]
        fifos = [stand_in.fifo_of(self.fifos, run, c.name, c.attempt) for c in children]
        return [os.open(fifo, os.O_WRONLY) for fifo in fifos]

    def advance(self, seconds: float) -> None:
        """Time passes; nothing else happens."""
        self.now += seconds

    def row(self, stage: str, run: str = "run") -> Row:
        """A stage's row."""
        row = self.status(run).row(stage)
        assert row is not None
        return row


def wait_for(pid: int) -> None:
    """Until a child process has ended; it is left to be reaped, if it is not already."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def masked(status: Status) -> dict[str, Any]:
    """A status as JSON without what differs between two worlds: handles and looks."""
    plain = status.model_dump(mode="json", exclude_defaults=True)
    for key in ("key", "refresh", "retry"):
        plain.pop(key, None)
    for row in (*plain.get("stages", ()), plain.get("preflight") or {}):
        if row.get("handle"):
            row["handle"] = "handle"
        if row.get("name") == "preflight":
            row["digest"] = ""
    return plain
