"""Token shards, the format of a prepare artifact: writer and reader together.

shards.json                 Index
source-<i>-<nnnnn>.bin      training tokens of source i, one document after the other
source-<i>-documents.bin    int64 [documents + 1]: where each document starts, and the end
held-out-<nnnnn>.bin        tokens of the held-out documents
held-out-documents.bin      int64 [documents, 3]: start, tokens, bytes of text
tokenizer.json              unless it is the byte tokenizer

Every document ends with eos. Numbers are little-endian; token files but a stream's last hold
FILE_BYTES. Held-out documents stand in the order of evaluation: by hash within a source, sources
in turn by weight, so that any first part of them is a sample of the domain.
Written by stages/prepare.py; read by data.py and whoever needs counts.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
import numpy.typing as npt
from btx_api.artifact import SHARDS
from btx_api.spec import Model, Weight
from pydantic import Field, ValidationError

from btx_trainer.errors import ConfigurationError
from btx_trainer.storage import Sink
from btx_trainer.tokenizer import Tokenizer

FILE_BYTES = 256 << 20
"""Size of a full token file."""
HELD_OUT = "held-out"
TOKENIZER = "tokenizer.json"

Tokens = npt.NDArray[np.integer]
Int64 = npt.NDArray[np.int64]
Number = Annotated[int, Field(ge=0)]


class SourceIndex(Model):
    """One source: what was read, and what of it is for training."""

    weight: Weight
    tokens: Number = 0
    """For training, each document's eos included."""
    documents: Number = 0
    """For training."""
    held_out: Number = 0
    """Documents on the other side of the split."""
    empty: Number = 0
    undecodable: Number = 0
    oversized: Number = 0
    """Records left out, see sources.Lost."""

    @property
    def records(self) -> int:
        """Read in all."""
        return self.documents + self.held_out + self.empty + self.undecodable + self.oversized


class HeldOutIndex(Model):
    """The split that no training sees."""

    tokens: Number = 0
    documents: Number = 0
    bytes: Number = 0
    """Of text."""


class Index(Model):
    """shards.json."""

    schema_version: Literal[1] = 1
    tokenizer: Literal["bytes", "file"]
    vocab_size: Annotated[int, Field(ge=1)]
    dtype: Literal["uint16", "uint32"]
    eos: Number
    specials: tuple[Number, ...]
    """Ids that stand for no text, see tokenizer.Tokenizer."""
    sources: tuple[SourceIndex, ...]
    held_out: HeldOutIndex


def token_file(stream: str, number: int) -> str:
    """Name of the n-th token file of a stream (`source-<i>` or `held-out`)."""
    return f"{stream}-{number:05d}.bin"


def documents_file(stream: str) -> str:
    """Name of the file that says where a stream's documents are."""
    return f"{stream}-documents.bin"


def _dtype(name: str) -> np.dtype[np.integer]:
    return np.dtype(name).newbyteorder("<")


class Out(Protocol):
    """Where files go: artifacts.Attempt."""

    def sink(self, name: str) -> Sink:
        """A new file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Some documents of one source, in order."""

    tokens: Tokens
    """[sum of lengths], one document after the other."""
    lengths: Int64
    """[documents], in tokens."""
    sizes: Int64
    """[documents], in bytes of text."""
    hashes: npt.NDArray[np.uint64]
    """[documents], of the text."""
    held_out: npt.NDArray[np.bool_]
    """[documents]: which side of the split."""
    lost: Counter[str]
    """Records left out, by sources.Lost."""


class _TokenWriter:
    """Writes the token files of one stream."""

    def __init__(self, out: Out, stream: str, dtype: str) -> None:
        self._out, self._stream, self._type = out, stream, _dtype(dtype)
        self._full = FILE_BYTES // self._type.itemsize
        self._sink: Sink | None = None
        self.total = 0

    def write(self, tokens: Tokens) -> None:
        while len(tokens):
            number, filled = divmod(self.total, self._full)
            self._sink = self._sink or self._out.sink(token_file(self._stream, number))
            part = tokens[: self._full - filled]
            self._sink.write(part.astype(self._type).tobytes())
            self.total += len(part)
            tokens = tokens[len(part) :]
            if self.total % self._full == 0:
                self.close()

    def close(self, kind: type[BaseException] | None = None) -> None:
        if self._sink:
            self._sink.__exit__(kind)
        self._sink = None


