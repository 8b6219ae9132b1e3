"""Storage behind one interface: a prefix of files (here) or of an S3 bucket (s3.py).

A write is whole or absent, and durable when it returns. Failures are OSError whose `filename` is
the object. Called by artifacts.py, checkpoint.py, fingerprint.py, sources.py and errands.py.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import google_crc32c
import numpy as np
from btx_api.spec import Storage

from btx_trainer.errors import ConfigurationError

Bytes = bytes | bytearray | memoryview
READ_BYTES = 8 * 2**20
WRITE_BYTES = 2**17
"""To a file at once. The kernel keeps larger writes in larger pages, and where memory is in use it
has to make room for those first: up to four times slower [measured]; cp writes as much."""
MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
"""What of a model's folder is a model; anything else there is neither read nor fingerprinted."""
_UNFINISHED = ".btx-"
_COMMIT = re.compile("[0-9a-f]{40}")


class Conflict(OSError):
    """A conditional write lost: the object is there, or is another one, or is gone."""

    def __init__(self, uri: str, message: str) -> None:
        super().__init__(errno.EEXIST, message, uri)


class Damaged(OSError):
    """What arrived differs from the checksum that the storage keeps; another reading may not."""

    def __init__(self, uri: str, message: str) -> None:
        super().__init__(errno.EIO, message, uri)


class Traffic:
    """When bytes of large objects moved last in this process: the watchdog's second sign of life.

    Small objects (`put`, `get`) do not count: the log is one, and what hangs may go on printing.
    """

    def __init__(self) -> None:
        self.last = time.monotonic()

    def moved(self) -> None:
        """To be called for every piece that was read or written."""
        self.last = time.monotonic()


traffic = Traffic()


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """An object without its bytes."""

    key: str
    size: int
    modified: float
    """Unix time, by the storage's own clock."""
    tag: str = ""
    """ETag on s3://; empty on file://, where only `get` knows it."""
    checksum: str = ""
    """`crc32c 0a1b2c3d` or `crc32 ...` of the bytes; "" where the storage keeps none (file://)."""


def extend_crc(crc: int, data: Bytes) -> int:
    """CRC32C of what `crc` covers followed by `data`; begins with 0."""
    if isinstance(data, bytes):
        return int(google_crc32c.extend(crc, data))
    # The library takes bytes or an array, which copies nothing, but no other buffer.
    return int(google_crc32c.extend(crc, np.frombuffer(data, np.uint8))) if len(data) else crc


class Sink(ABC):
    """One object, written from front to back; there is none before `close` has returned.

    As a context: closed at the end, aborted by an exception.
    """

    def __init__(self) -> None:
        self.size, self._crc, self.closed = 0, 0, False

    @property
    def crc32c(self) -> str:
        """Eight hex digits, of everything written so far."""
        return f"{self._crc:08x}"

    def write(self, data: Bytes) -> int:
        """Appends all of `data`, which may be overwritten once this returns."""
        view = memoryview(data).cast("B")
        self._append(view)
        self._crc = extend_crc(self._crc, data)
        self.size += len(view)
        traffic.moved()
        return len(view)

    def close(self) -> None:
        """Makes the object appear, durable."""
        self._finish()
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @abstractmethod
    def abort(self) -> None:
        """Leaves nothing behind; does nothing after `close`."""

    @abstractmethod
    def _append(self, view: memoryview) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


