"""Global index -> sample: which tokens a training step sees, and the batches of a held-out split.

`Sampler.sample(i)` is a pure function of (seed, i), in closed form: nothing is stored per sample,
a loader's state is the step, and the order does not depend on the number of ranks. Called by
loop.py, stages/finetune.py and stages/evaluate.py.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from btx_api.spec import Phase

from btx_trainer.shards import Prepared, SourceShards

IGNORED = -100
"""Label of a position that predicts nothing."""
_BITS = 62
"""Of the fixed-point shares that assign samples to sources."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B rows of T positions. Documents of a row cannot see each other: positions restart at 0."""

    input_ids: Int64
    """[B, T]"""
    labels: Int64
    """[B, T]: the next token of the same document, IGNORED where there is none."""
    position_ids: Int64
    """[B, T]"""
    domains: Int64
    """[B]: input index of the domain; 0 in a held-out batch."""
    target_bytes: float = 0.0
    """Held-out batches: bytes of text that the labels stand for (bits per byte)."""

    @property
    def targets(self) -> int:
        """Labels that are not IGNORED."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Where a sample's tokens are: T + 1 of them from `start`, round the end of the stream."""

    phase: int
    domain: int
    """Input index."""
    source: int
    """Within the domain."""
    epoch: int
    """How often every sequence of the source was drawn before."""
    start: int
    """Token of the source's stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Leaf:
    """A source that samples are drawn from."""

    domain: int
    source: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fork:
    """Sends a fixed share of what comes to the left, spread as evenly as whole samples can be."""

    share: int
    """2 ** _BITS is everything."""
    left: "_Node"
    right: "_Node"

    def lefts(self, count: int) -> int:
        """How many of the first `count` go left: the nearest whole number to count * share."""
        return (count * self.share + (1 << _BITS - 1)) >> _BITS


_Node = _Leaf | _Fork


def _tree(nodes: Sequence[tuple[_Node, float]]) -> _Node:
    """A tree that shares out by relative weights above 0; the lightest deepest, for small errors.

    A fork rounds by at most 1/2, and passes that on in proportion.
    """
    heap = [(weight, i, node) for i, (node, weight) in enumerate(nodes)]
    heapify(heap)
    while len(heap) > 1:
        (part, _, left), (rest, i, right) = heappop(heap), heappop(heap)
        share = round(part / (part + rest) * (1 << _BITS))
        heappush(heap, (part + rest, i, _Fork(share=share, left=left, right=right)))
    return heap[0][2]


def _descend(node: _Node, index: int) -> tuple[_Leaf, int]:
    """The leaf of the index-th sample, and how many of that leaf came before it."""
    while isinstance(node, _Fork):
        before = node.lefts(index)
        if node.lefts(index + 1) > before:
            node, index = node.left, before
        else:
            node, index = node.right, index - before
    return node, index


def _counts(node: _Node, count: int) -> dict[_Leaf, int]:
    """How many of the first `count` samples each leaf gets."""
    if isinstance(node, _Leaf):
        return {node: count}
    lefts = node.lefts(count)
    return {**_counts(node.left, lefts), **_counts(node.right, count - lefts)}


@lru_cache(maxsize=4096)
def _key(*parts: object) -> int:
    """64 random bits that depend on `parts` alone."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _permuted(index: int, size: int, key: int) -> int:
    """Where a permutation of 0..size-1, drawn by `key`, puts `index`.

    A Feistel network over an even number of bits, repeated until it lands inside.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(key + turn * 0x9E3779B97F4A7C15 ^ right) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """SplitMix64's finalizer: 64 bits to 64 bits."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stretch:
    """A phase in whole steps."""

    tree: _Node
    first_step: int
    steps: int
    drawn: dict[_Leaf, int]
    """Samples per leaf in the phases before."""