class SourceWriter(AbstractContextManager["SourceWriter"]):
    """Writes the training documents of one source; hands the others to the held-out split."""

    def __init__(self, writer: "Writer", number: int, weight: float) -> None:
        stream = f"source-{number}"
        self._writer, self._weight = writer, weight
        self._tokens = _TokenWriter(writer.out, stream, writer.dtype)
        self._starts = writer.out.sink(documents_file(stream))
        self._starts.write(np.zeros(1, "<i8").tobytes())
        self._counts: Counter[str] = Counter()
        self._held: list[tuple[Int64, npt.NDArray[np.uint64]]] = []

    def write(self, some: Encoded) -> None:
        """The next documents."""
        held, lengths = some.held_out, some.lengths
        of_held = np.repeat(held, lengths)
        ends = self._tokens.total + np.cumsum(lengths[~held])
        self._starts.write(ends.astype("<i8").tobytes())
        self._tokens.write(some.tokens[~of_held])
        self._counts.update(some.lost)
        self._counts.update(documents=int((~held).sum()), held_out=int(held.sum()))
        if held.any():
            stop = self._writer.held.total + np.cumsum(lengths[held])
            table = np.stack([stop - lengths[held], lengths[held], some.sizes[held]], axis=1)
            self._held.append((table, some.hashes[held]))
            self._writer.held.write(some.tokens[of_held])

    @property
    def index(self) -> SourceIndex:
        """What was written so far."""
        return SourceIndex(weight=self._weight, tokens=self._tokens.total, **self._counts)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._tokens.close(kind)
        self._starts.__exit__(kind)
        if kind is None:
            self._writer.add(self.index, self._held)


class Writer(AbstractContextManager["Writer"]):
    """Writes an artifact, source by source. Memory: 32 bytes per held-out document."""

    def __init__(self, out: Out, tokenizer: Tokenizer) -> None:
        self.out, self._tokenizer = out, tokenizer
        small = tokenizer.vocab_size <= 1 << 16
        self.dtype: Literal["uint16", "uint32"] = "uint16" if small else "uint32"
        self.held = _TokenWriter(out, HELD_OUT, self.dtype)
        self._sources: list[SourceIndex] = []
        self._tables: list[Int64] = []
        self._turns: list[npt.NDArray[np.float64]] = []

    def source(self, weight: float) -> SourceWriter:
        """The next source; a context."""
        return SourceWriter(self, len(self._sources), weight)

    def add(self, index: SourceIndex, held: Sequence[tuple[Int64, npt.NDArray[np.uint64]]]) -> None:
        """A finished source with its held-out documents."""
        self._sources.append(index)
        if not held:
            return
        table = np.concatenate([rows for rows, _ in held])
        order = np.argsort(np.concatenate([hashes for _, hashes in held]), kind="stable")
        table = table[order]
        # Its turn comes when its source has given as much of its share as the others of theirs.
        before = np.cumsum(table[:, 1]) - table[:, 1]
        self._tables.append(table)
        self._turns.append(before / index.weight)

    def finish(self) -> Index:
        """Writes the held-out table and shards.json; returns the latter."""
        self.held.close()
        rows = np.zeros((0, 3), np.int64)
        if self._tables:
            order = np.argsort(np.concatenate(self._turns), kind="stable")
            rows = np.concatenate(self._tables)[order]
            with self.out.sink(documents_file(HELD_OUT)) as sink:
                sink.write(rows.astype("<i8").tobytes())
        tokenizer = self._tokenizer
        index = Index(
            tokenizer=tokenizer.kind, vocab_size=tokenizer.vocab_size, dtype=self.dtype,
            eos=tokenizer.eos, specials=tokenizer.specials, sources=tuple(self._sources),
            held_out=HeldOutIndex(
                tokens=self.held.total, documents=len(rows), bytes=int(rows[:, 2].sum())
            ),
        )  # fmt: skip
        with self.out.sink(SHARDS) as sink:
            sink.write((index.model_dump_json(indent=1) + "\n").encode())
        return index

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.held.close(kind)