class Store(ABC):
    """One prefix; keys are relative to it and "/"-separated."""

    @abstractmethod
    def head(self, key: str) -> Head | None:
        """The object without its bytes; None if there is none."""

    @abstractmethod
    def get(self, key: str) -> tuple[bytes, str]:
        """Bytes and tag, read together. FileNotFoundError if there is none.

        The tag is the ETag on s3://, the first 32 hex digits of the bytes' sha256 on file://.
        """

    @abstractmethod
    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """`length` bytes (fewer at the end) from `start`. FileNotFoundError if there is none."""

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A buffered, seekable reader. FileNotFoundError if there is none.

        Damaged if it was read from front to back and differs from the storage's own checksum.
        """

    def download(self, key: str, path: Path) -> tuple[int, str]:
        """Copies an object to a local file: its size and its CRC32C, eight hex digits.

        Folders are made, a file that is there is replaced; neither is durable before `sync`. Raises
        what reading the whole object does, and OSError that names the file.
        """
        size = crc = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.open(key) as source, path.open("wb", buffering=0) as file:
            while piece := source.read(READ_BYTES):
                write_at(file.fileno(), path, piece, size)
                size, crc = size + len(piece), extend_crc(crc, piece)
                traffic.moved()
        return size, f"{crc:08x}"

    @abstractmethod
    def list(self, prefix: str) -> Iterator[Head]:
        """Objects whose key starts with `prefix` (any string), sorted by key."""

    @abstractmethod
    def put(self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str = "") -> str:
        """Writes a small object and returns its tag (see `get`).

        Raises Conflict if `if_none_match` and there is one, or `if_match` and it has another tag.
        """

    @abstractmethod
    def sink(self, key: str) -> Sink:
        """A large object, to be written from front to back."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Deletes the object; nothing happens if there is none."""

    @abstractmethod
    def delete_unfinished(self, prefix: str, before: float, *, dry_run: bool = False) -> int:
        """Deletes what writers of keys with this prefix left unfinished; returns how many.

        Only what nobody has written to since Unix time `before`. `dry_run`: only counts.
        """

    @abstractmethod
    def uri(self, key: str) -> str:
        """Of an object, for messages."""

    def local(self, key: str) -> Path | None:
        """The path of an object (or folder) on this machine; None on s3://."""
        return None


def open_store(storage: Storage) -> Store:
    """The run's storage."""
    scheme, _, rest = storage.uri.partition("://")
    return FileStore(Path(rest)) if scheme == "file" else _s3(*_bucket(rest), storage)


def open_outside(uri: str, storage: Storage) -> tuple[Store, str]:
    """Where an input from outside is: a store and the key (file, folder, prefix or glob) in it.

    Endpoint, region and certificates are the storage's. hf://repo@commit is brought to the local
    cache first; OSError if it is neither there nor to be had, ConfigurationError without a commit.
    """
    scheme, _, rest = uri.partition("://")
    if scheme == "s3":
        bucket, key = _bucket(rest)
        return _s3(bucket, "", storage), key
    path = _snapshot(rest) if scheme == "hf" else os.path.abspath(rest)
    return FileStore(Path("/")), path.lstrip("/") + "/" * rest.endswith("/")


def _bucket(rest: str) -> tuple[str, str]:
    bucket, _, key = rest.partition("/")
    return bucket, key


def _s3(bucket: str, prefix: str, storage: Storage) -> Store:
    from btx_trainer.s3 import S3Store  # noqa: PLC0415 - boto3 is slow, file:// needs none of it

    return S3Store(bucket, prefix, storage)


def _snapshot(name: str) -> str:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow, and rarely needed

    repo, _, revision = name.strip("/").partition("@")
    pinned = bool(_COMMIT.fullmatch(revision))
    try:
        # Of what may change any time, only enough to tell what it is now.
        wanted = [*MODEL_FILES] if pinned else ["config.json"]
        path = snapshot_download(repo, revision=revision or None, allow_patterns=wanted)
    except Exception as error:  # the hub's client lets its HTTP client's errors through
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = lines[0] if lines else type(error).__name__
        raise OSError(errno.EIO, message, f"hf://{name}") from error
    if not pinned:
        raise ConfigurationError(
            f"hf://{name}", f"name a commit, here hf://{repo}@{os.path.basename(path)}"
        )
    return str(path)


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of an open file do not say which file it was."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_at(file: int, path: Path, data: bytes, position: int) -> None:
    """Writes all of `data` at a byte of an open file; errors name `path`."""
    view = memoryview(data)
    with _named(path):
        while view:
            count = os.pwrite(file, view[:WRITE_BYTES], position)
            view, position = view[count:], position + count


