"""Progress of running attempts, pulled from rank 0 of each into memory.

Nothing depends on it but what people see, and events about dead experts. A pod that does not answer
costs its two seconds and nothing else.
"""

import asyncio
from collections.abc import Callable

from btx_api.stage import Progress

from btx_operator.cluster.cache import Cache
from btx_operator.cluster.meters import Meters
from btx_operator.cluster.objects import Key, PodObject, Record
from btx_operator.cluster.settings import Settings
from btx_operator.processes import dead_experts, pull
from btx_operator.render import duration

ROUND_SECONDS = 10.0
AT_ONCE = 32


class ProgressBook:
    """The latest Progress by Job uid, and what each run's status may show of it."""

    def __init__(self, cache: Cache, settings: Settings, meters: Meters) -> None:
        self.latest: dict[str, Progress] = {}
        self._cache, self._settings, self._meters = cache, settings, meters
        self._shown: dict[Key, tuple[str, str]] = {}
        self._time: dict[Key, float] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)

    def shown(self, key: Key) -> tuple[str, str]:
        """For `status.progress` and `status.eta`."""
        return self._shown.get(key, ("", ""))

    async def keep_pulling(self, changed: Callable[[Key], None]) -> None:
        """Asks every running attempt in turn, for ever; `changed` gets runs with something new."""
        loop = asyncio.get_running_loop()
        while True:
            begun = loop.time()
            asked = {r.uid: pod for r in self._cache.records.values() if (pod := _speaker(r))}
            for uid in self.latest.keys() - asked.keys():
                del self.latest[uid]
            pulls = (self._pull(uid, pod) for uid, pod in asked.items())
            told = await asyncio.gather(*pulls, return_exceptions=True)
            news = {key for key in told if isinstance(key, tuple)}
            for key in news | self._show(asked, loop.time()):
                changed(key)
            round_seconds = min(ROUND_SECONDS, self._settings.progress_seconds)
            await asyncio.sleep(max(0.1, begun + round_seconds - loop.time()))

    async def _pull(self, uid: str, pod: PodObject) -> Key | None:
        """The run, if its dead experts are others now."""
        async with self._slots:
            found = await pull(self._settings.trainer_port, pod.ip)
        if found is None:
            self._meters["progress_failures"].inc()
            return None
        before = dead_experts(self.latest.get(uid))
        self.latest[uid] = found
        return pod.origin.key if (before or ()) != (dead_experts(found) or ()) else None

    def _show(self, asked: dict[str, PodObject], now: float) -> set[Key]:
        """Runs whose display changes now: it may once in settings.progress_seconds."""
        found: dict[Key, list[Progress]] = {}
        for uid, pod in asked.items():
            if uid in self.latest:
                found.setdefault(pod.origin.key, []).append(self.latest[uid])
        changed = set()
        for key in self._shown.keys() | found.keys():
            words = in_words(found.get(key, []))
            due = now - self._time.get(key, 0.0) >= self._settings.progress_seconds
            if words != self._shown.get(key, ("", "")) and (due or not found.get(key)):
                self._shown[key], self._time[key] = words, now
                changed.add(key)
            if not found.get(key):
                self._shown.pop(key, None)
                self._time.pop(key, None)
        return changed


def _speaker(record: Record) -> PodObject | None:
    """The pod of rank 0 that runs, if it has an address."""
    if record.stopping or record.job is None or record.job.deleting:
        return None
    return next((pod for pod in record.live_pods if pod.rank == 0 and pod.started and pod.ip), None)


def in_words(running: list[Progress]) -> tuple[str, str]:
    """Per cent of the slowest stage, and the time that it still takes: `42%`, `1h10m`."""
    known = [progress for progress in running if progress.steps]
    if not known:
        return "", ""
    slowest = max(known, key=lambda p: (p.eta_seconds or 0.0, -p.step / p.steps))
    share = min(100, int(100 * slowest.step / slowest.steps))
    return f"{share}%", "" if slowest.eta_seconds is None else duration(slowest.eta_seconds)
