"""Large objects of s3://: written in parts and read in ranges, several at once; see s3.py.

Memory of one reader or writer: at most PARTS_IN_FLIGHT + 1 parts, whatever the object's size. All
downloads of a store together hold one piece (s3.PIECE_BYTES) for each of DOWNLOADS_IN_FLIGHT.
"""

from __future__ import annotations

import base64
import io
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from btx_trainer.storage import READ_BYTES, Damaged, Head, Sink, extend_crc, traffic, write_at

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

    from btx_trainer.s3 import S3Store

PART_BYTES = 32 * 2**20
"""Of an upload and of reading ahead; behind an upload's first 1,000 parts, twice as much.

S3 allows 10,000 parts: objects up to 637 GB.
"""
PARTS_IN_FLIGHT = 4
DOWNLOADS_IN_FLIGHT = 8
"""Ranges of PART_BYTES, of all files that one store is asked to download at a time."""
_POLYNOMIALS = {"crc32c": 0x82F63B78, "crc32": 0xEDB88320}
"""Without x**32, lowest bit first: the highest power of x is bit 0."""


def extend(algorithm: str, crc: int, data: bytes | memoryview) -> tuple[int, str]:
    """The sum of what `crc` covers followed by `data`, also as in Head.checksum."""
    crc = extend_crc(crc, data) if algorithm == "crc32c" else zlib.crc32(data, crc)
    return crc, f"{algorithm} {crc:08x}"


def _times(polynomial: int, a: int, b: int) -> int:
    """The product of two remainders, modulo the polynomial."""
    product = 0
    for bit in range(31, -1, -1):
        product ^= b if a >> bit & 1 else 0
        b = b >> 1 ^ (polynomial if b & 1 else 0)
    return product


def joined(algorithm: str, crc: int, other: int, length: int) -> int:
    """The sum of what `crc` covers followed by the `length` bytes that `other` covers.

    A sum is a remainder modulo the polynomial; a byte behind it multiplies it by x**8.
    """
    polynomial, power = _POLYNOMIALS[algorithm], 1 << 23
    while length:
        crc = _times(polynomial, crc, power) if length & 1 else crc
        power, length = _times(polynomial, power, power), length >> 1
    return crc ^ other


def download(store: S3Store, head: Head, path: Path) -> tuple[int, str]:
    """See Store.download: ranges of one version, side by side and written as they come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ranges = [(at, min(PART_BYTES, head.size - at)) for at in range(0, head.size, PART_BYTES)]
    with path.open("wb", buffering=0) as file:
        copy = _Copy(store, head, path, file.fileno())
        parts = [store.downloads.submit(copy.part, *one) for one in ranges]
        try:
            found = [part.result() for part in parts]
        finally:
            # Nobody writes to the file once it is closed.
            wait([part for part in parts if not part.cancel()])
    sums = dict.fromkeys(copy.algorithms, 0)
    for (_, length), crcs in zip(ranges, found, strict=True):
        sums = {name: joined(name, crc, crcs[name], length) for name, crc in sums.items()}
    arrived = {f"{name} {crc:08x}" for name, crc in sums.items()}
    if head.checksum and head.checksum not in arrived:
        raise Damaged(store.uri(head.key), f"arrived as {max(arrived)}, is {head.checksum}")
    return head.size, f"{sums['crc32c']:08x}"


@dataclass(frozen=True, slots=True)
class _Copy:
    """An object on its way to an open file."""

    store: S3Store
    head: Head
    path: Path
    file: int

    @property
    def algorithms(self) -> set[str]:
        """Ours, and the one of the sum that the storage keeps."""
        return {"crc32c", *self.head.checksum.split()[:1]}

    def part(self, start: int, length: int) -> dict[str, int]:
        """Writes a range where it belongs; its sums by algorithm."""
        crcs, position = dict.fromkeys(self.algorithms, 0), start

        def take(piece: bytes) -> None:
            nonlocal position
            write_at(self.file, self.path, piece, position)
            position += len(piece)
            for name, crc in crcs.items():
                crcs[name] = extend(name, crc, piece)[0]

        self.store.fetch(self.head, start, length, take)
        return crcs


def encoded(crc: int) -> str:
    """As S3 wants it."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


