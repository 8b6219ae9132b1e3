"""Runs a tensor plan over safetensors files: header first, one piece of one tensor in memory.

The header of each output shard follows from the plan alone, so a shard is written strictly from
front to back and can be uploaded while it is made. Sums are kept in fp32 (fp64 for fp32 sources),
divided once and cast once, to nearest even; the same inputs give the same bytes. The format is
parsed here, without torch. Called by the stages average and mix; the errand preflight opens
checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from btx_trainer.errors import ConfigurationError
from btx_trainer.families import Copy, Mean, Normal, Plan, Planned, TensorSpec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
PIECE_BYTES = 16 * 2**20
# Enough requests in flight to fill an S3 connection; memory is this many pieces, and two.
READS_AHEAD = 4
# Elements per inner step: operands and temporaries stay in a core's cache.
BLOCK = 2**17
# The limit of the safetensors format itself.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class _Dtype:
    """How a safetensors dtype is stored and summed; bf16 is unknown to numpy: its 16 bits."""

    stored: np.dtype[Any]
    summed: np.dtype[Any]


DTYPES: Mapping[str, _Dtype] = {
    "BF16": _Dtype(stored=np.dtype("<u2"), summed=np.dtype("<f4")),
    "F16": _Dtype(stored=np.dtype("<f2"), summed=np.dtype("<f4")),
    "F32": _Dtype(stored=np.dtype("<f4"), summed=np.dtype("<f8")),
}


_Array = npt.NDArray[Any]


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
        with (self.path / name).open("rb", buffering=0) as file:
            # One call returns at most 2 GiB on Linux.
            while n := os.preadv(file.fileno(), [buffer[done:]], start + done):
                done += n
        return done

    @contextmanager
    def sink(self, name: str) -> Iterator[Sink]:
        """See Writer; the file gets its name when it is complete."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / f"{name}.partial"
        try:
            with partial.open("wb", buffering=0) as file:
                yield file
            partial.replace(self.path / name)
        finally:
            partial.unlink(missing_ok=True)


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
    reads = (read for shard in shards for tensor in shard for read in _reads(tensor, models))
    with _read_ahead(reads) as pieces:
        for name, shard in zip(names, shards, strict=True):
            body = chain.from_iterable(_data(tensor, models, pieces) for tensor in shard)
            _write(writer, name, chain([memoryview(_header(shard))], body))
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


# The pieces of a tensor: where they are read, and what is written.


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    model: Checkpoint
    tensor: str
    start: int
    length: int


def _sources(tensor: Planned, models: Sequence[Checkpoint]) -> list[tuple[Checkpoint, float]]:
    """Models that `tensor` reads, with weights; a model that stands for several is read once."""
    match tensor.op:
        case Copy(model=index):
            return [(models[index], 1.0)]
        case Mean(weights=weights):
            total: dict[int, float] = {}
            for model, weight in zip(models, weights, strict=True):
                total[id(model)] = total.get(id(model), 0.0) + weight
            unique = {id(model): model for model in models}
            return [(unique[key], weight) for key, weight in total.items() if weight]
        case Normal():
            return []


