"""Checkpoints of a stage in storage: arrays and JSON, written in the background, manifest last.

<stage>/checkpoints/<step>-<token>/{state.safetensors,state.json,manifest.json}; see artifact.py.
Of several ranks each writes and reads the rows it holds (state-<rank>-of-<ranks>.safetensors), so
that no process ever has more in memory; another number of ranks takes its rows from all the files.
No torch: `prune` also runs in a process that only found its stage committed. The loop saves and
resumes; __main__ prunes after the commit.
"""

import json
import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from btx_api.artifact import FileEntry, Manifest, checkpoints_folder
from btx_api.names import MANIFEST
from btx_api.stage import Stage
from numpy.typing import NDArray

from btx_trainer.ranks import Ranks
from btx_trainer.storage import Damaged, Store, extend_crc, traffic

log = logging.getLogger(__name__)

ARRAYS, STATE = "state.safetensors", "state.json"
KEPT = 2
"""While running: one may be found corrupt."""

Arrays = Mapping[str, NDArray[np.float32]]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A stage between two steps."""

    step: int
    """Steps done."""
    arrays: Arrays
    state: Mapping[str, Any]
    """Everything else, JSON-ready."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Of arrays of which each rank has some rows: how many the whole has."""


class Checkpoints:
    """The checkpoints of one stage, as one attempt sees them."""

    def __init__(self, store: Store, stage: Stage, token: str, ranks: Ranks | None = None) -> None:
        """`ranks` talks to the others from the writing thread, so it is for this alone."""
        self._store, self._stage, self._token = store, stage, token
        self._ranks = ranks or Ranks()
        self._broken: set[str] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.committed = (0, 0.0)
        """Step and Unix time of the last one that this attempt committed or began from."""

    @property
    def busy(self) -> bool:
        """Whether the last one is still being written."""
        return self._writing is not None and not self._writing.done()

    def latest(self) -> Checkpoint | None:
        """The newest one whose every byte is right, read and verified; the others are logged."""
        known = self._ranks.share(lambda: _committed(_files(self._store, self._stage)))
        for step, folder in reversed(known):
            found, wrong = None, ""
            try:
                found, when = self._read_again(folder)
            except (FileNotFoundError, ValueError, Damaged) as error:
                wrong = str(error) or "it cannot be read"
            if wrongs := [message for message in self._ranks.gather(wrong) if message]:
                log.warning("checkpoint %s is left out: %s", folder, wrongs[0])
                self._broken.add(folder)
                continue
            self.committed = (step, when)
            return found
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes it in the background, after the one before. Its arrays must stay until `wait`."""
        self.wait()
        # The state is small and may change with the next step; the arrays are copies already.
        state = json.dumps(checkpoint.state, separators=(",", ":")).encode()
        self._writing = self._thread.submit(self._write, checkpoint, state)

    def wait(self) -> None:
        """Until the last `save` is committed; raises what it raised."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _write(self, checkpoint: Checkpoint, state: bytes) -> None:
        name = f"{checkpoint.step}-{self._token}"
        folder = f"{checkpoints_folder(self._stage.kind, self._stage.digest)}/{name}"
        files = self._everywhere(lambda: self._put_own(folder, checkpoint, state))
        self._everywhere(lambda: self._commit(folder, checkpoint.step, sum(files, ())))
        self.committed = (checkpoint.step, time.time())
        if self._ranks.rank == 0:
            prune(self._store, self._stage, keep=KEPT, broken=self._broken)

    def _put_own(self, folder: str, checkpoint: Checkpoint, state: bytes) -> tuple[FileEntry, ...]:
        """This rank's rows; rank 0 also the state, which is the same on all."""
        rank, world = self._ranks.rank, self._ranks.world
        pieces = _safetensors(checkpoint.arrays, checkpoint.rows if world > 1 else {})
        own = self._put(folder, _part(rank, world), pieces)
        return (own,) if rank else (own, self._put(folder, STATE, [memoryview(state)]))

    def _commit(self, folder: str, step: int, files: tuple[FileEntry, ...]) -> None:
        """Rank 0's, once all have written."""
        manifest = Manifest(
            stage=self._stage, digest=self._stage.digest, token=self._token, files=files, step=step
        )
        if self._ranks.rank == 0:
            self._store.put(f"{folder}/{MANIFEST}", json.dumps(manifest.plain()).encode())

    def _everywhere(self, act: Callable[[], T]) -> list[T]:
        """What it gives on each rank; if it fails on one, it fails on all."""
        failure, mine = None, []
        try:
            mine.append(act())
        except OSError as error:
            failure = error
        answers = self._ranks.gather((mine, str(failure)))
        if failure:
            raise failure
        for rank, (given, message) in enumerate(answers):
            if not given:
                raise OSError(f"rank {rank}: {message}")
        return [given[0] for given, _ in answers]

    def _put(self, folder: str, name: str, pieces: Iterable[memoryview]) -> FileEntry:
        with self._store.sink(f"{folder}/{name}") as sink:
            for piece in pieces:
                sink.write(piece)
        return FileEntry(name=name, size=sink.size, crc32c=sink.crc32c)

    def _read_again(self, folder: str) -> tuple[Checkpoint, float]:
        """A second time if it is wrong: it may have been damaged on the way."""
        with suppress(ValueError, Damaged):
            return self._read(folder)
        return self._read(folder)

    def _read(self, folder: str) -> tuple[Checkpoint, float]:
        head = self._store.head(f"{folder}/{MANIFEST}")
        if head is None:
            raise FileNotFoundError("the manifest is gone")
        manifest = Manifest.parse(json.loads(self._store.get(head.key)[0]))
        if manifest.digest != self._stage.digest or manifest.step is None:
            raise ValueError("the manifest is another stage's")
        # Nothing vouches for the manifest's own bytes but the folder's and the files' names.
        entries = {entry.name: entry for entry in manifest.files}
        world = len(entries) - 1
        parts = [_part(rank, world) for rank in range(world)]
        if manifest.step != _step(folder) or entries.keys() != {STATE, *parts}:
            raise ValueError("the manifest does not belong to this folder")
        state = json.loads(bytes(self._verified(folder, entries[STATE])))
        arrays = self._own_rows(folder, [entries[name] for name in parts])
        return Checkpoint(step=manifest.step, arrays=arrays, state=state), head.modified

    def _own_rows(self, folder: str, parts: Sequence[FileEntry]) -> Arrays:
        """This rank's, of a checkpoint of any number of ranks; one part is in memory at a time."""
        rank, world = self._ranks.rank, self._ranks.world
        if len(parts) == world:
            return _arrays(self._verified(folder, parts[rank]))[0]
        found: dict[str, NDArray[np.float32]] = {}
        for number, entry in enumerate(parts):
            arrays, rows = _arrays(self._verified(folder, entry))
            for name, array in arrays.items():
                if not array.ndim:
                    found[name] = array.copy()
                    continue
                total = rows.get(name, len(array))
                first, stop = _rows_of(rank, world, total)
                begin, _ = _rows_of(number, len(parts), total)
                mine = found.setdefault(
                    name, np.empty((stop - first, *array.shape[1:]), np.float32)
                )
                low = max(first, begin)
                high = max(low, min(stop, begin + len(array)))
                mine[low - first : high - first] = array[low - begin : high - begin]
        return found

    def _verified(self, folder: str, entry: FileEntry) -> memoryview:
        data, filled = memoryview(bytearray(entry.size)), 0
        with self._store.open(f"{folder}/{entry.name}") as file:
            while count := file.readinto(data[filled:]):  # type: ignore[attr-defined]  # BinaryIO
                filled += count
                traffic.moved()
        if filled < entry.size:
            raise ValueError(f"{entry.name} has {filled} bytes of {entry.size}")
        if f"{extend_crc(0, data):08x}" != entry.crc32c:
            raise ValueError(f"{entry.name} has other bytes than its manifest says")
        return data


