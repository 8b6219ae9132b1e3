"""Arithmetic on stored weights: the dtypes, the weighted mean, the one cast, fresh draws.

Sums are kept in fp32 (fp64 for fp32 sources), divided once and cast once, to nearest even; the
same inputs give the same bytes. No torch. Called by weights.py, from several threads at once.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK_BYTES = 2**18
"""Of stored values, a multiple of 4: the sums and temporaries of a block stay in a core's cache."""
HIGH = np.uint32(0xFFFF0000)

Array = npt.NDArray[Any]
Fill = Callable[[int, memoryview], None]
"""(number of a source, buffer): fills the buffer from that source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dtype:
    """How a safetensors dtype is stored and summed; bf16 is unknown to numpy: its 16 bits."""

    stored: np.dtype[Any]
    summed: np.dtype[Any]


DTYPES: Mapping[str, Dtype] = {
    "BF16": Dtype(stored=np.dtype("<u2"), summed=np.dtype("<f4")),
    "F16": Dtype(stored=np.dtype("<f2"), summed=np.dtype("<f4")),
    "F32": Dtype(stored=np.dtype("<f4"), summed=np.dtype("<f8")),
}


class _Scratch(threading.local):
    """Memory for the blocks of a thread: allocated once, for the kernel zeroes fresh pages."""

    def __init__(self) -> None:
        self._memory: dict[str, Array] = {}

    def array(self, name: str, dtype: Any, size: int) -> Array:
        """[size]; the same memory for the same name."""
        wanted = size * np.dtype(dtype).itemsize
        memory = self._memory.get(name)
        if memory is None or memory.size < wanted:
            memory = self._memory[name] = np.empty(wanted, np.uint8)
        return memory[:wanted].view(dtype)


_scratch = _Scratch()


def mean(
    dtype: str,
    weights: Sequence[float],
    fill: Callable[[int, int, memoryview], None],
    out: memoryview,
) -> None:
    """Writes the weighted mean of as many sources as there are weights to `out`.

    `fill(start, source, buffer)` fills the buffer from byte `start` of that source on.
    """
    block_mean = _mean_bf16 if dtype == "BF16" else _mean_plain
    kind = DTYPES[dtype]
    # Infinities and NaN in a source stay what they are, without a warning per block.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(out), BLOCK_BYTES):
            block = out[start : start + BLOCK_BYTES]
            block_mean(kind, weights, partial(fill, start), block)


def _mean_plain(kind: Dtype, weights: Sequence[float], fill: Fill, out: memoryview) -> None:
    size = len(out) // kind.stored.itemsize
    stored = _scratch.array("stored", kind.stored, size)
    values = _scratch.array("values", kind.summed, size)
    total = _scratch.array("total", kind.summed, size)
    for source, weight in enumerate(weights):
        fill(source, stored.data.cast("B"))
        np.copyto(values if source else total, stored)
        _add(total, values, source, weight)
    total /= math.fsum(weights)
    np.copyto(np.frombuffer(out, kind.stored), total, casting="same_kind")


def _mean_bf16(kind: Dtype, weights: Sequence[float], fill: Fill, out: memoryview) -> None:
    """Two numbers at a time: either half of a 32-bit word, in place or shifted, is an fp32."""
    size = -(-len(out) // 4)
    words = _scratch.array("words", "<u4", size)
    spare = _scratch.array("spare", "<u4", size)
    high = _scratch.array("high", kind.summed, size)
    low = _scratch.array("low", kind.summed, size)
    # Where the numbers are odd, nothing fills the last half word.
    words[-1] = 0
    for source, weight in enumerate(weights):
        fill(source, words.data.cast("B")[: len(out)])
        for total, split, by in ((high, np.bitwise_and, HIGH), (low, np.left_shift, 16)):
            values = spare.view(kind.summed) if source else total
            split(words, by, out=values.view("<u4"))
            _add(total, values, source, weight)
    for total in (high, low):
        np.divide(total, math.fsum(weights), out=total)
        _round_bf16(total.view("<u4"), spare)
    np.bitwise_and(high.view("<u4"), HIGH, out=words)
    words |= np.right_shift(low.view("<u4"), 16, out=spare)
    out[:] = words.data.cast("B")[: len(out)]


def _add(total: Array, values: Array, source: int, weight: float) -> None:
    """`values` are `total` itself if they are the first: 0.0 + -0.0 would lose the sign."""
    if weight != 1:
        target = values if source else total
        target *= weight
    if source:
        total += values


def _round_bf16(bits: Array, spare: Array) -> None:
    """In place: the upper halves become the nearest bf16, ties to even.

    NaN stays NaN: the low half of a NaN that comes from bf16 sources is zero, nothing carries.
    """
    np.right_shift(bits, 16, out=spare)
    spare &= 1
    spare += 0x7FFF
    bits += spare


def narrow(values: Array, dtype: str) -> Array:
    """Cast once, to nearest even."""
    if dtype != "BF16":
        return values.astype(DTYPES[dtype].stored)
    bits = values.view("<u4").copy()
    _round_bf16(bits, np.empty_like(bits))
    return (bits >> 16).astype(np.uint16)


def normal(name: str, size: int, dtype: str, *, std: float, seed: int) -> memoryview:
    """Draws that depend on seed and tensor name alone, not on the order of tensors or shards."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16]
    draws = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    values = draws.standard_normal(size, np.float32) * np.float32(std)
    return narrow(values, dtype).data.cast("B")
