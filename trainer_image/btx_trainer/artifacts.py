"""Artifacts: the commit protocol, verified reading, and inputs from outside.

An attempt writes files under its own token; the manifest, written last and conditionally, names
that token and every file with size and CRC32C. Nothing is overwritten: who comes second adopts the
winner. Every byte is checked by the first process that reads it, and bytes that differ are read
again: only those that differ at rest are the producer's business. Called by __main__.py, the stages
and errands.py.
"""

import json
import logging
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from btx_api.artifact import FileEntry, Maker, Manifest, Parent, attempt_folder, manifest_key
from btx_api.spec import Storage
from btx_api.stage import Kind, Location, Stage
from pydantic import ValidationError

from btx_trainer.errors import ConfigurationError, CorruptInputError
from btx_trainer.fingerprint import (
    fingerprint_model,
    fingerprint_sources,
    fingerprint_tokenizer,
    model_files,
    tokenizer_key,
)
from btx_trainer.storage import (
    READ_BYTES,
    Conflict,
    Damaged,
    Sink,
    Store,
    extend_crc,
    open_outside,
    sync,
    traffic,
)

MANIFEST_SCHEMA = 1


READINGS = 3
"""Of a file from s3:// whose bytes are not what they should be."""
FILES_AT_ONCE = 4
"""Of an artifact or a model that is copied; a store bounds what is in flight for all of them."""

log = logging.getLogger(__name__)
T = TypeVar("T")


def side_by_side(act: Callable[[T], object], items: Iterable[T]) -> None:
    """Does it with several items at a time; the first error, once nothing runs any more."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for _ in pool.map(act, items):
            pass


def _again(store: Store, read: Callable[..., T], *arguments: object) -> T:
    """Reads once more what was damaged on the way, unless it came from this machine."""
    for _ in range(READINGS - 1 if store.local("") is None else 0):
        try:
            return read(*arguments)
        except (Damaged, CorruptInputError) as error:
            log.warning("%s; reading it again", error)
    return read(*arguments)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A committed artifact; its bytes are not trusted before they were read here."""

    store: Store = field(repr=False)
    manifest: Manifest = field(repr=False)
    kind: Kind
    digest: str
    tag: str
    """Identity of the manifest: its ETag, or sha256 of its bytes (32 hex digits) on file://."""

    @property
    def token(self) -> str:
        """Of the attempt that made it."""
        return self.manifest.token

    @property
    def parent(self) -> Parent:
        """This copy, for the lineage of what is made from it."""
        return Parent(kind=self.kind, digest=self.digest, token=self.token, tag=self.tag)

    def key(self, name: str) -> str:
        """Key of one file."""
        return f"{attempt_folder(self.kind, self.digest, self.token)}/{name}"

    def read(self, name: str) -> bytes:
        """One small file, verified. FileNotFoundError if the manifest does not name it."""
        for entry in self.manifest.files:
            if entry.name == name:
                return b"".join(_again(self.store, self._pieces, entry))
        raise FileNotFoundError(f"{self.store.uri(self.key(name))}: not in the manifest")

    def verify(self) -> None:
        """Reads every byte; CorruptInputError for the first file that is not as committed."""
        for entry in self.manifest.files:
            _again(self.store, self._check, entry)

    def copy(self, folder: Path) -> None:
        """Writes all files below `folder`, verified and durable; CorruptInputError as `verify`."""
        self._download(folder)
        paths = {folder / entry.name for entry in self.manifest.files}
        folders = {parent for path in paths for parent in path.parents}
        for path in paths | {parent for parent in folders if parent.is_relative_to(folder)}:
            sync(path)

    def _download(self, folder: Path) -> None:
        side_by_side(
            lambda entry: _again(self.store, self._write, entry, folder), self.manifest.files
        )

    def _pieces(self, entry: FileEntry) -> list[bytes]:
        return list(self._verified(entry))

    def _check(self, entry: FileEntry) -> None:
        for _ in self._verified(entry):
            pass

    def _write(self, entry: FileEntry, folder: Path) -> None:
        with self._reading(entry):
            found = self.store.download(self.key(entry.name), folder / entry.name)
        self._compare(entry, *found)

    def fetch(self) -> Path:
        """A local folder with all files, every byte verified (once per process).

        On file:// the artifact's own folder: do not write there. CorruptInputError as in `verify`.
        """
        return self._folder

    @cached_property
    def _folder(self) -> Path:
        if folder := self.store.local(self.key("")):
            self.verify()
            return folder
        folder = Path(tempfile.mkdtemp(prefix=f"{self.kind}-{self.digest[:8]}-"))
        self._download(folder)
        return folder

    def corrupt(self, message: str) -> CorruptInputError:
        """The error that names this artifact."""
        return CorruptInputError(self.kind, self.digest, self.tag, message)

    def _verified(self, entry: FileEntry) -> Iterator[bytes]:
        size = crc = 0
        with self._reading(entry), self.store.open(self.key(entry.name)) as file:
            while piece := file.read(READ_BYTES):
                size, crc = size + len(piece), extend_crc(crc, piece)
                traffic.moved()
                yield piece
        self._compare(entry, size, f"{crc:08x}")

    @contextmanager
    def _reading(self, entry: FileEntry) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise self.corrupt(f"{entry.name}: is missing") from error
        except Damaged as error:
            raise self.corrupt(f"{entry.name}: {error.strerror}") from error

    def _compare(self, entry: FileEntry, size: int, crc32c: str) -> None:
        if size != entry.size:
            raise self.corrupt(f"{entry.name}: has {size} bytes, was committed with {entry.size}")
        if crc32c != entry.crc32c:
            raise self.corrupt(
                f"{entry.name}: has CRC32C {crc32c}, was committed with {entry.crc32c}"
            )


def find(store: Store, kind: Kind, digest: str, *, ignoring: str = "") -> Artifact | None:
    """The committed artifact of a stage; a manifest with tag `ignoring` counts as absent.

    The files' sizes are checked, and the checksums that the storage keeps. Raises CorruptInputError
    for a manifest that cannot be read or a file that differs, ConfigurationError for a manifest of
    a later release.
    """
    try:
        data, tag = store.get(manifest_key(kind, digest))
    except FileNotFoundError:
        return None
    if tag == ignoring:
        return None
    manifest = _parse(data, tag, kind, digest)
    artifact = Artifact(store=store, manifest=manifest, kind=kind, digest=digest, tag=tag)
    for entry in manifest.files:
        head = store.head(artifact.key(entry.name))
        if head is None:
            raise artifact.corrupt(f"{entry.name}: is missing")
        if head.size != entry.size:
            raise artifact.corrupt(
                f"{entry.name}: has {head.size} bytes, was committed with {entry.size}"
            )
        if head.checksum.startswith("crc32c") and head.checksum != f"crc32c {entry.crc32c}":
            raise artifact.corrupt(
                f"{entry.name}: has {head.checksum}, was committed with {entry.crc32c}"
            )
    return artifact


def _parse(data: bytes, tag: str, kind: Kind, digest: str) -> Manifest:
    try:
        value = json.loads(data)
        if isinstance(value, dict) and value.get("schemaVersion", 1) > MANIFEST_SCHEMA:
            raise ConfigurationError(
                manifest_key(kind, digest), "was written by a later release; use its image"
            )
        manifest = Manifest.parse(value)
    except (ValueError, TypeError, ValidationError) as error:
        raise CorruptInputError(kind, digest, tag, "the manifest is unreadable") from error
    # A name that leaves the folder would let a writer of this prefix write outside it.
    outside = [f.name for f in manifest.files if {"", ".", ".."} & set(f.name.split("/"))]
    if manifest.digest != digest or outside:
        raise CorruptInputError(kind, digest, tag, "the manifest is of another artifact")
    return manifest


class Attempt:
    """The files of one attempt, and their commit."""

    def __init__(self, store: Store, stage: Stage, *, replaces: str = "") -> None:
        self.token = secrets.token_hex(8)
        self._store, self._stage, self._replaces = store, stage, replaces
        self._sinks: dict[str, Sink] = {}

    @property
    def folder(self) -> str:
        """Key of the folder that the files go to."""
        return attempt_folder(self._stage.kind, self._stage.digest, self.token)

    def sink(self, name: str) -> Sink:
        """A new file, part of the artifact once closed."""
        assert name not in self._sinks, name
        self._sinks[name] = self._store.sink(f"{self.folder}/{name}")
        return self._sinks[name]

    def put(self, name: str, data: bytes) -> None:
        """A new small file."""
        with self.sink(name) as sink:
            sink.write(data)

    def add(self, path: Path, name: str) -> None:
        """A copy of a local file."""
        with path.open("rb") as file, self.sink(name) as sink:
            while piece := file.read(READ_BYTES):
                sink.write(piece)

    def commit(
        self,
        *,
        metrics: Mapping[str, float],
        deviations: Sequence[str],
        maker: Maker,
        parents: Sequence[Parent],
    ) -> Artifact:
        """Writes the manifest; the artifact is the winner's, with another token if that came first.

        Raises Conflict if the commit lost and the winner has vanished since.
        """
        kind, digest = self._stage.kind, self._stage.digest
        manifest = Manifest(
            schema_version=MANIFEST_SCHEMA, stage=self._stage, digest=digest, token=self.token,
            files=tuple(
                FileEntry(name=name, size=sink.size, crc32c=sink.crc32c)
                for name, sink in sorted(self._sinks.items())
                if sink.closed
            ),
            metrics=dict(metrics), deviations=tuple(deviations), maker=maker,
            parents=tuple(parents),
        )  # fmt: skip
        tag = self._write(manifest.model_dump_json(exclude_defaults=True).encode())
        if tag:
            return Artifact(store=self._store, manifest=manifest, kind=kind, digest=digest, tag=tag)
        winner = find(self._store, kind, digest, ignoring=self._replaces)
        if winner is None:
            raise Conflict(self._store.uri(manifest_key(kind, digest)), "came and went")
        if winner.token != self.token:
            self.discard()
        return winner

    def _write(self, data: bytes) -> str:
        """Tag of our manifest; empty if there is one that we were not asked to replace."""
        key = manifest_key(self._stage.kind, self._stage.digest)
        with suppress(Conflict):
            if self._replaces:
                return self._store.put(key, data, if_match=self._replaces)
        # What was to be replaced is gone, or was replaced by somebody else.
        with suppress(Conflict):
            return self._store.put(key, data, if_none_match=True)
        return ""

    def discard(self) -> None:
        """Deletes the files: nobody else knows of them."""
        for name, sink in self._sinks.items():
            sink.abort()
            self._store.delete(f"{self.folder}/{name}")


@dataclass(frozen=True, kw_only=True)
class Outside:
    """An input that no stage made: a model, a tokenizer, or the sources of a domain."""

    location: Location
    fingerprint: str
    """What preflight saw."""
    storage: Storage = field(repr=False)
    """For endpoint and region."""
    tokenizer: bool = False

    @property
    def parent(self) -> Parent:
        """For the lineage of what is made from it."""
        return Parent(fingerprint=self.fingerprint, uri=self._uri[:1024])

    @property
    def _uri(self) -> str:
        return self.location.uri or " ".join(source.uri for source in self.location.sources)

    def check(self) -> None:
        """Raises ConfigurationError if the content is not what preflight saw."""
        if self.location.sources:
            self._compare(fingerprint_sources(self.location.sources, self.storage))
        elif self.tokenizer:
            self._compare(fingerprint_tokenizer(self._tokenizer()))
        else:
            self._compare(fingerprint_model(*open_outside(self.location.uri, self.storage)))

    def fetch(self) -> Path:
        """A local folder with the model, or with `tokenizer.json`; do not write there.

        Raises ConfigurationError if the content is not what preflight saw.
        """
        return self._folder

    @cached_property
    def _folder(self) -> Path:
        if self.tokenizer:
            data = self._tokenizer()
            self._compare(fingerprint_tokenizer(data))
            folder = Path(tempfile.mkdtemp(prefix="tokenizer-"))
            (folder / "tokenizer.json").write_bytes(data)
            return folder
        store, key = open_outside(self.location.uri, self.storage)
        local = store.local(key)
        folder = local or Path(tempfile.mkdtemp(prefix="model-"))
        if local is None:
            side_by_side(
                lambda head: _again(store, store.download, head.key, folder / Path(head.key).name),
                model_files(store, key),
            )
        self._compare(fingerprint_model(store, key))
        return folder

    def _tokenizer(self) -> bytes:
        store, key = open_outside(self.location.uri, self.storage)
        return store.get(tokenizer_key(key))[0]

    def _compare(self, found: str) -> None:
        if found != self.fingerprint:
            raise ConfigurationError(self._uri, "input changed since preflight")
