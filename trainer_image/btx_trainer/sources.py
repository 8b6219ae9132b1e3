"""Which files a source's URI pattern names, and which documents are in them.

Listing is shared with fingerprint.py, so that a fingerprint covers what prepare reads. Reading has
two steps: `chunks` cuts files in one thread, at the storage's speed and in constant memory;
`documents` decodes a chunk in any thread. Called by fingerprint.py and encoding.py.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from posixpath import splitext
from typing import BinaryIO, Self

import pyarrow
import pyarrow.parquet
from btx_api.spec import Source, SourceFormat, SourceShape, Storage

from btx_trainer.errors import ConfigurationError
from btx_trainer.storage import Head, Store, open_outside

CHUNK_BYTES = 1 << 20
"""About so much text is one chunk: enough to be worth a thread's while, little to hold."""
PIECE_BYTES = 16 << 10
"""A plain text of up to twice this is one document; of a longer one, a document ends at the first
blank line from here on, from twice this on at the end of a line.

Few long files must not make a held-out split impossible. Part of the kind's version.
"""
MAX_ROWS = 8192
"""Parquet: at most so many rows are decoded at once."""
_TEXT_TYPES = (
    pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(),
    pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view(),
)  # fmt: skip
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
_FORMATS = {
    "jsonl": SourceFormat.JSONL, "json": SourceFormat.JSONL, "parquet": SourceFormat.PARQUET,
}  # fmt: skip
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_BOM = b"\xef\xbb\xbf"

Listed = tuple[Store, str, Head]


class Lost(StrEnum):
    """Why a record is not a document."""

    EMPTY = "empty"
    """Nothing but white space."""
    UNDECODABLE = "undecodable"
    """Not UTF-8, not a JSON object, or the field is missing or no string."""
    OVERSIZED = "oversized"
    """The record (a JSONL line, a Parquet value, a piece of text) is over maxRecordBytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Some records of one source, in the order of its files."""

    field: str
    """JSONL: the field that holds the text; empty: a blob is the text of one record."""
    blobs: list[bytes]
    """JSONL: whole lines."""
    lost: Counter[Lost]
    """Records that reading alone has left out."""
    stored: int
    """Bytes of the file that were read for it (progress)."""


@dataclass(slots=True)
class Documents:
    """What a chunk holds."""

    texts: list[bytes] = field(default_factory=list)
    """Valid UTF-8, not empty."""
    lost: Counter[Lost] = field(default_factory=Counter)
    example: str = ""
    """Why the first undecodable record is undecodable."""


def list_files(source: Source, storage: Storage) -> list[Listed]:
    """Files of a source, sorted by key. ConfigurationError if there is none.

    `*` stands for anything but `/`, `**` for any folders, a final `/` for everything below. None
    of them finds names that begin with a dot.
    """
    if source.uri.startswith("hf://"):
        raise ConfigurationError(source.uri, "hf:// holds models; a source is file:// or s3://")
    store, pattern = open_outside(source.uri, storage)
    if pattern.endswith("/"):
        pattern += "**"
    if "*" in pattern:
        folder = pattern[: pattern.rfind("/", 0, pattern.find("*")) + 1]
        wanted = _regex(pattern)
        heads = [head for head in store.list(folder) if wanted.fullmatch(head.key)]
    else:
        found = store.head(pattern)
        heads = [found] if found else []
    if not heads:
        raise ConfigurationError(source.uri, "matches no file (a folder's name ends in '/')")
    return [(store, head.key, head) for head in heads]


def _regex(pattern: str) -> re.Pattern[str]:
    *folders, last = pattern.split("/")
    below = r"(?:(?!\.)[^/]+/)*"
    parts = [below if name == "**" else _segment(name) + "/" for name in folders]
    return re.compile("".join(parts) + below * (last == "**") + _segment(last))


def _segment(glob: str) -> str:
    visible = r"(?!\.)" * glob.startswith("*")
    return visible + "[^/]*".join(map(re.escape, re.split(r"\*+", glob)))


def chunks(files: Iterable[Listed], shape: SourceShape, max_record_bytes: int) -> Iterator[Chunk]:
    """Cuts files into chunks of about CHUNK_BYTES; where depends on the bytes alone.

    ConfigurationError names a file that is not what its ending says.
    """
    for store, key, _ in files:
        format = _format(shape, key)
        field = shape.field if format is SourceFormat.JSONL else ""
        with store.open(key) as raw, _File(raw, store.uri(key)) as file:
            if format is SourceFormat.PARQUET:
                blobs = _values(file, shape.field)
            else:
                cut = _lines if format is SourceFormat.JSONL else _pieces
                blobs = cut(_plain(file, key), max_record_bytes)
            start = 0
            for group, lost in _grouped(blobs):
                stop = file.tell()
                yield Chunk(field=field, blobs=group, lost=lost, stored=stop - start)
                start = stop


class _File:
    """A file as decoders see it; what they raise becomes a ConfigurationError naming the file.

    Errors of reading itself pass: the storage may heal. Arrow raises OSError for both.
    """

    closed = False

    def __init__(self, raw: BinaryIO, where: str) -> None:
        self._raw, self.where, self._failed = raw, where, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        # Arrow's message may go on with a stack of its own.
        if isinstance(error, OSError | pyarrow.ArrowException) and not self._failed:
            line = (str(error).splitlines() or ["unknown"])[0]
            raise ConfigurationError(self.where, f"cannot be read: {line}") from error

    def read(self, size: int = -1) -> bytes:
        try:
            return self._raw.read(size)
        except OSError:
            self._failed = True
            raise

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def close(self) -> None:
        """Arrow closes what it has read to the end; the owner is `chunks`."""


