"""Workers that reconcile runs, and all that keeps them supplied. Read after reconcile.py.

kopf's watches, lists, answers --> cache --> queue --> workers: prepare, reconcile, tidy
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from btx_operator.cluster import handlers
from btx_operator.cluster.backend import ClusterBackend
from btx_operator.cluster.cache import Cache
from btx_operator.cluster.events import POSTERS, Poster
from btx_operator.cluster.health import Health
from btx_operator.cluster.kube import ApiError, Kube
from btx_operator.cluster.meters import Meters
from btx_operator.cluster.objects import Key
from btx_operator.cluster.progress import ProgressBook
from btx_operator.cluster.resync import Resync
from btx_operator.cluster.settings import Settings
from btx_operator.cluster.workqueue import WorkQueue
from btx_operator.reconcile import reconcile

log = logging.getLogger(__name__)

RESTART_SECONDS = 1.0
"""After a watcher's end: kopf gives up on errors that pass."""
WATCHES = 20
"""Ends of kopf within WATCH_SECONDS after which the process ends as well."""
WATCH_SECONDS = 120.0


class Stopped(Exception):
    """The process was asked to end: SIGTERM or SIGINT, which kopf takes for itself."""


class Controller:
    """One operator."""

    def __init__(self, kube: Kube, settings: Settings, meters: Meters) -> None:
        self.kube, self.settings, self.meters = kube, settings, meters
        self.queue = WorkQueue()
        self.cache = Cache(self.queue.add)
        meters.watch(self.cache)
        self.book = ProgressBook(self.cache, settings, meters)
        self.poster = Poster(kube, self.cache)
        self.backend = ClusterBackend(
            kube, self.cache, settings, clock=time.time, book=self.book, meters=meters,
            poster=self.poster,
        )  # fmt: skip
        self.resync = Resync(kube, self.cache, settings, meters)
        self.health = Health(self.queue, meters, settings.workers)
        self._primed = asyncio.Event()
        self.health.ready = lambda: self.resync.primed

    async def run(self) -> None:
        """Until cancelled or Stopped; any part that ends takes the others with it."""
        server = await self.health.serve(self.settings.port)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.health.keep_beating(), name="beat")
                parts: list[Callable[[], Coroutine[Any, Any, None]]] = [
                    self.resync.keep_listing,
                    lambda: self.book.keep_pulling(self.queue.add),
                    *[self._work] * self.settings.workers,
                    *[self.poster.keep_posting] * POSTERS,
                ]
                # Before kopf, which ends by cancelling every task that is younger than it.
                for part in parts:
                    group.create_task(self._once_primed(part))
                group.create_task(self._watch())
                await self.resync.prime()
                log.info("%d runs, %d Jobs", len(self.cache.runs), len(self.cache.records))
                self._primed.set()
        finally:
            await server.cleanup()

    async def _once_primed(self, part: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await self._primed.wait()
        await part()

    async def _watch(self) -> None:
        """kopf, begun anew when it gives up: it raises on errors that pass; raises Stopped."""
        requests = handlers.Requests(self.resync.asked, self.resync.lost)
        found = handlers.registry(self.cache, self.kube, self.resync.heard, requests)
        ends: list[float] = []
        while True:
            try:
                await handlers.watch(found, self.settings.namespaces)
                why = "ended"
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
            else:
                raise Stopped
            ends = [at for at in ends if time.monotonic() - at < WATCH_SECONDS]
            ends.append(time.monotonic())
            log.warning("the watches ended (%s); begun anew", why)
            if len(ends) > WATCHES:
                raise RuntimeError(f"the watches end again and again: {why}")
            self.resync.soon()
            await asyncio.sleep(RESTART_SECONDS)

    async def _work(self) -> None:
        while True:
            key, waited = await self.queue.get()
            self.meters["queue_seconds"].observe(waited)
            begun, result = time.monotonic(), "error"
            try:
                result = await self._step(key)
            except ApiError as error:
                delay = self.queue.failed(key, least=error.retry_after)
                log.warning("%s/%s: %s; again in %.1f s", *key, error, delay)
            except Exception:
                delay = self.queue.failed(key)
                log.exception("%s/%s: again in %.1f s", *key, delay)
            finally:
                self.queue.done(key)
                self.meters["reconciles"].labels(result).inc()
                self.meters["reconcile_seconds"].observe(time.monotonic() - begun)

    async def _step(self, key: Key) -> str:
        """One reconcile; returns its result for the metric."""
        await self.backend.prepare(key)
        try:
            after = await reconcile(self.backend, "/".join(key), time.time)
        finally:
            self.backend.rest(key)
        if key not in self.cache.runs:
            self.queue.forget(key)
            return "gone"
        self.queue.worked(key)
        self.cache.tidy(key)
        conflict = after == 0.0
        for seconds in (after, self.backend.due(key)):
            if seconds is not None:
                self.queue.add_after(key, max(0.05, seconds))
        return "conflict" if conflict else "done"