class Sampler:
    """All samples of a training stage.

    Weights are relative token probabilities, of domains within a phase and of sources within a
    domain (BTX paper, section 4.1). At every step what a source has given is within about one
    sample of its share of the phase. A source's sequences come in a shuffled order without
    repetition, in every epoch another; over the phases it goes on where it was.
    """

    def __init__(
        self, *, phases: Sequence[Phase], domains: Mapping[str, Prepared], sequence_length: int,
        batch_tokens: int, seed: int,
    ) -> None:  # fmt: skip
        self._length, self._seed = sequence_length, seed
        self._streams = {
            _Leaf(domain=int(name), source=i): stream
            for name, prepared in domains.items()
            for i, stream in enumerate(prepared.sources)
            if stream.total and stream.index.weight
        }
        self.batch_size = batch_tokens // sequence_length
        """Sequences per step over all ranks."""
        self._stretches: list[_Stretch] = []
        self.steps = 0
        """Of all phases; each phase's tokens are rounded up to whole steps."""
        drawn = dict.fromkeys(self._streams, 0)
        for phase in phases:
            steps = -(-phase.tokens // batch_tokens)
            tree = self._phase_tree(phase)
            self._stretches.append(
                _Stretch(tree=tree, first_step=self.steps, steps=steps, drawn=drawn)
            )
            new = _counts(tree, steps * self.batch_size)
            drawn = {leaf: count + new.get(leaf, 0) for leaf, count in drawn.items()}
            self.steps += steps

    def _phase_tree(self, phase: Phase) -> _Node:
        nodes: list[tuple[_Node, float]] = []
        # By number: a recipe's mapping has no order of its own.
        for domain, weight in sorted((int(name), w) for name, w in phase.domains.items()):
            leaves: list[tuple[_Node, float]] = [
                (leaf, stream.index.weight)
                for leaf, stream in self._streams.items()
                if leaf.domain == domain
            ]
            if weight:
                assert leaves, f"domain {domain} has no tokens"
                nodes.append((_tree(leaves), weight))
        return _tree(nodes)

    def phase_of(self, step: int) -> int:
        """Index of the phase that a step belongs to."""
        ends = accumulate(stretch.steps for stretch in self._stretches)
        return next(i for i, end in enumerate(ends) if step < end)

    def sample(self, i: int) -> Sample:
        """The i-th sample of all, 0 <= i < steps * batch_size; depends on (seed, i) alone."""
        step, slot = divmod(i, self.batch_size)
        phase = self.phase_of(step)
        stretch = self._stretches[phase]
        # Within a step the places are shuffled, or a rank would always see the same domain.
        slot = _permuted(slot, self.batch_size, _key(self._seed, "slot", step))
        index = (step - stretch.first_step) * self.batch_size + slot
        leaf, rank = _descend(stretch.tree, index)
        total = self._streams[leaf].total
        sequences = max(1, total // self._length)
        epoch, place = divmod(stretch.drawn[leaf] + rank, sequences)
        key = _key(self._seed, leaf.domain, leaf.source, epoch)
        # The shift moves the cuts, and the rest that is too short for a sequence.
        start = (_permuted(place, sequences, key) * self._length + key) % total
        return Sample(phase=phase, domain=leaf.domain, source=leaf.source, epoch=epoch, start=start)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """What a rank sees in a step: the samples i of the step with i % world == rank."""
        first = step * self.batch_size
        numbers = [i for i in range(first, first + self.batch_size) if i % world == rank]
        shape = (len(numbers), self._length)
        ids, labels, positions = (np.empty(shape, np.int64) for _ in range(3))
        domains = np.empty(len(numbers), np.int64)
        for row, i in enumerate(numbers):
            sample = self.sample(i)
            stream = self._streams[_Leaf(domain=sample.domain, source=sample.source)]
            ids[row], labels[row], positions[row] = _window(stream, sample.start, self._length)
            domains[row] = sample.domain
        return Batch(input_ids=ids, labels=labels, position_ids=positions, domains=domains)


def _window(stream: SourceShards, start: int, length: int) -> tuple[Int64, Int64, Int64]:
    """input_ids, labels, position_ids [length] of a stream read round from `start`."""
    tokens = np.empty(length + 1, np.int64)
    begins = np.zeros(length + 1, np.bool_)
    filled = 0
    while filled <= length:
        stop = min(start + length + 1 - filled, stream.total)
        tokens[filled : filled + stop - start] = stream.tokens(start, stop)
        begins[stream.starts(start, stop) - start + filled] = True
        filled, start = filled + stop - start, stop % stream.total
    places = np.arange(length)
    positions = places - np.maximum.accumulate(np.where(begins[:-1], places, 0))
    return tokens[:-1], np.where(begins[1:], IGNORED, tokens[1:]), positions


def held_out_batches(
    prepared: Prepared, *, sequence_length: int, max_tokens: int, batch_size: int
) -> Iterator[Batch]:
    """The held-out documents in their order, until `max_tokens` labels.

    A document is never cut but by the sequence length and at the very end, so that its loss does
    not depend on what else is in the row: one with more than sequence_length labels is cut there,
    and each piece is a document of its own with fresh positions. A batch is filled first-fit.
    """
    index = prepared.index
    rows = _Rows(batch_size, sequence_length, index.eos)
    for tokens, text_bytes in _pieces(prepared, sequence_length, max_tokens):
        if not rows.fits(tokens):
            yield rows.batch()
            rows = _Rows(batch_size, sequence_length, index.eos)
        rows.add(tokens, text_bytes)
    if rows.used.any():
        yield rows.batch()


def _pieces(
    prepared: Prepared, sequence_length: int, max_tokens: int
) -> Iterator[tuple[Int64, float]]:
    """(tokens, bytes of text that all but the first stand for).

    A document's bytes are spread evenly over its tokens but the special ones.
    """
    held, left = prepared.held_out, max_tokens
    for start, count, size in held.documents.tolist():
        tokens = held.tokens(start, start + count)
        text = ~np.isin(tokens, prepared.index.specials)
        per_token = size / max(int(text.sum()), 1)
        for first in range(0, count - 1, sequence_length):
            if not left:
                return
            stop = min(first + min(sequence_length, left) + 1, count)
            left -= stop - first - 1
            yield tokens[first:stop], per_token * int(text[first + 1 : stop].sum())


class _Rows:
    """A held-out batch while it is filled. What stays empty is a document that nobody predicts."""

    def __init__(self, batch_size: int, length: int, filler: int) -> None:
        shape = (batch_size, length)
        self._ids = np.full(shape, filler, np.int64)
        self._labels = np.full(shape, IGNORED, np.int64)
        self._positions = np.tile(np.arange(length), (batch_size, 1))
        self.used = np.zeros(batch_size, np.int64)
        self._bytes = 0.0

    def fits(self, tokens: Int64) -> bool:
        return bool((self.used + len(tokens) - 1 <= self._ids.shape[1]).any())

    def add(self, tokens: Int64, text_bytes: float) -> None:
        row = int(np.argmax(self.used + len(tokens) - 1 <= self._ids.shape[1]))
        first, stop = self.used[row], self.used[row] + len(tokens) - 1
        self._ids[row, first:stop] = tokens[:-1]
        self._labels[row, first:stop] = tokens[1:]
        for begin in (first, stop):
            self._positions[row, begin:] = np.arange(self._ids.shape[1] - begin)
        self.used[row] = stop
        self._bytes += text_bytes

    def batch(self) -> Batch:
        rows = int((self.used > 0).sum())
        return Batch(
            input_ids=self._ids[:rows], labels=self._labels[:rows],
            position_ids=self._positions[:rows], domains=np.zeros(rows, np.int64),
            target_bytes=self._bytes,
        )  # fmt: skip
