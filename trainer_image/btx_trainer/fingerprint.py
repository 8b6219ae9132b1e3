"""Inputs from outside by their content: 22 base64url characters of a sha256.

Local bytes count by sha256, kept in the user's cache folder by (path, size, mtime, inode); objects
in S3 by ETag and size. Called by the preflight errand, and by artifacts.py to check that an input
is still what preflight saw.
"""

import base64
import hashlib
import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from fnmatch import fnmatch
from pathlib import Path

from btx_api.spec import Source, Storage

from btx_trainer.sources import ending, list_files
from btx_trainer.storage import MODEL_FILES, READ_BYTES, Head, Store, traffic

SETTLED_SECONDS = 2
"""A younger file may change once more within one tick of its mtime: its hash is not kept."""


def fingerprint_model(store: Store, key: str) -> str:
    """Of the files in folder `key` that make a model, their names included."""
    heads = model_files(store, key)
    names = [head.key.rpartition("/")[2] for head in heads]
    return _digest(f"{n} {c}" for n, c in zip(names, _contents(store, heads), strict=True))


def fingerprint_tokenizer(data: bytes) -> str:
    """Of a tokenizer.json."""
    return _digest([hashlib.sha256(data).hexdigest()])


def fingerprint_sources(sources: Sequence[Source], storage: Storage) -> str:
    """Of a domain; raises what `fingerprint_source` raises."""
    return fingerprint_domain([fingerprint_source(source, storage) for source in sources])


def fingerprint_domain(sources: Sequence[str]) -> str:
    """Of a domain whose sources have these fingerprints, in order."""
    return _digest(sources)


def fingerprint_source(source: Source, storage: Storage) -> str:
    """Endings and contents of a source's files, in the order in which they are read.

    Other names for the same files change nothing, another order does. Raises ConfigurationError if
    there is no file.
    """
    files = list_files(source, storage)
    heads = [head for _, _, head in files]
    endings = [ending(head.key) for head in heads]
    contents = _contents(files[0][0], heads)
    return _digest(f"{e} {c}" for e, c in zip(endings, contents, strict=True))


def model_files(store: Store, key: str) -> list[Head]:
    """Files of folder `key` that make a model, sorted."""
    folder = key.rstrip("/") + "/"
    names = ((head, head.key.removeprefix(folder)) for head in store.list(folder))
    return [
        head
        for head, name in names
        # `*` of fnmatch crosses folders; what lies in a subfolder is another model.
        if "/" not in name and any(fnmatch(name, pattern) for pattern in MODEL_FILES)
    ]


def tokenizer_key(key: str) -> str:
    """Key of the tokenizer.json that a URI names: the file itself, or in that folder."""
    return key if key.endswith(".json") else key.rstrip("/") + "/tokenizer.json"


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    return base64.urlsafe_b64encode(digest)[:22].decode()


def _contents(store: Store, heads: Sequence[Head]) -> list[str]:
    paths = [path for head in heads if (path := store.local(head.key))]
    if len(paths) == len(heads):
        return hashes(paths)
    return [f"{head.tag} {head.size}" for head in heads]


Row = tuple[str, int, int, int]


def hashes(paths: Sequence[Path]) -> list[str]:
    """sha256 of each file; of a file that has not changed since, from the cache."""
    rows = [_row(path) for path in paths]
    try:
        with closing(_cache()) as cache, cache:
            query = "SELECT sha256 FROM hash WHERE path=? AND size=? AND mtime=? AND inode=?"
            known = [cache.execute(query, row).fetchone() for row in rows]
    except (sqlite3.Error, OSError):
        known = [None] * len(rows)
    found = [hit[0] if hit else _sha256(p) for p, hit in zip(paths, known, strict=True)]
    horizon = (time.time() - SETTLED_SECONDS) * 1e9
    new = [
        (*row, digest)
        for row, hit, digest in zip(rows, known, found, strict=True)
        if hit is None and row[2] < horizon
    ]
    # The cache saves time and nothing else: a folder that cannot be written, a full disk.
    with suppress(sqlite3.Error, OSError), closing(_cache()) as cache, cache:
        cache.executemany("INSERT OR REPLACE INTO hash VALUES (?, ?, ?, ?, ?)", new)
    return found


def _row(path: Path) -> Row:
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns, found.st_ino


def _cache() -> sqlite3.Connection:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "btx"
    folder.mkdir(parents=True, exist_ok=True)
    cache = sqlite3.connect(folder / "hashes.sqlite")
    columns = "path TEXT PRIMARY KEY, size INT, mtime INT, inode INT, sha256 TEXT"
    cache.execute(f"CREATE TABLE IF NOT EXISTS hash ({columns})")
    return cache


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            traffic.moved()
    return digest.hexdigest()
