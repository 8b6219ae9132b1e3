"""/healthz, /readyz and /metrics of the operator.

Alive: the loop turns and the queue moves. Never a question of the API server: a restart would not
bring it back. Ready: the cache has been filled once.
"""

import asyncio
import time
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from btx_operator.cluster.meters import Meters
from btx_operator.cluster.workqueue import WorkQueue

BEAT_SECONDS = 1.0
LAG_SECONDS = 30.0
STUCK_SECONDS = 300.0
"""A run that waits so long while workers are free: nobody takes it."""


class Health:
    """Judges from inside the loop; answers from it too, so a stuck loop does not answer."""

    def __init__(self, queue: WorkQueue, meters: Meters, workers: int) -> None:
        self._queue, self._meters, self._workers = queue, meters, workers
        self._beat = time.monotonic()
        self._lags = 0
        self.ready: Callable[[], bool] = lambda: False

    async def keep_beating(self) -> None:
        """Measures how late the loop is, for ever."""
        while True:
            begun = time.monotonic()
            await asyncio.sleep(BEAT_SECONDS)
            self._beat = time.monotonic()
            lag = self._beat - begun - BEAT_SECONDS
            self._lags = self._lags + 1 if lag > LAG_SECONDS else 0
            self._meters["loop_lag"].set(max(0.0, lag))
            self._meters["queue_depth"].set(len(self._queue))

    def problems(self) -> list[str]:
        """Why this process should be begun anew; empty: it is well."""
        now, found = time.monotonic(), []
        if now - self._beat > LAG_SECONDS:
            found.append(f"no beat for {now - self._beat:.0f} s")
        if self._lags > 1:
            found.append("the loop is late again and again")
        waited = self._queue.oldest(now)
        if waited > STUCK_SECONDS and self._queue.busy < self._workers:
            found.append(f"a run waits for {waited:.0f} s while workers are free")
        return found

    async def serve(self, port: int, host: str = "0.0.0.0") -> web.AppRunner:
        """Begins to answer."""
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, host, port).start()
        return runner

    async def _healthz(self, _: web.Request) -> web.Response:
        found = self.problems()
        return web.Response(text="\n".join(found) or "ok", status=500 if found else 200)

    async def _readyz(self, _: web.Request) -> web.Response:
        ready = self.ready()
        text = "ok" if ready else "the cluster has not been listed yet"
        return web.Response(text=text, status=200 if ready else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._meters.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )
