"""Checkpoints of a stage in storage: arrays and JSON, written in the background, manifest last.

<stage>/checkpoints/<step>-<token>/{state.safetensors,state.json,manifest.json}; see artifact.py.
No torch: `prune` also runs in a process that only found its stage committed. The loop saves and
resumes; __main__ prunes after the commit.
"""

import json
import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from btx_api.artifact import FileEntry, Manifest, checkpoints_folder
from btx_api.names import MANIFEST
from btx_api.stage import Stage
from numpy.typing import NDArray

from btx_trainer.storage import Store, extend_crc

log = logging.getLogger(__name__)

ARRAYS, STATE = "state.safetensors", "state.json"
KEPT = 2
"""While running: one may be found corrupt."""

Arrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A stage between two steps."""

    step: int
    """Steps done."""
    arrays: Arrays
    state: Mapping[str, Any]
    """Everything else, JSON-ready."""


class Checkpoints:
    """The checkpoints of one stage, as one attempt sees them."""

    def __init__(self, store: Store, stage: Stage, token: str) -> None:
        self._store, self._stage, self._token = store, stage, token
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
        for step, folder in reversed(_committed(_files(self._store, self._stage))):
            try:
                found, when = self._read(folder)
            except (FileNotFoundError, ValueError) as error:
                log.warning("checkpoint %s is left out: %s", folder, error)
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
        files = (
            self._put(folder, ARRAYS, _safetensors(checkpoint.arrays)),
            self._put(folder, STATE, [memoryview(state)]),
        )
        manifest = Manifest(
            stage=self._stage, digest=self._stage.digest, token=self._token, files=files,
            step=checkpoint.step,
        )  # fmt: skip
        self._store.put(f"{folder}/{MANIFEST}", json.dumps(manifest.plain()).encode())
        self.committed = (checkpoint.step, time.time())
        prune(self._store, self._stage, keep=KEPT, broken=self._broken)

    def _put(self, folder: str, name: str, pieces: Iterable[memoryview]) -> FileEntry:
        with self._store.sink(f"{folder}/{name}") as sink:
            for piece in pieces:
                sink.write(piece)
        return FileEntry(name=name, size=sink.size, crc32c=sink.crc32c)

    def _read(self, folder: str) -> tuple[Checkpoint, float]:
        head = self._store.head(f"{folder}/{MANIFEST}")
        if head is None:
            raise FileNotFoundError("the manifest is gone")
        manifest = Manifest.parse(json.loads(self._store.read(head.key)))
        if manifest.digest != self._stage.digest or manifest.step is None:
            raise ValueError("the manifest is another stage's")
        # Nothing vouches for the manifest's own bytes but the folder's name and these two files.
        if manifest.step != _step(folder) or {e.name for e in manifest.files} != {ARRAYS, STATE}:
            raise ValueError("the manifest does not belong to this folder")
        data = {entry.name: self._verified(folder, entry) for entry in manifest.files}
        arrays, state = _arrays(data[ARRAYS]), json.loads(bytes(data[STATE]))
        return Checkpoint(step=manifest.step, arrays=arrays, state=state), head.modified

    def _verified(self, folder: str, entry: FileEntry) -> memoryview:
        data, filled = memoryview(bytearray(entry.size)), 0
        with self._store.open(f"{folder}/{entry.name}") as file:
            while count := file.readinto(data[filled:]):  # type: ignore[attr-defined]  # BinaryIO
                filled += count
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


def _safetensors(arrays: Arrays) -> Iterator[memoryview]:
    """The bytes of a file: length of the JSON, JSON, data; no array is copied."""
    entries, end = {}, 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        entries[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for array in arrays.values():
        yield array.reshape(-1).data.cast("B")


def _arrays(data: memoryview) -> dict[str, NDArray[np.float32]]:
    start = 8 + int.from_bytes(data[:8], "little")
    arrays = {}
    for name, entry in json.loads(bytes(data[8:start])).items():
        begin, end = entry["data_offsets"]
        flat = np.frombuffer(data[start + begin : start + end], np.float32)
        arrays[name] = flat.reshape(entry["shape"])
    return arrays
