"""Chunks of records to encoded documents: which side of the held-out split, and token ids.

Threads, which do little more than wait where each has a process of its own (processes.py). Called
by stages/prepare.py.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from btx_trainer.errors import ConfigurationError
from btx_trainer.shards import Encoded
from btx_trainer.sources import Chunk, documents
from btx_trainer.tokenizer import Ids, Lengths

Item = TypeVar("Item")
Made = TypeVar("Made")
Hashes = npt.NDArray[np.uint64]


def hashes(texts: Sequence[bytes]) -> Hashes:
    """uint64 [texts]: what decides the side of the split, the same in every domain and run."""
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def held_out_limit(chunks: Iterable[Chunk], share: float, max_record_bytes: int) -> int:
    """Documents with a hash below it are held out: `share` of them, and at least one.

    Where that share holds out none or all, exactly the document with the lowest hash. Reads on
    only until there is a document on either side. ConfigurationError naming prepare.heldOut if
    there are not two different documents.
    """
    limit = int(share * 2**64)
    lowest, highest = 2**64, -1
    for chunk in chunks if limit else ():
        for value in hashes(documents(chunk, max_record_bytes).texts).tolist():
            lowest, highest = min(lowest, value), max(highest, value)
        if lowest < limit <= highest:
            return limit
    # Everything was read, and all of it is on one side.
    if lowest == highest:
        raise ConfigurationError(
            "prepare.heldOut", "a held-out split needs at least two different documents"
        )
    return lowest + 1 if highest >= 0 else limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """What a chunk becomes; thread-safe."""

    encode: Callable[[Sequence[bytes]], tuple[Ids, Lengths]]
    """See tokenizer.Tokenizer.encode."""
    limit: int
    """See `held_out_limit`."""
    max_record_bytes: int

    def __call__(self, chunk: Chunk) -> tuple[Chunk, Encoded, str]:
        """The chunk; its documents; why the first undecodable record is undecodable."""
        found = documents(chunk, self.max_record_bytes)
        tokens, lengths = self.encode(found.texts)
        values = hashes(found.texts)
        encoded = Encoded(
            tokens=tokens,
            lengths=lengths,
            sizes=np.array([len(text) for text in found.texts], np.int64),
            hashes=values,
            held_out=values < self.limit,
            lost=Counter(found.lost),
        )
        return chunk, encoded, found.example


def in_order(
    function: Callable[[Item], Made], items: Iterable[Item], threads: int
) -> Generator[Made]:
    """`map` by so many threads, which run at most 2 x threads items ahead."""
    pool = ThreadPoolExecutor(threads)
    ahead: deque[Future[Made]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