def prune(
    store: Store, stage: Stage, *, keep: int = 0, broken: Collection[str] = frozenset()
) -> None:
    """Deletes a stage's checkpoints but the newest `keep`, and the folders in `broken`.

    With the default, after the commit of the stage's artifact, none is left.
    """
    files = _files(store, stage)
    sound = [step for step, folder in _committed(files) if folder not in broken]
    oldest = sound[-keep:][0] if keep else float("inf")
    for folder, names in files.items():
        if _step(folder) < oldest or folder in broken:
            # The manifest first: what is half deleted must not look committed.
            for name in sorted(names, key=lambda name: name != MANIFEST):
                store.delete(f"{folder}/{name}")
    root = store.local(checkpoints_folder(stage.kind, stage.digest))
    if root and not keep:
        # What killed writers left has no key.
        shutil.rmtree(root, ignore_errors=True)


def _step(folder: str) -> int:
    return int(folder.rpartition("/")[2].partition("-")[0])


def _files(store: Store, stage: Stage) -> dict[str, list[str]]:
    """File names by checkpoint folder."""
    files = defaultdict(list)
    for head in store.list(checkpoints_folder(stage.kind, stage.digest) + "/"):
        folder, _, name = head.key.rpartition("/")
        files[folder].append(name)
    return files


def _committed(files: Mapping[str, list[str]]) -> list[tuple[int, str]]:
    """Steps and folders of those with a manifest, oldest first."""
    return sorted((_step(folder), folder) for folder, names in files.items() if MANIFEST in names)


def _part(rank: int, world: int) -> str:
    """File of a rank's rows."""
    return ARRAYS if world == 1 else f"state-{rank:05}-of-{world:05}.safetensors"


def _rows_of(rank: int, world: int, total: int) -> tuple[int, int]:
    """First row of a rank's part of `total`, and the first that is not: as FSDP2 cuts."""
    size = -(-total // world)
    return min(rank * size, total), min((rank + 1) * size, total)


def _safetensors(arrays: Arrays, rows: Mapping[str, int]) -> Iterator[memoryview]:
    """The bytes of a file: length of the JSON, JSON, data; no array is copied."""
    entries: dict[str, Any] = {"__metadata__": {"rows": json.dumps(rows)}} if rows else {}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        entries[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for array in arrays.values():
        if array.size:
            yield array.reshape(-1).data.cast("B")


def _arrays(data: memoryview) -> tuple[dict[str, NDArray[np.float32]], dict[str, int]]:
    """The arrays of a file, and of how many rows each is a part."""
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(bytes(data[8:start]))
    rows = json.loads(entries.pop("__metadata__", {}).get("rows", "{}"))
    arrays = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        flat = np.frombuffer(data[start + begin : start + end], np.float32)
        arrays[name] = flat.reshape(entry["shape"])
    return arrays, rows