class Reader(io.RawIOBase):
    """One version of an object; another version ends in Conflict.

    The longer it is read from front to back, the more is fetched ahead of it, as a disk does.
    """

    def __init__(self, store: S3Store, head: Head) -> None:
        super().__init__()
        self._store, self._head, self._position = store, head, 0
        self._start, self._data = 0, memoryview(b"")
        # Memory that is new costs as much as filling it: parts that were read are written over.
        self._used: deque[memoryview] = deque()
        self._ahead: deque[tuple[int, int, Future[memoryview]]] = deque()
        self._streak = 0
        self._summed, self._crc = 0, 0
        self._pool = ThreadPoolExecutor(PARTS_IN_FLIGHT, thread_name_prefix="read")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._head.size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        offset = self._position - self._start
        if not 0 <= offset < len(self._data):
            if self._position >= self._head.size:
                return 0
            self._next()
            offset = 0
        piece = self._data[offset : offset + len(view)]
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._ahead.clear()
        self._used.clear()
        self._data = memoryview(b"")
        super().close()

    def _next(self) -> None:
        """Gets the part that begins at the position."""
        end = self._start + len(self._data)
        if isinstance(whole := self._data.obj, np.ndarray):
            self._used.append(whole.data)
        self._data = memoryview(b"")
        if self._position == end and end:
            self._streak += 1
        else:
            self._streak = 0
        if not self._ahead or self._ahead[0][0] != self._position:
            for *_, future in self._ahead:
                future.cancel()
            self._ahead.clear()
        self._plan()
        self._start, _, future = self._ahead.popleft()
        self._data = future.result()
        self._check()

    def _plan(self) -> None:
        """Fetches ahead: one part at first, then two, then all, and larger ones."""
        size = min(PART_BYTES, READ_BYTES << min(self._streak, 8))
        start = sum(self._ahead[-1][:2]) if self._ahead else self._position
        most = min(1 << self._streak, PARTS_IN_FLIGHT)
        while len(self._ahead) < most and start < self._head.size:
            length = min(size, self._head.size - start)
            future = self._pool.submit(self._fetch, start, length)
            self._ahead.append((start, length, future))
            start += length

    def _fetch(self, start: int, length: int) -> memoryview:
        try:
            whole = self._used.pop()
        except IndexError:
            whole = np.empty(PART_BYTES, np.uint8).data
        data, filled = whole[:length], 0

        def take(piece: bytes) -> None:
            nonlocal filled
            data[filled : filled + len(piece)] = piece
            filled += len(piece)

        self._store.fetch(self._head, start, length, take)
        return data

    def _check(self) -> None:
        """Sums up what is read from front to back; at the end it must be what the storage says."""
        head = self._head
        if not head.checksum or self._start != self._summed:
            return
        self._crc, found = extend(head.checksum.split()[0], self._crc, self._data)
        self._summed += len(self._data)
        if self._summed == head.size and found != head.checksum:
            raise Damaged(self._store.uri(head.key), f"arrived as {found}, is {head.checksum}")


class _Body(io.RawIOBase):
    """A part on its way out; the watchdog sees it move."""

    def __init__(self, data: memoryview) -> None:
        super().__init__()
        self._data, self._position = data, 0

    def read(self, size: int = -1) -> bytes:
        # The client asks for 16 KiB at a time, 2,000 times a part; it takes more as well.
        size = len(self._data) if size < 0 else max(size, 2**18)
        piece = bytes(self._data[self._position : self._position + size])
        self._position += len(piece)
        traffic.moved()
        return piece

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, len(self._data))[whence]
        return self._position


def _body(data: memoryview) -> IO[bytes]:
    return cast(IO[bytes], _Body(data))


class S3Sink(Sink):
    """See Sink. An object of less than one part is one request, any other a multipart upload."""

    def __init__(self, store: S3Store, key: str) -> None:
        super().__init__()
        self._store, self._key, self._at = store, key, store.at(key)
        self._buffer, self._upload = bytearray(), ""
        self._parts: list[CompletedPartTypeDef] = []
        self._pending: deque[Future[CompletedPartTypeDef]] = deque()
        self._pool = ThreadPoolExecutor(PARTS_IN_FLIGHT, thread_name_prefix="write")

    def _append(self, view: memoryview) -> None:
        while len(view):
            size = PART_BYTES * (1 if len(self._parts) < 1000 else 2)
            room = size - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]
            if len(self._buffer) >= size:
                self._send()

    def _send(self) -> None:
        if not self._upload:
            self._upload = self._store.call(
                self._key, self._store.client.create_multipart_upload, **self._at,
                ChecksumAlgorithm="CRC32C", ChecksumType="FULL_OBJECT",
            )["UploadId"]  # fmt: skip
        if len(self._pending) == PARTS_IN_FLIGHT:
            self._parts.append(self._pending.popleft().result())
        number = len(self._parts) + len(self._pending) + 1
        self._pending.append(self._pool.submit(self._send_part, number, memoryview(self._buffer)))
        self._buffer = bytearray()

    def _send_part(self, number: int, data: memoryview) -> CompletedPartTypeDef:
        crc = encoded(extend_crc(0, data))

        def send() -> str:
            return self._store.client.upload_part(
                **self._at, UploadId=self._upload, PartNumber=number, Body=_body(data),
                ChecksumCRC32C=crc,
            )["ETag"]  # fmt: skip

        return {
            "PartNumber": number, "ETag": self._store.call(self._key, send), "ChecksumCRC32C": crc
        }  # fmt: skip

    def _finish(self) -> None:
        if self._upload:
            if self._buffer:
                self._send()
            self._parts += [future.result() for future in self._pending]
            self._complete()
        else:
            self._store.call(self._key, self._put)
        self._pool.shutdown()

    def _put(self) -> None:
        self._store.client.put_object(
            **self._at, Body=_body(memoryview(self._buffer)), ChecksumCRC32C=encoded(self._crc)
        )

    def _complete(self) -> None:
        try:
            self._store.call(
                self._key, self._store.client.complete_multipart_upload, **self._at,
                UploadId=self._upload, MultipartUpload={"Parts": self._parts},
                ChecksumCRC32C=encoded(self._crc), ChecksumType="FULL_OBJECT",
            )  # fmt: skip
        except FileNotFoundError:
            # The answer to our own success may have been lost; nobody else writes this key.
            head = self._store.head(self._key)
            if head is None or head.size != self.size:
                raise
            if head.checksum and head.checksum != f"crc32c {self.crc32c}":
                raise

    def abort(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._upload and not self.closed:
            # Whatever stopped the upload matters more than a part left over.
            with suppress(OSError):
                self._store.call(
                    self._key, self._store.client.abort_multipart_upload, **self._at,
                    UploadId=self._upload,
                )  # fmt: skip
