"""s3:// storage: the only code that touches boto3, which it imports at once; see storage.py.

Credentials come from the client's own chain (environment, files, node). The client repeats
nothing: `S3Store.call` does, for every request, also those whose answer breaks off in the middle.
Large objects are read and written by s3_parts.py. Called by storage.py.
"""

from __future__ import annotations

import base64
import errno
import io
import os
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any, BinaryIO, TypedDict, TypeVar, cast

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ProxyConnectionError,
    SSLError,
)
from botocore.parsers import ResponseParserError
from btx_api.spec import Storage
from urllib3.exceptions import HTTPError

from btx_trainer.s3_parts import (
    DOWNLOADS_IN_FLIGHT,
    PART_BYTES,
    Reader,
    S3Sink,
    download,
    encoded,
    extend,
)
from btx_trainer.storage import READ_BYTES, Conflict, Damaged, Head, Sink, Store, traffic

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import ObjectTypeDef

ATTEMPTS = 12
"""Of a request that fails for a reason that may pass: about 45 s of pauses, and its time-outs.

AWS_MAX_ATTEMPTS in the environment counts instead.
"""
FIRST_ATTEMPTS = 3
"""Of connecting to a server that has never answered this client: the address may be wrong."""
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 20.0
"""The pause is anything up to so much, doubled each time ("full jitter")."""
PIECE_BYTES = 2**18
"""Of an answer, read at once: it is summed up and written while the processor still holds it."""
CONNECT_SECONDS, READ_SECONDS = 10, 60
"""Without a connection, or without a single byte."""
_PASSING = (
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "OperationAborted",
    "RequestTimeout", "SlowDown", "Throttling", "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
)  # fmt: skip
"""Error codes below 500 that another attempt may not meet."""
_BROKEN = (BotoCoreError, ResponseParserError, HTTPError, Damaged)
_UNREACHABLE = (EndpointConnectionError, ConnectTimeoutError, ProxyConnectionError)
_jitter = random.Random()
T = TypeVar("T")


class _PastEnd(OSError):
    """A range that begins at the end or behind it."""


class At(TypedDict):
    """Where an object is, as the client wants it."""

    Bucket: str
    Key: str