class TokenStream:
    """The tokens of a source or of the held-out split, memory-mapped."""

    def __init__(self, folder: Path, stream: str, dtype: str, total: int) -> None:
        self.total = total
        self._type = _dtype(dtype)
        self._full = FILE_BYTES // self._type.itemsize
        self._paths = []
        for number in range(-(-total // self._full)):
            path = folder / token_file(stream, number)
            _check_size(path, min(self._full, total - number * self._full) * self._type.itemsize)
            self._paths.append(path)

    @cached_property
    def _files(self) -> list[Tokens]:
        return [np.asarray(np.memmap(path, self._type, "r")) for path in self._paths]

    def tokens(self, start: int, stop: int) -> Int64:
        """int64 [stop - start], 0 <= start <= stop <= total."""
        parts = []
        while start < stop:
            number, offset = divmod(start, self._full)
            part = self._files[number][offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


class SourceShards(TokenStream):
    """The training documents of one source."""

    def __init__(self, folder: Path, number: int, index: SourceIndex, dtype: str) -> None:
        stream = f"source-{number}"
        super().__init__(folder, stream, dtype, index.tokens)
        self.index = index
        self._path = folder / documents_file(stream)
        if index.documents:
            _check_size(self._path, 8 * (index.documents + 1))
            if self._starts[0] != 0 or self._starts[-1] != index.tokens:
                raise _wrong(self._path, f"does not cover the index's {index.tokens} tokens")

    @cached_property
    def _starts(self) -> Int64:
        return np.asarray(np.memmap(self._path, "<i8", "r"))

    def starts(self, start: int, stop: int) -> Int64:
        """Where documents start, start <= position < stop, ascending."""
        first, last = np.searchsorted(self._starts, (start, stop))
        return self._starts[first:last]


class HeldOut(TokenStream):
    """The held-out documents, in the order of evaluation."""

    def __init__(self, folder: Path, index: HeldOutIndex, dtype: str) -> None:
        super().__init__(folder, HELD_OUT, dtype, index.tokens)
        self.index = index
        self.documents: Int64 = np.zeros((0, 3), np.int64)
        """[documents, 3]: start, tokens, bytes of text."""
        if index.documents:
            path = folder / documents_file(HELD_OUT)
            _check_size(path, 24 * index.documents)
            self.documents = np.memmap(path, "<i8", "r").reshape(-1, 3)
            if int(self.documents[:, 1].sum()) != index.tokens:
                raise _wrong(path, f"does not cover the index's {index.tokens} tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """An open prepare artifact."""

    index: Index
    sources: tuple[SourceShards, ...]
    held_out: HeldOut


def open(folder: Path) -> Prepared:
    """Opens the artifact in a local folder; ConfigurationError names a file that is not right.

    Bytes are not read: whoever fetched the artifact has verified them.
    """
    path = folder / SHARDS
    try:
        index = Index.model_validate_json(path.read_bytes(), by_alias=True, by_name=False)
    except (OSError, ValidationError) as error:
        problem = str(error).splitlines()[0]
        raise _wrong(path, f"is no index of token shards ({problem})") from error
    return Prepared(
        index=index,
        sources=tuple(
            SourceShards(folder, i, source, index.dtype) for i, source in enumerate(index.sources)
        ),
        held_out=HeldOut(folder, index.held_out, index.dtype),
    )


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise _wrong(path, "is missing")
    if path.stat().st_size != expected:
        raise _wrong(path, f"has {path.stat().st_size} bytes, the index says {expected}")


def _wrong(path: Path, message: str) -> ConfigurationError:
    return ConfigurationError(str(path), message)
