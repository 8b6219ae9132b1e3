"""Runs a tensor plan over safetensors files: header first, one piece of one tensor in memory.

The header of each output shard follows from the plan alone, so a shard is written strictly from
front to back and can be uploaded while it is made. The arithmetic is in numerics.py; the same
inputs give the same bytes. The format is parsed here, without torch. Called by the stages average
and mix; the errand preflight opens checkpoints.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from btx_trainer.errors import ConfigurationError
from btx_trainer.families import Copy, Mean, Normal, Plan, Planned, Rows, Stack, TensorSpec
from btx_trainer.numerics import DTYPES, mean, normal

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
# Worth a thread's while, and still in a core's cache when it is written.
PIECE_BYTES = 2**21
# One thread makes pieces about as fast as another writes them; memory is AHEAD + 1 pieces.
THREADS, AHEAD = 2, 3
# The limit of the safetensors format itself.
MAX_HEADER_BYTES = 100_000_000


class WeightsError(ConfigurationError):
    """Weights that cannot be read: one line that names the file and the tensor."""


class Reader(Protocol):
    """The folder of one model, in any storage; called from several threads at once."""

    def size(self, name: str) -> int | None:
        """Bytes of file `name`, or None if there is none."""

    def readinto(self, name: str, start: int, buffer: memoryview) -> int:
        """Fill `buffer` from byte `start` of file `name`; returns the bytes read."""


class Sink(Protocol):
    """One file that is written from front to back."""

    def write(self, data: memoryview, /) -> object:
        """Append all of `data`, which the caller overwrites once this returns."""


class Writer(Protocol):
    """The folder that the target is written to, in any storage."""

    def sink(self, name: str) -> AbstractContextManager[Sink]:
        """A new file, complete when the context ends without an exception."""


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """Reader and Writer of one folder on this machine."""

    path: Path

    def size(self, name: str) -> int | None:
        """See Reader."""
        file = self.path / name
        return file.stat().st_size if file.is_file() else None

    def readinto(self, name: str, start: int, buffer: memoryview) -> int:
        """See Reader."""
        done = 0
        file = os.open(f"{self.path}/{name}", os.O_RDONLY)
        try:
            # One call returns at most 2 GiB on Linux.
            while n := os.preadv(file, [buffer[done:]], start + done):
                done += n
        finally:
            os.close(file)
        return done

    @contextmanager
    def sink(self, name: str) -> Iterator[Sink]:
        """See Writer; the file gets its name when it is complete."""
        self.path.mkdir(parents=True, exist_ok=True)
        unfinished = self.path / f"{name}.partial"
        try:
            with unfinished.open("wb", buffering=0) as file:
                yield file
            unfinished.replace(self.path / name)
        finally:
            unfinished.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint and the place of its bytes."""

    spec: TensorSpec
    file: str
    start: int
    """First byte of the data, from the front of the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A model's folder with its headers read; the weights stay where they are."""

    where: str
    reader: Reader = field(repr=False)
    config: Mapping[str, Any]
    stored: Mapping[str, StoredTensor] = field(repr=False)

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor, by name."""
        return {name: tensor.spec for name, tensor in self.stored.items()}


def open_checkpoint(reader: Reader, where: str) -> Checkpoint:
    """Read config.json and the header of every shard in the folder of one model.

    `where` begins every message, for example `seed`. Raises WeightsError for a file that is
    missing, truncated or not safetensors, naming file and tensor.
    """
    config = _read_json(reader, "config.json", where)
    if reader.size(SINGLE) is not None:
        stored = _read_header(reader, SINGLE, where)
    else:
        stored = _read_shards(reader, where)
    return Checkpoint(where=where, reader=reader, config=config, stored=stored)


def write_plan(
    plan: Plan, models: Sequence[Checkpoint], writer: Writer, shard_bytes: int = SHARD_BYTES
) -> tuple[str, ...]:
    """Write the target of `plan`; returns the names of the files written, in order.

    `models[i]` is model i of the plan; one object may stand at several places. More than
    `shard_bytes` of tensors give several files and an index; a shard holds at least one tensor.
    Raises WeightsError naming file and tensor when a source differs from the plan (before
    anything is written) or cannot be read.
    """
    _check_sources(plan, models)
    shards = _shards(plan, shard_bytes)
    count = len(shards)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    names = [SINGLE] if count == 1 else names
    pieces = (piece for shard in shards for tensor in shard for piece in _pieces(tensor, models))
    with _ahead(pieces) as made:
        for name, shard in zip(names, shards, strict=True):
            mine = sum(1 for tensor in shard for _ in _pieces(tensor, models))
            _write(writer, name, chain([memoryview(_header(shard))], islice(made, mine)))
    if count == 1:
        return (SINGLE,)
    index = {
        "metadata": {"total_size": sum(_nbytes(tensor.spec) for tensor in plan)},
        "weight_map": {t.name: n for n, shard in zip(names, shards, strict=True) for t in shard},
    }
    _write(writer, INDEX, [memoryview(json.dumps(index, indent=2, sort_keys=True).encode())])
    return (*names, INDEX)


def _write(writer: Writer, name: str, pieces: Iterable[memoryview]) -> None:
    with writer.sink(name) as sink:
        for piece in pieces:
            sink.write(piece)


# Reading: files and headers.


def _read(reader: Reader, name: str, span: tuple[int, int], where: str) -> memoryview:
    buffer = memoryview(bytearray(span[1]))
    if reader.readinto(name, span[0], buffer) != span[1]:
        raise WeightsError(f"{where} {name}", "file is truncated")
    return buffer


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _parse_json(data: memoryview, where: str) -> dict[str, Any]:
    try:
        value = json.loads(bytes(data), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise WeightsError(where, f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(where, "not a JSON object")
    return value


def _read_json(reader: Reader, name: str, where: str) -> dict[str, Any]:
    size = reader.size(name)
    if size is None:
        raise WeightsError(f"{where} {name}", "no such file")
    return _parse_json(_read(reader, name, (0, size), where), f"{where} {name}")


def _read_shards(reader: Reader, where: str) -> dict[str, StoredTensor]:
    if reader.size(INDEX) is None:
        raise WeightsError(where, f"neither {SINGLE} nor {INDEX} exists")
    weight_map = _read_json(reader, INDEX, where).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and "/" not in file for file in weight_map.values()
    ):
        raise WeightsError(f"{where} {INDEX}", "weight_map is not an object of file names")
    files = {file: _read_header(reader, file, where) for file in sorted({*weight_map.values()})}
    for name, file in weight_map.items():
        if name not in files[file]:
            raise WeightsError(f"{where} {file}", f"tensor {name} is missing ({INDEX} names it)")
    return {name: files[file][name] for name, file in weight_map.items()}


def _read_header(reader: Reader, name: str, where: str) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file: u64 length of the header, JSON header, data."""
    at = f"{where} {name}"
    size = reader.size(name)
    if size is None:
        raise WeightsError(at, "no such file")
    if size < 8:
        raise WeightsError(at, f"{size} bytes are too few for a safetensors file")
    length = int.from_bytes(_read(reader, name, (0, 8), where), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise WeightsError(at, f"header of {length} bytes does not fit a file of {size} bytes")
    entries = _parse_json(_read(reader, name, (8, length), where), f"{at} header")
    entries.pop("__metadata__", None)
    tensors = {}
    for tensor, entry in entries.items():
        spec, begin = _parse_entry(entry, f"{at}: tensor {tensor}")
        tensors[tensor] = StoredTensor(spec=spec, file=name, start=8 + length + begin)
    end, last = 8 + length, "header"
    for tensor, stored in sorted(tensors.items(), key=lambda item: item[1].start):
        if stored.start != end:
            kind = "overlaps" if stored.start < end else "leaves a gap after"
            raise WeightsError(at, f"tensor {tensor} {kind} {last}")
        end, last = end + _nbytes(stored.spec), tensor
    if end != size:
        raise WeightsError(at, f"{size} bytes, but the data ends at {end} with tensor {last}")
    return tensors


def _parse_entry(entry: object, at: str) -> tuple[TensorSpec, int]:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise WeightsError(at, f"bad header entry {json.dumps(entry)[:200]}")
    if dtype not in DTYPES:
        raise WeightsError(at, f"dtype {dtype} is not supported (supported: {', '.join(DTYPES)})")
    if not all(isinstance(length, int) and length >= 0 for length in shape):
        raise WeightsError(at, f"bad shape {shape}")
    spec = TensorSpec(dtype=dtype, shape=tuple(shape))
    if begin < 0 or end - begin != _nbytes(spec):
        raise WeightsError(
            at, f"offsets [{begin}, {end}] do not hold {dtype} {shape} ({_nbytes(spec)} bytes)"
        )
    return spec, begin


# Writing: which tensors in which file, and the file's header.


def _items(spec: TensorSpec) -> int:
    return math.prod(spec.shape)


def _nbytes(spec: TensorSpec) -> int:
    return _items(spec) * DTYPES[spec.dtype].stored.itemsize


def _shards(plan: Plan, shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = []
    room = -1
    for tensor in plan:
        if _nbytes(tensor.spec) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= _nbytes(tensor.spec)
    for shard in shards:
        # Wide dtypes first, so that each tensor is aligned to its own items when it is mapped.
        shard.sort(key=lambda tensor: -DTYPES[tensor.spec.dtype].stored.itemsize)
    return shards


def _header(shard: Sequence[Planned]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        begin, end = end, end + _nbytes(tensor.spec)
        entries[tensor.name] = {
            "dtype": tensor.spec.dtype,
            "shape": list(tensor.spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# What a tensor is made from.


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """Part of a target, front to back: one tensor of each source, or the same rows of it."""

    name: str
    spec: TensorSpec
    rows: Rows | None
    sources: Sequence[tuple[Checkpoint, float]]
    """Models with their weights; a model that stands for several is read once."""

    @property
    def start(self) -> int:
        """First byte of the rows in the tensor."""
        width = _nbytes(replace(self.spec, shape=self.spec.shape[1:]))
        return self.rows[0] * width if self.rows else 0

    def read(self, number: int, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from source `number`, from byte `start` of the run on."""
        model = self.sources[number][0]
        stored = model.stored[self.name]
        first = stored.start + self.start + start
        if model.reader.readinto(stored.file, first, buffer) != len(buffer):
            raise WeightsError(
                f"{model.where} {stored.file}", f"tensor {self.name}: file is truncated"
            )


def _runs(tensor: Planned, models: Sequence[Checkpoint]) -> list[_Run]:
    """What `tensor` reads, in order; nothing if its values are fresh."""
    match tensor.op:
        case Copy(model=index, name=name, rows=rows):
            return [_Run(name=name, spec=tensor.spec, rows=rows, sources=[(models[index], 1.0)])]
        case Mean(name=name, weights=weights, rows=rows):
            total: dict[int, float] = {}
            for model, weight in zip(models, weights, strict=True):
                total[id(model)] = total.get(id(model), 0.0) + weight
            unique = {id(model): model for model in models}
            sources = [(unique[key], weight) for key, weight in total.items() if weight]
            return [_Run(name=name, spec=tensor.spec, rows=rows, sources=sources)]
        case Stack(parts=parts, shape=shape):
            spec = replace(tensor.spec, shape=shape)
            return [
                run for part in parts for run in _runs(replace(tensor, spec=spec, op=part), models)
            ]
        case Normal():
            return []


def _check_sources(plan: Plan, models: Sequence[Checkpoint]) -> None:
    for tensor in plan:
        runs = _runs(tensor, models)
        assert not runs or sum(_items(r.spec) for r in runs) == _items(tensor.spec), tensor.name
        for run in runs:
            for model, _ in run.sources:
                _check_source(run, model)


def _check_source(run: _Run, model: Checkpoint) -> None:
    stored = model.stored.get(run.name)
    if stored is None:
        raise WeightsError(model.where, f"tensor {run.name} is missing")
    shape = stored.spec.shape
    if run.rows and run.rows[1] <= shape[0]:
        shape = (run.rows[1] - run.rows[0], *shape[1:])
    if (stored.spec.dtype, shape) != (run.spec.dtype, run.spec.shape):
        rows = f" in rows {run.rows[0]} to {run.rows[1]}" if run.rows else ""
        raise WeightsError(
            f"{model.where} {stored.file}",
            f"tensor {run.name} is {stored.spec.dtype} {list(stored.spec.shape)}, the plan has"
            f" {run.spec.dtype} {list(run.spec.shape)}{rows}",
        )


# The pieces of a target: made by some threads, written by one.


_Piece = Callable[[memoryview], memoryview]
"""Its bytes, in the memory that it is given (PIECE_BYTES) or in its own."""


def _pieces(tensor: Planned, models: Sequence[Checkpoint]) -> Iterator[_Piece]:
    """What makes the bytes of `tensor`, front to back."""
    if isinstance(op := tensor.op, Normal):
        yield lambda _: normal(
            tensor.name, _items(tensor.spec), tensor.spec.dtype, std=op.std, seed=op.seed
        )
        return
    for run in _runs(tensor, models):
        size = _nbytes(run.spec)
        for start in range(0, size, PIECE_BYTES):
            yield partial(_made, run, start, min(PIECE_BYTES, size - start))


def _made(run: _Run, start: int, length: int, space: memoryview) -> memoryview:
    out, weights = space[:length], [weight for _, weight in run.sources]
    if len(weights) == 1:
        run.read(0, start, out)
    else:

        def fill(offset: int, source: int, buffer: memoryview) -> None:
            run.read(source, start + offset, buffer)

        mean(run.spec.dtype, weights, fill, out)
    return out


@contextmanager
def _ahead(pieces: Iterable[_Piece]) -> Iterator[Iterator[memoryview]]:
    """The bytes of each piece, in order, made some pieces ahead; each is valid until the next."""
    free = [memoryview(bytearray(PIECE_BYTES)) for _ in range(AHEAD + 1)]
    pending: deque[tuple[Future[memoryview], memoryview]] = deque()

    def results(pool: ThreadPoolExecutor) -> Iterator[memoryview]:
        todo = iter(pieces)
        while True:
            while free and (piece := next(todo, None)):
                space = free.pop()
                pending.append((pool.submit(piece, space), space))
            if not pending:
                return
            future, space = pending.popleft()
            yield future.result()
            free.append(space)

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            yield results(pool)
        finally:
            for future, _ in pending:
                future.cancel()
