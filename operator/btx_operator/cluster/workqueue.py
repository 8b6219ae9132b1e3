"""Runs that wait for a worker: each at most once, by one worker at a time, later after an error.

The semantics are those of client-go's rate-limited queue: a key that is added while it is worked on
is worked on once more afterwards.
"""

import asyncio
import random
import time
from collections import deque

from btx_operator.cluster.objects import Key

FIRST_DELAY, LAST_DELAY = 0.2, 30.0
"""Seconds after the first error of a key, and at most; doubled by each, with jitter."""


class WorkQueue:
    """All methods are called from one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[Key] = deque()
        self._since: dict[Key, float] = {}
        self._working: set[Key] = set()
        self._again: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._errors: dict[Key, int] = {}
        self._some = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> int:
        """Keys that a worker has now."""
        return len(self._working)

    def oldest(self, now: float) -> float:
        """Seconds that the first one waits."""
        return now - self._since[self._waiting[0]] if self._waiting else 0.0

    def add(self, key: Key) -> None:
        """As soon as a worker is free."""
        if key in self._working:
            self._again.add(key)
        elif key not in self._since:
            self._since[key] = time.monotonic()
            self._waiting.append(key)
            self._some.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """After so many seconds, unless an earlier time is set already."""
        due = asyncio.get_running_loop().time() + seconds
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= due:
                return
            timer.cancel()
        self._timers[key] = asyncio.get_running_loop().call_at(due, self._ring, key)

    def _ring(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.add(key)

    async def get(self) -> tuple[Key, float]:
        """The next key and the seconds that it waited; `done` must follow."""
        while not self._waiting:
            self._some.clear()
            await self._some.wait()
        key = self._waiting.popleft()
        self._working.add(key)
        return key, time.monotonic() - self._since.pop(key)

    def done(self, key: Key) -> None:
        """The worker is through with it."""
        self._working.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def failed(self, key: Key, least: float = 0.0) -> float:
        """It is tried again after the seconds that this returns."""
        errors = self._errors[key] = self._errors.get(key, 0) + 1
        delay = min(LAST_DELAY, FIRST_DELAY * 2.0 ** min(errors - 1, 20))
        delay = max(least, delay * random.uniform(0.75, 1.25))
        # What an event asks for meanwhile would be refused as well.
        self._again.discard(key)
        self.add_after(key, delay)
        return delay

    def worked(self, key: Key) -> None:
        """Its errors are over."""
        self._errors.pop(key, None)

    def forget(self, key: Key) -> None:
        """There is no such run any more."""
        self._errors.pop(key, None)
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