def ending(key: str) -> str:
    """What of a name decides how the file is read: `.jsonl.gz`."""
    name, last = splitext(key)
    return splitext(name)[1] + last if last in _COMPRESSION else last


def _format(shape: SourceShape, key: str) -> SourceFormat:
    if shape.format is not SourceFormat.AUTO:
        return shape.format
    return _FORMATS.get(ending(key).lstrip(".").split(".")[0], SourceFormat.TEXT)


def _plain(file: _File, key: str) -> Callable[[int], bytes]:
    """Reads a file, decompressed by its ending."""
    if kind := _COMPRESSION.get(splitext(key)[1]):
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), kind)
        return stream.read  # type: ignore[no-any-return]  # pyarrow has no types
    return file.read


def _grouped(blobs: Iterable[bytes | Lost]) -> Iterator[tuple[list[bytes], Counter[Lost]]]:
    group: list[bytes] = []
    lost: Counter[Lost] = Counter()
    size = 0
    for blob in blobs:
        if isinstance(blob, Lost):
            lost[blob] += 1
            continue
        group.append(blob)
        size += len(blob)
        # A block of lines is a little shorter than what was read for it.
        if size >= CHUNK_BYTES // 2:
            yield group, lost
            group, lost, size = [], Counter(), 0
    if group or lost:
        yield group, lost


def _lines(read: Callable[[int], bytes], limit: int) -> Iterator[bytes | Lost]:
    """Blocks of whole lines; a line over `limit` that spans blocks is Lost."""
    rest, skipping = b"", False
    while data := read(CHUNK_BYTES):
        if skipping:
            _, newline, data = data.partition(b"\n")
            skipping = not newline
            if skipping:
                continue
        block = rest + data
        cut = block.rfind(b"\n") + 1
        if cut:
            yield block[:cut]
        rest = block[cut:]
        if len(rest) > limit:
            yield Lost.OVERSIZED
            rest, skipping = b"", True
    # The last line may end without a newline.
    if rest:
        yield rest


def _pieces(read: Callable[[int], bytes], limit: int) -> Iterator[bytes | Lost]:
    """Documents of a plain text file, see PIECE_BYTES; an empty file is one empty document."""
    rest, skipping, ended = b"", False, False
    data = read(CHUNK_BYTES)
    if not data:
        yield b""
    while not ended:
        if skipping:
            _, newline, data = data.partition(b"\n")
            skipping = not newline
        block, start = rest + data, 0
        data = read(CHUNK_BYTES)
        ended = not data
        while not skipping and (end := _piece_end(block, start, ended)) > start:
            yield block[start:end]
            start = end
        rest = block[start:]
        if len(rest) > max(limit, 2 * PIECE_BYTES):
            yield Lost.OVERSIZED
            rest, skipping = b"", True


def _piece_end(block: bytes, start: int, ended: bool) -> int:
    """Where the document that begins at `start` ends; `start` if more must be read to know."""
    early, late = start + PIECE_BYTES, start + 2 * PIECE_BYTES
    if len(block) >= late:
        if blank := _BLANK_LINE.search(block, early, late):
            return blank.end()
        if newline := block.find(b"\n", late) + 1:
            return newline
    return len(block) if ended else start


def _values(source: _File, column: str) -> Iterator[bytes | Lost]:
    """The values of a Parquet column, a few rows in memory at a time."""
    # Buffered and not read ahead: else a whole row group is in memory.
    file = pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=CHUNK_BYTES)
    schema = file.schema_arrow
    if column not in schema.names:
        names = ", ".join(schema.names)[:200]
        raise ConfigurationError(source.where, f"no column {column!r} (columns: {names})")
    kind = schema.field(column).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if kind not in _TEXT_TYPES:
        raise ConfigurationError(source.where, f"column {column!r} holds {kind}, not text")
    leaf = file.schema.names.index(column)
    groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
    size = sum(group.column(leaf).total_uncompressed_size for group in groups)
    rows = CHUNK_BYTES * file.metadata.num_rows // max(size, 1)
    for batch in file.iter_batches(min(max(rows, 1), MAX_ROWS), columns=[column]):
        for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
            yield Lost.UNDECODABLE if value is None else value


def documents(chunk: Chunk, max_record_bytes: int) -> Documents:
    """Decodes and checks the records of a chunk."""
    found = Documents(lost=Counter(chunk.lost))
    for record in _records(chunk):
        if len(record) > max_record_bytes:
            found.lost[Lost.OVERSIZED] += 1
            continue
        try:
            text = _text(record, chunk.field)
        except ValueError as error:
            found.lost[Lost.UNDECODABLE] += 1
            found.example = found.example or str(error).splitlines()[0]
            continue
        if not text or text.isspace():
            found.lost[Lost.EMPTY] += 1
        else:
            found.texts.append(text)
    return found


def _records(chunk: Chunk) -> Iterator[bytes]:
    for blob in chunk.blobs:
        if not chunk.field:
            yield blob
            continue
        # A line without anything on it is no record.
        yield from (line for line in blob.split(b"\n") if line and not line.isspace())


def _text(record: bytes, field: str) -> bytes:
    """Text of a record as UTF-8; ValueError says why there is none."""
    text = record.removeprefix(_BOM).decode()
    if field:
        try:
            line = json.loads(text)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(line, dict) or not isinstance(line.get(field), str):
            raise ValueError(f"no string field {field!r}")
        text = line[field]
    return text.encode()
