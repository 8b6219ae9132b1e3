"""Events of runs, posted in the background: nobody waits for them, and a burst loses the newest.

Nothing depends on an event: none is sent twice, and one that the API server refuses is gone.
"""

import asyncio
import logging
import socket
import time
from datetime import UTC, datetime
from typing import Any

from btx_api.names import API_VERSION, CONTAINER, KIND
from btx_api.stage import Exit

from btx_operator.cluster.cache import Cache
from btx_operator.cluster.kube import EVENTS, ApiError, Kube
from btx_operator.cluster.objects import PodObject, RunObject
from btx_operator.observed import Event

log = logging.getLogger(__name__)

LOG_LINES, LOG_LENGTH, MESSAGE_LENGTH = 10, 700, 1024
WAITING, POSTERS = 5_000, 4
COMPONENT = "btx-operator"
LATER = 0.5
"""Seconds until an event is posted: the next step of its run, which follows at once, goes first."""


class Poster:
    """One queue for all runs; several at once, so that one slow answer holds up no other run."""

    def __init__(self, kube: Kube, cache: Cache) -> None:
        self._kube, self._cache = kube, cache
        self._waiting: asyncio.Queue[tuple[float, RunObject, Event, PodObject | None]]
        self._waiting = asyncio.Queue(WAITING)

    def post(self, run: RunObject, event: Event) -> None:
        """Soon."""
        # Whose last words it has is known now; the record may be gone later.
        pod = self._last_pod(run, event) if event.attempt else None
        try:
            self._waiting.put_nowait((time.monotonic() + LATER, run, event, pod))
        except asyncio.QueueFull:
            log.warning("%s/%s: event %s dropped: too many wait", *run.key, event.reason)

    async def keep_posting(self) -> None:
        """For ever."""
        while True:
            due, run, event, pod = await self._waiting.get()
            await asyncio.sleep(due - time.monotonic())
            try:
                said = await self._log(run, pod) if pod else ""
                await self._kube.create(EVENTS, run.key[0], body(run, event, said))
            except ApiError as error:
                log.warning("%s/%s: event %s not stored: %s", *run.key, event.reason, error)

    def _last_pod(self, run: RunObject, event: Event) -> PodObject | None:
        """The pod of an attempt that tells most about its end, while it is there."""
        pods = [
            pod
            for record in self._cache.records_of(run.uid)
            if (record.origin.stage, record.origin.number) == (event.stage, event.attempt)
            for pod in record.pods.values()
            if pod.exit is not None and not pod.gone
        ]
        return max(pods, key=_telling, default=None)

    async def _log(self, run: RunObject, pod: PodObject) -> str:
        try:
            text = await self._kube.log(run.key[0], pod.name, CONTAINER, LOG_LINES)
        except ApiError:
            return ""
        return text.strip()[-LOG_LENGTH:]


def _telling(pod: PodObject) -> tuple[bool, float]:
    return pod.exit != Exit.OK, pod.finished or 0.0


def body(run: RunObject, event: Event, said: str) -> dict[str, Any]:
    """The core/v1 Event; `said`: the last lines of a log."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    message = f"{event.message}\n{said}" if said else event.message
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{run.key[1]}-", "namespace": run.key[0]},
        "involvedObject": {
            "apiVersion": API_VERSION, "kind": KIND, "namespace": run.key[0], "name": run.key[1],
            "uid": run.uid,
        },
        "reason": str(event.reason),
        "message": message[:MESSAGE_LENGTH],
        "type": "Warning" if event.warning else "Normal",
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": socket.gethostname()[:128],
    }  # fmt: skip