class S3Store(Store):
    """A prefix of a bucket. Credentials come from the client's chain: environment, files, node."""

    def __init__(self, bucket: str, prefix: str, storage: Storage) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._attempts = int(os.environ.get("AWS_MAX_ATTEMPTS") or ATTEMPTS)
        self._answered = False
        # One for all files: what is in flight does not grow with them.
        self.downloads = ThreadPoolExecutor(DOWNLOADS_IN_FLIGHT, thread_name_prefix="download")
        bundle = storage.ca_bundle
        if bundle and not os.path.isfile(bundle):
            raise FileNotFoundError(errno.ENOENT, "storage.caBundle is no file", bundle)
        try:
            self.client: S3Client = boto3.session.Session().client(
                "s3",
                endpoint_url=storage.endpoint,
                region_name=storage.region,
                verify=bundle,
                config=Config(
                    s3={"addressing_style": "path" if storage.path_style else "auto"},
                    retries={"mode": "standard", "total_max_attempts": 1},
                    connect_timeout=CONNECT_SECONDS,
                    read_timeout=READ_SECONDS,
                    # Many servers refuse trailing checksums; ours are headers.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                    max_pool_connections=32,
                ),
            )
        except (BotoCoreError, ValueError) as error:
            raise OSError(errno.EIO, _line(error), self.uri("")) from error

    def uri(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    def at(self, key: str) -> At:
        """Where a key is."""
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def call(self, key: str, request: Callable[..., T], **arguments: Any) -> T:
        """The answer of a request about `key`, repeated while its failure may pass.

        Raises FileNotFoundError, PermissionError, Conflict (412) or OSError, each naming the
        object. After a lost answer the request may have been carried out already.
        """
        attempt = 1
        while True:
            try:
                answer = request(**arguments)
                self._answered = True
                return answer
            except ClientError as error:
                self._answered = True
                if attempt >= self._attempts or not _passes(error):
                    raise self._translated(key, error, attempt) from error
            except _BROKEN as error:
                if attempt >= self._limit(error):
                    raise OSError(
                        errno.EIO, _tried(_line(error), attempt), self.uri(key)
                    ) from error
            longest = min(LONGEST_PAUSE_SECONDS, PAUSE_SECONDS * 2**attempt)
            sleep(_jitter.uniform(0, longest))
            attempt += 1

    def _limit(self, error: Exception) -> int:
        """How often a request is made that got no whole answer."""
        if isinstance(error, SSLError) and not self._answered:
            return 1
        if isinstance(error, _UNREACHABLE) and not self._answered:
            return min(FIRST_ATTEMPTS, self._attempts)
        passing = (HTTPClientError, IncompleteReadError, SSLError, *_UNREACHABLE)
        if isinstance(error, BotoCoreError) and not isinstance(error, passing):
            return 1  # no credentials, a parameter that cannot be: nothing was sent
        return self._attempts

    def _translated(self, key: str, error: ClientError, attempt: int) -> OSError:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "")
        uri = self.uri(key)
        if status == 412:
            return Conflict(uri, code)
        if status == 404:
            return FileNotFoundError(errno.ENOENT, code or "absent", uri)
        if status in (401, 403):
            return PermissionError(errno.EACCES, code or "denied", uri)
        if status == 416:
            return _PastEnd(errno.EINVAL, code, uri)
        return OSError(errno.EIO, _tried(f"{code} ({status})", attempt), uri)

    def head(self, key: str) -> Head | None:
        try:
            found = self.call(key, self.client.head_object, **self.at(key), ChecksumMode="ENABLED")
        except FileNotFoundError:
            return None
        return Head(
            key=key, size=found["ContentLength"], modified=found["LastModified"].timestamp(),
            tag=found["ETag"].strip('"'), checksum=_checksum(found),
        )  # fmt: skip

    def get(self, key: str) -> tuple[bytes, str]:
        return self.call(key, lambda: self._get(key))

    def _get(self, key: str) -> tuple[bytes, str]:
        found = self.client.get_object(**self.at(key), ChecksumMode="ENABLED")
        data, checksum = found["Body"].read(), _checksum(found)
        if checksum and checksum != extend(checksum.split()[0], 0, data)[1]:
            raise Damaged(self.uri(key), f"arrived without its {checksum}")
        return data, found["ETag"].strip('"')

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        if length is None or length > READ_BYTES:
            with self.open(key) as file:
                file.seek(start)
                return file.read(-1 if length is None else length)

        def read() -> bytes:
            part = f"bytes={start}-{start + length - 1}"
            return self.client.get_object(**self.at(key), Range=part)["Body"].read()

        try:
            return self.call(key, read)
        except _PastEnd:
            return b""

    def open(self, key: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(Reader(self, self._found(key)), READ_BYTES))

    def _found(self, key: str) -> Head:
        head = self.head(key)
        if head is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", self.uri(key))
        return head

    def download(self, key: str, path: Path) -> tuple[int, str]:
        return download(self, self._found(key), path)

    def fetch(self, head: Head, start: int, length: int, take: Callable[[bytes], None]) -> None:
        """A range of that version of an object; Conflict if there is another one by now.

        `take` gets it in pieces, in order and each once: what breaks off goes on where it broke
        off. Its own errors end the reading.
        """
        filled = 0

        def go_on() -> None:
            nonlocal filled
            begun = filled
            body = self.client.get_object(
                **self.at(head.key), Range=f"bytes={start + filled}-{start + length - 1}",
                IfMatch=f'"{head.tag}"',
            )["Body"]  # fmt: skip
            try:
                while piece := body.read(min(PIECE_BYTES, length - filled)):
                    take(piece)
                    filled += len(piece)
                    traffic.moved()
            except _BROKEN:
                if filled == begun:
                    raise
            finally:
                body.close()
            if filled == begun:
                raise IncompleteReadError(actual_bytes=filled, expected_bytes=length)

        while filled < length:
            self.call(head.key, go_on)

    def list(self, prefix: str) -> Iterator[Head]:
        heads: list[Head] = []
        where = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        for page in self._pages(prefix, self.client.list_objects_v2, where, ("ContinuationToken",)):
            heads += map(self._head, page.get("Contents", []))
        # Servers on a file system list folder by folder: "a/b" before "a-b".
        yield from sorted(heads, key=lambda head: head.key)

    def _pages(
        self, key: str, request: Callable[..., Any], where: Mapping[str, Any],
        markers: tuple[str, ...],
    ) -> Iterator[Any]:  # fmt: skip
        """All pages of a listing; answers name the next `markers` with Next before them."""
        more: dict[str, Any] = {}
        while True:
            page = self.call(key, request, **where, **more)
            yield page
            if not page.get("IsTruncated"):
                return
            more = {name: page[f"Next{name}"] for name in markers}

    def _head(self, item: ObjectTypeDef) -> Head:
        return Head(
            key=item["Key"].removeprefix(self._prefix), size=item["Size"],
            modified=item["LastModified"].timestamp(), tag=item["ETag"].strip('"'),
        )  # fmt: skip

    def put(self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str = "") -> str:
        extra: dict[str, Any] = {"IfNoneMatch": "*"} if if_none_match else {}
        if if_match:
            extra["IfMatch"] = f'"{if_match}"'
        crc = encoded(extend("crc32c", 0, data)[0])
        try:
            done = self.call(
                key, self.client.put_object, **self.at(key), Body=data, ChecksumCRC32C=crc, **extra
            )
        except Conflict:
            # The answer to our own success may have been lost, and this be the second attempt.
            found = self.get(key) if self.head(key) else (b"", "")
            if data and found[0] == data and found[1] != if_match:
                return found[1]
            raise
        except FileNotFoundError as error:
            if if_match:
                raise Conflict(self.uri(key), "is gone") from error
            raise
        return done["ETag"].strip('"')

    def sink(self, key: str) -> Sink:
        return S3Sink(self, key)

    def delete(self, key: str) -> None:
        self.call(key, self.client.delete_object, **self.at(key))

    def delete_unfinished(self, prefix: str, before: float, *, dry_run: bool = False) -> int:
        where = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        markers = ("KeyMarker", "UploadIdMarker")
        count = 0
        for page in self._pages(prefix, self.client.list_multipart_uploads, where, markers):
            for upload in page.get("Uploads", []):
                if upload["Initiated"].timestamp() < before:
                    key = upload["Key"].removeprefix(self._prefix)
                    count += self._abort_old(key, upload["UploadId"], before, dry_run)
        return count

    def _abort_old(self, key: str, upload: str, before: float, dry_run: bool) -> bool:
        """Aborts an upload unless a part has arrived since: a long one may be alive."""
        where = {**self.at(key), "UploadId": upload}
        for page in self._pages(key, self.client.list_parts, where, ("PartNumberMarker",)):
            if any(p["LastModified"].timestamp() >= before for p in page.get("Parts", [])):
                return False
        if not dry_run:
            self.call(key, self.client.abort_multipart_upload, **where)
        return True


def _passes(error: ClientError) -> bool:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = error.response.get("Error", {}).get("Code", "")
    return status in (408, 429) or code in _PASSING or (status >= 500 and status != 501)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _tried(message: str, attempts: int) -> str:
    return f"{message}; tried {attempts} times" if attempts > 1 else message


def _checksum(answer: Mapping[str, Any]) -> str:
    """As in Head; sums of sums (-n at the end) say nothing about the bytes."""
    for field, name in (("ChecksumCRC32C", "crc32c"), ("ChecksumCRC32", "crc32")):
        value = answer.get(field, "")
        if value and "-" not in value:
            return f"{name} {base64.b64decode(value).hex()}"
    return ""


assert PART_BYTES >= READ_BYTES
