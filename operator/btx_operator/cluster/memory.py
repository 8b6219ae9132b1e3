"""Memory that is free goes back to the system. Called by __main__.py at the start, by resync.py.

Where the C library is another than glibc nothing happens.
"""

import contextlib
import ctypes
import gc

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_LARGE_BYTES = 128 * 2**10
"""glibc's own value at first; it raises it to the size of the largest buffer that was freed."""


def set_up() -> None:
    """Large buffers are given back when they are freed, and no thread has a heap of its own."""
    # The cache is large and lives on: walking it at every thousandth object is half of all work.
    gc.set_threshold(20_000, 20, 50)
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """What lists and bursts have freed; rings of objects, which nobody looks for often, as well."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
