"""One step of one run, whatever the backend: observe -> decide -> apply. Read this first.

Called by local.py (processes), by the cluster's work queue (Jobs) and by the tests' simulator.
Level-triggered: nothing is remembered between two calls but what the status says.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from btx_api.status import ACTIVE, ConditionType, Status

from btx_operator.decide import decide
from btx_operator.errors import Conflict
from btx_operator.observed import Attempt, Decision, Event, Observed, Start


class Backend(Protocol):
    """What the engine needs of the world. It holds no policy."""

    def observe(self, run: str) -> Observed | None:
        """Every fact about a run, from memory; None: there is no such run."""

    def reserve(self, run: str, status: Status) -> None:
        """From now on other runs see this status's rows as claims; undone by the next `observe`."""

    def patience(self, run: str) -> float:
        """Seconds from now that a status may wait which only shows how attempts get on."""

    async def write_status(self, run: str, status: Status) -> None:
        """Stores the status if the one that was observed is still stored; raises Conflict."""

    async def stop(self, run: str, attempt: Attempt) -> None:
        """Asks an attempt to end (SIGTERM, then its grace period); does not wait for it.

        May raise Conflict.
        """

    async def start(self, run: str, start: Start) -> None:
        """Creates an attempt; does nothing if the same one exists. May raise Conflict."""

    async def emit(self, run: str, events: Sequence[Event]) -> None:
        """Tells people."""


async def reconcile(backend: Backend, run: str, clock: Callable[[], float]) -> float | None:
    """One step. Returns the seconds after which to look again even without a new fact."""
    seen = backend.observe(run)
    if seen is None:
        return None
    decision = decide(seen, clock())
    if passing(seen.status, decision) and (seconds := backend.patience(run)):
        return min(seconds, decision.again_after or seconds)
    # No await until here: two runs cannot both believe that nobody makes an artifact.
    backend.reserve(run, decision.status)
    try:
        if decision.status != seen.status:
            await backend.write_status(run, decision.status)
        # The intents are stored: a crash from here on is repaired by the next step.
        for attempt in decision.stops:
            await backend.stop(run, attempt)
    except Conflict:
        return 0.0
    # Side by side, each to its end: one that fails takes none of the others along.
    starts = (backend.start(run, start) for start in decision.starts)
    for result in await asyncio.gather(*starts, return_exceptions=True):
        if isinstance(result, Conflict):
            return 0.0
        if isinstance(result, BaseException):
            raise result
    if decision.events:
        await backend.emit(run, decision.events)
    return decision.again_after


def passing(before: Status, decision: Decision) -> bool:
    """Whether all that is new is what attempts under way are doing, for display.

    Ten pods that begin within a second are one write then, not ten.
    """
    if decision.starts or decision.stops or decision.events:
        return False
    return before != decision.status and _lasting(before) == _lasting(decision.status)


def _lasting(status: Status) -> Status:
    """What of a status must not be lost."""
    shown = (ConditionType.RUNNING, ConditionType.QUEUED)
    lasting = (
        row.model_copy(update={"state": ACTIVE[0], "handle": "", "start_time": None})
        if row.state in ACTIVE
        else row
        for row in status.rows
    )
    return status.model_copy(
        update={
            "stages": tuple(lasting), "preflight": None,
            "conditions": tuple(c for c in status.conditions if c.type not in shown),
            "state": "", "stage": "", "progress": "", "eta": "",
        }
    )  # fmt: skip
