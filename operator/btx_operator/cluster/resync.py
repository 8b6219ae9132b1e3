"""Full lists of the three kinds, compared with the cache: at start, after every gap, now and then.

A watch can die without a word, and kopf tells nothing of what vanished while it was cut. If a list
tells what no watch tells afterwards, the watch is dead: the process ends and begins anew.
"""

import asyncio
import contextlib
import logging
import time

from btx_api.names import RUN_LABEL

from btx_operator.cluster import memory
from btx_operator.cluster.cache import Cache
from btx_operator.cluster.kube import JOBS, PODS, RUNS, ApiError, Kube, Resource
from btx_operator.cluster.meters import Meters
from btx_operator.cluster.objects import Object, version_of
from btx_operator.cluster.settings import Settings

log = logging.getLogger(__name__)

KINDS: dict[str, tuple[Resource, str]] = {
    "jobs": (JOBS, RUN_LABEL), "pods": (PODS, RUN_LABEL), "runs": (RUNS, ""),
}  # fmt: skip
"""Runs last: their status is then never older than the Jobs that it is read with."""
SETTLE_SECONDS = 2.0
"""From a sign of a gap to the list, so that a burst of signs is one list."""
SUSPECT_SECONDS = 30.0
"""Until the next list, while a watch has not told what a list has."""
SILENT_SECONDS = 20.0
"""A watcher without an answer asks again within six."""
BEGIN_SECONDS = 10.0
"""The first lists wait at most so long for the watches: what those tell is not lost between."""
DEAD_SECONDS = 150.0
"""After which it never will: kopf notices a watch without a sign of life in half of it."""


class WatchDead(Exception):
    """A list told what no watch has told since."""


class Resync:
    """Keeps the cache equal to the cluster."""

    def __init__(self, kube: Kube, cache: Cache, settings: Settings, meters: Meters) -> None:
        self._kube, self._cache, self._settings, self._meters = kube, cache, settings, meters
        self._wanted, self._watched = asyncio.Event(), asyncio.Event()
        self._paths: dict[str, bool] = {}
        """What the watchers ask for: whether it is watched."""
        self._lost: dict[str, float] = {}
        """Of these what got no answer and was not asked for again, since when."""
        self._unheard: dict[str, tuple[int, float]] = {}
        self.primed = False
        """All kinds were listed once: what the cache lacks is not there."""

    def soon(self) -> None:
        """There may have been a gap."""
        self._wanted.set()

    def asked(self, path: str, watch: bool) -> None:
        """A watcher lists a path anew, or watches it from where its list ended."""
        self._lost.pop(path, None)
        self._paths[path] = watch
        if not watch:
            self.soon()
        elif sum(self._paths.values()) >= len(KINDS) * max(1, len(self._settings.namespaces)):
            self._watched.set()

    def lost(self, path: str) -> None:
        """A watcher got no answer; it should ask again."""
        self._lost[path] = time.monotonic()
        self.soon()

    def heard(self, item: Object) -> None:
        """A watch told of an object."""
        uid = item["metadata"]["uid"]
        if uid in self._unheard and version_of(item) >= self._unheard[uid][0]:
            del self._unheard[uid]

    async def prime(self) -> None:
        """The first lists, once the watches have begun; tried until they come."""
        delay = 0.5
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BEGIN_SECONDS):
                await self._watched.wait()
        while not self.primed:
            self._wanted.clear()
            try:
                await self.all()
                self.primed = True
            except ApiError as error:
                log.warning("cannot list yet: %s", error)
                await asyncio.sleep(delay)
                delay = min(5.0, 2 * delay)

    async def all(self) -> None:
        """Lists every kind."""
        for kind in KINDS:
            await self._one(kind)
        memory.give_back()

    async def _one(self, kind: str) -> None:
        resource, selector = KINDS[kind]
        namespaces = self._settings.namespaces
        news: dict[str, int] = {}
        there: set[str] = set()
        versions = []
        for namespace in namespaces or ("",):
            async for items, version in self._kube.pages(resource, namespace, selector):
                news |= self._cache.take(kind, items)
                there.update(item["metadata"]["uid"] for item in items)
                versions.append(version)
        removed = self._cache.prune(kind, there, min(versions), namespaces)
        self._meters["cache_listed"].labels(kind).set(time.time())
        if self.primed:
            self._meters["cache_drift"].inc(len(news) + removed)
            now = time.monotonic()
            for uid, version in news.items():
                since = self._unheard.get(uid, (0, now))[1]
                self._unheard[uid] = (version, since)

    async def keep_listing(self) -> None:
        """For ever; raises WatchDead."""
        while True:
            suspect = self._lost or self._unheard
            await self._gap(SUSPECT_SECONDS if suspect else self._settings.resync_seconds)
            self._judge()
            await asyncio.sleep(SETTLE_SECONDS)
            try:
                await self.all()
            except ApiError as error:
                log.warning("cannot list: %s", error)

    def _judge(self) -> None:
        now = time.monotonic()
        for path, since in self._lost.items():
            if now - since > SILENT_SECONDS:
                raise WatchDead(f"{path}: no answer, and not asked for for {now - since:.0f} s")
        # What is gone by now no watch will tell of in that version.
        there = self._cache.uids()
        self._unheard = {uid: since for uid, since in self._unheard.items() if uid in there}
        waited = [now - since for _, since in self._unheard.values()]
        if waited and max(waited) > DEAD_SECONDS:
            raise WatchDead(
                f"{len(waited)} objects are known from lists only, for {max(waited):.0f} s"
            )

    async def _gap(self, seconds: float) -> None:
        """Waits so long, or until somebody asks for a list."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wanted.wait()
        self._wanted.clear()
