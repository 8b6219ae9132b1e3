"""The processes ("ranks") of one stage: which of them this is, and how they agree. No torch.

launch.py starts several and gives each its Place; __main__ and checkpoint.py talk to the others
through `Ranks`, which is one process alone here and several in distributed.py.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from btx_api.names import RANK_ENV

T = TypeVar("T")
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Of one rank among all."""

    rank: int = 0
    world: int = 1
    """Ranks on all nodes."""
    local: int = 0
    """Number within its node, and of its GPU."""
    meeting: str = ""
    """Where the ranks find each other: torch's init_method."""
    parent: int = 0
    """Process that started it; 0: nobody did, it is alone."""

    def plain(self) -> str:
        """For the environment of a rank."""
        return json.dumps(asdict(self))

    def die_with_parent(self) -> None:
        """Lets the system end this process with the one that started it, however that ends."""
        if self.parent and sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self.parent:
                os.kill(os.getpid(), signal.SIGKILL)


def here() -> Place:
    """Of this process."""
    return Place(**json.loads(os.environ.get(RANK_ENV, "{}")))


class Ranks:
    """One process alone. Of several, all must make the same calls in the same order."""

    rank = 0
    world = 1

    def share(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0."""
        return make()

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank."""
        return [value]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag: whether some rank has it set."""
        return flags

    def add(self, tensor: Any) -> None:
        """Makes the tensor the sum over all ranks, in place."""

    def another(self) -> "Ranks":
        """The same ranks, for the use of another thread."""
        return self

    def leave(self) -> None:
        """The last call: nobody ends while another still needs an answer."""
