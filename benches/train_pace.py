"""Steps of a training loop when bench_train.py asks for them; no package is needed."""

import itertools
import json
import sys
import time
from typing import Any


def say(**values: Any) -> None:
    """One line that bench_train.py reads."""
    print(json.dumps(values), flush=True)


class Pace:
    """Lets a loop run so many steps per line of standard input, and says how long they took."""

    text = 0.0
    """Tokens of text in a batch, where that differs from its size."""

    def __init__(self, steps: int) -> None:
        self._steps, self._left = steps, 0
        self._times: list[float] = []

    def ready(self) -> None:
        """Before the first step."""
        say(ready=True)
        self._begin()

    def step(self) -> None:
        """At the end of each step."""
        self._left -= 1
        self._times.append(time.perf_counter())
        if not self._left:
            wall, cpu = self._times[-1] - self._started, time.process_time() - self._cpu
            ends = [self._started, *self._times]
            longest = max(b - a for a, b in itertools.pairwise(ends))
            say(wall=wall, cpu=cpu, text=Pace.text * self._steps, longest=longest, peak=_peak())
            self._begin()

    def _begin(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self._left, self._times = self._steps, []
        self._started, self._cpu = time.perf_counter(), time.process_time()


def _peak() -> int:
    """Bytes of GPU memory that tensors have had at most; 0 without a GPU."""
    torch = sys.modules["torch"]
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0