def _pieces(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of each piece of a tensor."""
    for start in range(0, _nbytes(spec), PIECE_BYTES):
        yield start, min(PIECE_BYTES, _nbytes(spec) - start)


def _reads(tensor: Planned, models: Sequence[Checkpoint]) -> Iterator[_Read]:
    """The reads of `tensor` in the order in which `_data` takes them."""
    if isinstance(tensor.op, Normal):
        return
    for start, length in _pieces(tensor.spec):
        for model, _ in _sources(tensor, models):
            yield _Read(model=model, tensor=tensor.op.name, start=start, length=length)


def _check_sources(plan: Plan, models: Sequence[Checkpoint]) -> None:
    for tensor in plan:
        if isinstance(tensor.op, Normal):
            continue
        for model, _ in _sources(tensor, models):
            stored = model.stored.get(tensor.op.name)
            if stored is None:
                raise WeightsError(model.where, f"tensor {tensor.op.name} is missing")
            if stored.spec != tensor.spec:
                raise WeightsError(
                    f"{model.where} {stored.file}",
                    f"tensor {tensor.op.name} is"
                    f" {stored.spec.dtype} {list(stored.spec.shape)}, the plan has"
                    f" {tensor.spec.dtype} {list(tensor.spec.shape)}",
                )


def _fill(read: _Read, buffer: memoryview) -> memoryview:
    stored = read.model.stored[read.tensor]
    view = buffer[: read.length]
    if read.model.reader.readinto(stored.file, stored.start + read.start, view) != read.length:
        raise WeightsError(
            f"{read.model.where} {stored.file}", f"tensor {read.tensor}: file is truncated"
        )
    return view


@contextmanager
def _read_ahead(reads: Iterable[_Read]) -> Iterator[Iterator[memoryview]]:
    """The bytes of each read, in order, several reads ahead; each is valid until the next."""
    free = [memoryview(bytearray(PIECE_BYTES)) for _ in range(READS_AHEAD + 1)]
    pending: deque[tuple[Future[memoryview], memoryview]] = deque()

    def results(pool: ThreadPoolExecutor) -> Iterator[memoryview]:
        todo = iter(reads)
        while True:
            while free and (read := next(todo, None)):
                buffer = free.pop()
                pending.append((pool.submit(_fill, read, buffer), buffer))
            if not pending:
                return
            future, buffer = pending.popleft()
            yield future.result()
            free.append(buffer)

    with ThreadPoolExecutor(READS_AHEAD) as pool:
        try:
            yield results(pool)
        finally:
            for future, _ in pending:
                future.cancel()


def _data(
    tensor: Planned, models: Sequence[Checkpoint], pieces: Iterator[memoryview]
) -> Iterator[memoryview]:
    """The bytes of `tensor`, piece by piece; `pieces` continues with its reads."""
    if isinstance(tensor.op, Normal):
        yield _normal(tensor.name, tensor.spec, tensor.op)
        return
    weights = [weight for _, weight in _sources(tensor, models)]
    for _, length in _pieces(tensor.spec):
        if len(weights) == 1:
            yield next(pieces)
        else:
            yield _mean(tensor.spec.dtype, length, weights, pieces)


# Arithmetic.


def _mean(
    dtype: str, length: int, weights: Sequence[float], pieces: Iterator[memoryview]
) -> memoryview:
    """Weighted mean of one piece of every source."""
    kind = DTYPES[dtype]
    total = np.empty(length // kind.stored.itemsize, kind.summed)
    blocks = [slice(i, i + BLOCK) for i in range(0, total.size, BLOCK)]
    # Infinities and NaN in a source stay what they are, without a warning per block.
    with np.errstate(over="ignore", invalid="ignore"):
        for position, weight in enumerate(weights):
            source = np.frombuffer(next(pieces), kind.stored)
            for block in blocks:
                values = _widen(source[block], dtype)
                values = values if weight == 1 else values * weight
                # Not added to zero: 0.0 + -0.0 loses the sign.
                total[block] = values if position == 0 else total[block] + values
        out = np.empty(total.size, kind.stored)
        for block in blocks:
            out[block] = _narrow(total[block] / math.fsum(weights), dtype)
    return out.data.cast("B")


def _widen(values: _Array, dtype: str) -> _Array:
    if dtype != "BF16":
        return values.astype(DTYPES[dtype].summed)
    return (values.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: _Array, dtype: str) -> _Array:
    """Cast once, to nearest even."""
    if dtype != "BF16":
        return values.astype(DTYPES[dtype].stored)
    # NaN stays NaN: the low half of a NaN that comes from bf16 sources is zero, nothing carries.
    bits = values.view(np.uint32)
    rounded: _Array = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    return rounded.astype(np.uint16)


def _normal(name: str, spec: TensorSpec, op: Normal) -> memoryview:
    """Draws that depend on seed and tensor name alone, not on the order of tensors or shards."""
    key = hashlib.sha256(f"{op.seed}/{name}".encode()).digest()[:16]
    draws = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    values = draws.standard_normal(_items(spec), np.float32) * np.float32(op.std)
    return _narrow(values, spec.dtype).data.cast("B")