def _unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


class FileStore(Store):
    """A folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def uri(self, key: str) -> str:
        return f"file://{self.root / key}"

    def local(self, key: str) -> Path:
        return self.root / key

    def head(self, key: str) -> Head | None:
        path = self.root / key
        return self._head(path) if path.is_file() else None

    def _head(self, path: Path) -> Head:
        found = path.stat()
        key = str(path.relative_to(self.root))
        return Head(key=key, size=found.st_size, modified=found.st_mtime)

    def get(self, key: str) -> tuple[bytes, str]:
        data = (self.root / key).read_bytes()
        return data, _tag(data)

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        with (self.root / key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def open(self, key: str) -> BinaryIO:
        return (self.root / key).open("rb")

    def list(self, prefix: str) -> Iterator[Head]:
        start = str(self.root / prefix) + "/" * (prefix.endswith("/") or not prefix)
        paths: list[str] = []
        for folder, _, names in os.walk(start.rpartition("/")[0] or "/", onerror=_unreadable):
            found = (os.path.join(folder, n) for n in names if not n.startswith(_UNFINISHED))
            paths += (path for path in found if path.startswith(start))
        for path in map(Path, sorted(paths)):
            # What vanished since, or is a link to nothing, is not there.
            with suppress(FileNotFoundError):
                yield self._head(path)

    def put(self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str = "") -> str:
        sink = _FileSink(self.root / key)
        try:
            sink._append(memoryview(data))
            if if_none_match:
                sink.finish_new()
            elif if_match:
                self._swap(key, sink, if_match)
            else:
                sink.close()
        finally:
            sink.abort()
        return _tag(data)

    def _swap(self, key: str, sink: "_FileSink", tag: str) -> None:
        """Compare and swap; the lock keeps other swaps out, and a new object needs no lock."""
        folder = os.open((self.root / key).parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if self.get(key)[1] == tag:
                    return sink.close()
            raise Conflict(self.uri(key), f"is not {tag} any more")
        finally:
            os.close(folder)

    def sink(self, key: str) -> Sink:
        return _FileSink(self.root / key)

    def delete(self, key: str) -> None:
        path = self.root / key
        path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == self.root:
                return
            try:
                folder.rmdir()
            except OSError:
                return

    def delete_unfinished(self, prefix: str, before: float, *, dry_run: bool = False) -> int:
        count = 0
        for path in sorted((self.root / prefix).rglob(f"{_UNFINISHED}*")):
            with suppress(FileNotFoundError):
                old = path.stat().st_mtime < before
                count += old
                if old and not dry_run:
                    self.delete(str(path.relative_to(self.root)))
        return count


class _FileSink(Sink):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._partial = path.parent / f"{_UNFINISHED}{secrets.token_hex(8)}"
        for last in (False, False, True):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._partial.open("xb", buffering=0)
                return
            except FileNotFoundError:
                # Somebody's delete has just removed the empty folder.
                if last:
                    raise

    def _append(self, view: memoryview) -> None:
        with _named(self._path):
            while view:
                view = view[self._file.write(view[:WRITE_BYTES]) :]

    def _sync(self) -> None:
        with _named(self._path):
            os.fsync(self._file.fileno())
            self._file.close()

    def _finish(self) -> None:
        self._sync()
        self._partial.replace(self._path)
        sync(self._path.parent)

    def finish_new(self) -> None:
        """Like close, but raises Conflict if there is a file already; a link never replaces."""
        self._sync()
        try:
            os.link(self._partial, self._path)
        except FileExistsError as error:
            raise Conflict(f"file://{self._path}", "exists") from error
        sync(self._path.parent)

    def abort(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)
