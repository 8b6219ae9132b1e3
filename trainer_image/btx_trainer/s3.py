"""s3:// storage: the only code that touches boto3, which it imports at once; see storage.py.

Credentials come from the client's own chain (environment, files, node). Called by storage.py.
"""

from __future__ import annotations

import errno
import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO, TypedDict, cast

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from btx_api.spec import Storage

from btx_trainer.storage import READ_BYTES, Conflict, Head, Sink, Store

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, ObjectTypeDef

PART_BYTES = 32 * 2**20
"""Of a multipart upload; 10,000 parts at the most, so objects up to 320 GB."""
UPLOADS_AHEAD = 4


class _PastEnd(OSError):
    """A range that begins at the end or behind it."""


class _At(TypedDict):
    Bucket: str
    Key: str


class S3Store(Store):
    """A prefix of a bucket. Credentials come from the client's chain: environment, files, node."""

    def __init__(self, bucket: str, prefix: str, storage: Storage) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._client: S3Client = boto3.session.Session().client(
            "s3",
            endpoint_url=storage.endpoint,
            region_name=storage.region,
            verify=storage.ca_bundle,
            config=Config(
                s3={"addressing_style": "path" if storage.path_style else "auto"},
                retries={"mode": "standard", "max_attempts": 6},
                # Many servers refuse trailing checksums; ours are in the manifests.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                max_pool_connections=32,
            ),
        )

    def uri(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    def _at(self, key: str) -> _At:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    @contextmanager
    def translated(self, key: str) -> Iterator[None]:
        """The client's errors as OSError; 409 and 412 as Conflict."""
        try:
            yield
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = error.response.get("Error", {}).get("Code", "")
            if status in (409, 412):
                raise Conflict(f"{self.uri(key)}: {code}") from error
            if status == 404:
                raise FileNotFoundError(errno.ENOENT, code or "absent", self.uri(key)) from error
            if status in (401, 403):
                raise PermissionError(errno.EACCES, code or "denied", self.uri(key)) from error
            if status == 416:
                raise _PastEnd(errno.EINVAL, code, self.uri(key)) from error
            raise OSError(f"{self.uri(key)}: {code} ({status})") from error
        except BotoCoreError as error:
            raise OSError(f"{self.uri(key)}: {error}") from error

    def head(self, key: str) -> Head | None:
        try:
            with self.translated(key):
                found = self._client.head_object(**self._at(key))
        except FileNotFoundError:
            return None
        return Head(
            key=key, size=found["ContentLength"], modified=found["LastModified"].timestamp(),
            tag=found["ETag"].strip('"'),
        )  # fmt: skip

    def get(self, key: str) -> tuple[bytes, str]:
        with self.translated(key):
            found = self._client.get_object(**self._at(key))
            return found["Body"].read(), found["ETag"].strip('"')

    def read(self, key: str, start: int = 0, length: int | None = None, *, tag: str = "") -> bytes:
        """See Store; Conflict if the object has not the given tag any more."""
        if length == 0:
            return b""
        wanted: dict[str, Any] = {**self._at(key)}
        if start or length is not None:
            end = "" if length is None else start + length - 1
            wanted["Range"] = f"bytes={start}-{end}"
        if tag:
            wanted["IfMatch"] = f'"{tag}"'
        try:
            with self.translated(key):
                return self._client.get_object(**wanted)["Body"].read()
        except _PastEnd:
            return b""

    def open(self, key: str) -> BinaryIO:
        head = self.head(key)
        if head is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", self.uri(key))
        return cast(BinaryIO, io.BufferedReader(_Remote(self, head), READ_BYTES))

    def list(self, prefix: str) -> Iterator[Head]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        with self.translated(prefix):
            heads = [self._head(item) for page in pages for item in page.get("Contents", [])]
        # Servers on a file system list folder by folder: "a/b" before "a-b".
        yield from sorted(heads, key=lambda head: head.key)

    def _head(self, item: ObjectTypeDef) -> Head:
        return Head(
            key=item["Key"].removeprefix(self._prefix), size=item["Size"],
            modified=item["LastModified"].timestamp(), tag=item["ETag"].strip('"'),
        )  # fmt: skip

    def put(self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str = "") -> str:
        extra: dict[str, Any] = {"IfNoneMatch": "*"} if if_none_match else {}
        if if_match:
            extra["IfMatch"] = f'"{if_match}"'
        try:
            with self.translated(key):
                done = self._client.put_object(**self._at(key), Body=data, **extra)
        except FileNotFoundError as error:
            if if_match:
                raise Conflict(f"{self.uri(key)}: is gone") from error
            raise
        return done["ETag"].strip('"')

    def sink(self, key: str) -> Sink:
        return _S3Sink(self, self._client, key, self._at(key))

    def delete(self, key: str) -> None:
        with self.translated(key):
            self._client.delete_object(**self._at(key))


class _Remote(io.RawIOBase):
    """Reads of one version of an object; another version ends in Conflict."""

    def __init__(self, store: S3Store, head: Head) -> None:
        self._store, self._head, self._position = store, head, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._head.size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._head.size - self._position))
        data = self._store.read(self._head.key, self._position, length, tag=self._head.tag)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class _S3Sink(Sink):
    def __init__(self, store: S3Store, client: S3Client, key: str, at: _At) -> None:
        super().__init__()
        self._store, self._client, self._key, self._at = store, client, key, at
        self._buffer, self._upload = bytearray(), ""
        self._parts: list[CompletedPartTypeDef] = []
        self._pending: deque[Future[CompletedPartTypeDef]] = deque()
        self._pool = ThreadPoolExecutor(UPLOADS_AHEAD)

    def _append(self, view: memoryview) -> None:
        while len(view):
            room = PART_BYTES - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]
            if len(self._buffer) == PART_BYTES:
                self._send()

    def _send(self) -> None:
        with self._store.translated(self._key):
            if not self._upload:
                self._upload = self._client.create_multipart_upload(**self._at)["UploadId"]
            if len(self._pending) == UPLOADS_AHEAD:
                self._parts.append(self._pending.popleft().result())
        number = len(self._parts) + len(self._pending) + 1
        self._pending.append(self._pool.submit(self._send_part, number, bytes(self._buffer)))
        self._buffer.clear()

    def _send_part(self, number: int, data: bytes) -> CompletedPartTypeDef:
        with self._store.translated(self._key):
            part = self._client.upload_part(
                **self._at, UploadId=self._upload, PartNumber=number, Body=data
            )
        return {"PartNumber": number, "ETag": part["ETag"]}

    def _finish(self) -> None:
        with self._store.translated(self._key):
            if not self._upload:
                self._client.put_object(**self._at, Body=bytes(self._buffer))
            else:
                if self._buffer:
                    self._send()
                self._parts += [future.result() for future in self._pending]
                self._client.complete_multipart_upload(
                    **self._at, UploadId=self._upload, MultipartUpload={"Parts": self._parts}
                )
        self._pool.shutdown()

    def abort(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._upload and not self.closed:
            # Whatever stopped the upload matters more than a part left over.
            with suppress(OSError), self._store.translated(self._key):
                self._client.abort_multipart_upload(**self._at, UploadId=self._upload)
