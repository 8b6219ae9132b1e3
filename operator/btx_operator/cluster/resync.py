"""Full lists of the three kinds, compared with the cache: at start, after every gap, now and then.

A watch can die without a word, and kopf tells nothing of what vanished while it was cut. Lists that
know more than the watch twice in a row mean that it is dead: the process ends and begins anew.
"""

import asyncio
import logging
import time

from btx_api.names import RUN_LABEL

from btx_operator.cluster.cache import Cache
from btx_operator.cluster.kube import JOBS, PODS, RUNS, ApiError, Kube, Resource
from btx_operator.cluster.meters import Meters
from btx_operator.cluster.settings import Settings

log = logging.getLogger(__name__)

KINDS: dict[str, tuple[Resource, str]] = {
    "jobs": (JOBS, RUN_LABEL), "pods": (PODS, RUN_LABEL), "runs": (RUNS, ""),
}  # fmt: skip
"""Runs last: their status is then never older than the Jobs that it is read with."""
SETTLE_SECONDS = 2.0
"""What a list knows more than the watch counts only if the watch does not tell it in this time."""
SUSPECT_SECONDS = 30.0
"""Until the next list, once one of them knew more than the watch."""


class WatchDead(Exception):
    """Lists keep telling what the watch does not."""


class Resync:
    """Keeps the cache equal to the cluster."""

    def __init__(self, kube: Kube, cache: Cache, settings: Settings, meters: Meters) -> None:
        self._kube, self._cache, self._settings, self._meters = kube, cache, settings, meters
        self._wanted = asyncio.Event()
        self.primed = False
        """All kinds were listed once: what the cache lacks is not there."""

    def soon(self) -> None:
        """There may have been a gap."""
        self._wanted.set()

    async def prime(self) -> None:
        """The first lists; tried until they come."""
        delay = 0.5
        while not self.primed:
            try:
                await self.all()
                self.primed = True
            except ApiError as error:
                log.warning("cannot list yet: %s", error)
                await asyncio.sleep(delay)
                delay = min(5.0, 2 * delay)

    async def all(self) -> int:
        """Lists every kind; returns how much of it was news."""
        return sum([await self._one(kind) for kind in KINDS])

    async def _one(self, kind: str) -> int:
        resource, selector = KINDS[kind]
        namespaces = self._settings.namespaces
        items, versions = [], []
        for namespace in namespaces or ("",):
            found, version = await self._kube.list(resource, namespace, selector)
            items += found
            versions.append(version)
        news = self._cache.replace(kind, items, min(versions), namespaces)
        self._meters["cache_listed"].labels(kind).set(time.time())
        return news

    async def keep_listing(self) -> None:
        """For ever; raises WatchDead."""
        suspicion = 0
        while True:
            wait = SUSPECT_SECONDS if suspicion else self._settings.resync_seconds
            gap = await self._gap(wait)
            try:
                # A list is ahead of the watch by a moment: only what stays unknown is news.
                await asyncio.sleep(SETTLE_SECONDS)
                news = await self.all()
            except ApiError as error:
                log.warning("cannot list: %s", error)
                continue
            self._meters["cache_drift"].inc(news)
            suspicion = suspicion + 1 if news and not gap else 0
            if suspicion > 1:
                raise WatchDead(f"{news} objects were news to the watch, and before as well")

    async def _gap(self, seconds: float) -> bool:
        """Waits; whether somebody asked for a list meanwhile."""
        try:
            async with asyncio.timeout(seconds):
                await self._wanted.wait()
        except TimeoutError:
            return False
        self._wanted.clear()
        return True
