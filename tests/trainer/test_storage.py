"""Storage: the same promises on files and on a real S3 server."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import pytest
from btx_api.spec import Storage
from btx_trainer import s3_parts
from btx_trainer.storage import Conflict, extend_crc, open_outside, open_store


def test_what_is_put_is_read_whole_and_in_part(store):
    """put, get, read, open and head agree on bytes, size and tag."""
    tag = store.put("a/b.bin", b"0123456789")

    assert store.get("a/b.bin") == (b"0123456789", tag)
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read("a/b.bin", 3, 4) == b"3456"
    assert store.read("a/b.bin", 8, 100) == b"89"
    assert store.head("a/b.bin").size == 10
    with store.open("a/b.bin") as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"789"
        file.seek(0)
        assert file.read(2) == b"01"


def test_what_is_not_there(store):
    """Absence is None from head, FileNotFoundError from reads, nothing from delete and list."""
    assert store.head("nothing") is None
    for read in (store.get, store.read, store.open):
        with pytest.raises(FileNotFoundError):
            read("nothing")
    store.delete("nothing")
    assert list(store.list("nothing")) == []


def test_list_takes_any_prefix_and_sorts_by_key(store):
    """A prefix is a string, not a folder; keys sort as strings across folders."""
    keys = ["runs/a.json", "stages/mix-2/x", "stages/mix/1/x", "stages/mix/1/y", "stages/mixed"]
    for key in reversed(keys):
        store.put(key, b"x")

    assert [head.key for head in store.list("")] == sorted(keys)
    assert [head.key for head in store.list("stages/mix")] == sorted(keys[1:])
    assert [head.key for head in store.list("stages/mix/")] == keys[2:4]
    assert [head.size for head in store.list("runs/")] == [1]


def test_conditional_puts(store):
    """if_none_match never replaces; if_match replaces only what has that tag."""
    first = store.put("key", b"one", if_none_match=True)
    with pytest.raises(Conflict):
        store.put("key", b"two", if_none_match=True)
    with pytest.raises(Conflict):
        store.put("key", b"two", if_match="0" * 32)
    second = store.put("key", b"two", if_match=first)
    with pytest.raises(Conflict):
        store.put("key", b"three", if_match=first)
    assert store.get("key") == (b"two", second)
    store.delete("key")
    with pytest.raises(Conflict):
        store.put("key", b"three", if_match=second)
    assert store.head("key") is None


@pytest.mark.parametrize("condition", ["new", "swap"])
def test_of_many_conditional_writers_one_wins(store, condition):
    """Eight writers of one key at once: one succeeds, and its bytes are there."""
    for turn in range(5):
        key = f"key-{turn}"
        options = {"if_none_match": True}
        if condition == "swap":
            options = {"if_match": store.put(key, b"old")}

        def write(writer, key=key, options=options):
            try:
                return store.put(key, b"%d" % writer, **options)
            except Conflict:
                return None

        with ThreadPoolExecutor(8) as pool:
            tags = list(pool.map(write, range(8)))
        winners = [i for i, tag in enumerate(tags) if tag]

        assert len(winners) == 1
        assert store.get(key) == (b"%d" % winners[0], tags[winners[0]])


def test_sink_writes_in_parts_and_sums_up(store, monkeypatch):
    """A large object arrives whole through a multipart upload; size and CRC32C are its own."""
    monkeypatch.setattr(s3_parts, "PART_BYTES", 5 * 2**20)  # the least that S3 allows
    data = os.urandom(17 * 2**20 + 3)
    with store.sink("big") as sink:
        for start in range(0, len(data), 3_000_000):
            sink.write(memoryview(bytearray(data[start : start + 3_000_000])))

    assert store.read("big") == data
    assert sink.size == len(data)
    assert sink.crc32c == f"{google_crc32c.value(data):08x}"
    with store.open("big") as file:
        file.seek(9_000_000)
        assert file.read(9_000_000) == data[9_000_000:]


def test_an_aborted_sink_leaves_nothing(store, monkeypatch):
    """An exception inside `with` leaves no object and no part of one."""
    monkeypatch.setattr(s3_parts, "PART_BYTES", 5 * 2**20)
    with pytest.raises(ZeroDivisionError), store.sink("folder/big") as sink:
        sink.write(b"x" * 6 * 2**20)
        raise ZeroDivisionError

    assert list(store.list("")) == []


def test_empty_objects(store):
    """An object without bytes exists, and reading past an end gives nothing."""
    with store.sink("empty"):
        pass

    assert store.head("empty").size == 0
    assert store.get("empty")[0] == b""
    assert store.read("empty", 0, 10) == b""
    with store.open("empty") as file:
        assert file.read() == b""


def test_crc_of_pieces_is_the_crc_of_the_whole():
    """The check value of CRC32C, from bytes and from a writable buffer, in pieces."""
    whole = memoryview(bytearray(b"123456789"))

    assert extend_crc(0, whole) == 0xE3069283
    assert extend_crc(extend_crc(0, b"1234"), whole[4:]) == 0xE3069283


def test_an_object_that_changes_while_it_is_read(s3_endpoint):
    """A reader sees one version of an S3 object, or Conflict."""
    store = open_store(Storage(uri="s3://btx/changing", endpoint=s3_endpoint, path_style=True))
    store.put("key", b"1" * 20_000_000)
    with store.open("key") as file:
        assert file.read(1) == b"1"
        store.put("key", b"2" * 20_000_000)
        with pytest.raises(Conflict):
            file.read()


def test_wrong_credentials_and_missing_servers_are_one_line(s3_endpoint, monkeypatch):
    """Whatever the client library raises becomes OSError with one line naming the object."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    refused = open_store(Storage(uri="s3://btx/p", endpoint=s3_endpoint, path_style=True))
    with pytest.raises(PermissionError) as caught:
        refused.get("key")
    assert caught.value.filename == "s3://btx/p/key"
    nobody = open_store(Storage(uri="s3://btx/p", endpoint="http://127.0.0.1:9", path_style=True))
    with pytest.raises(OSError, match="Could not connect") as caught:
        nobody.put("key", b"")
    assert caught.value.filename == "s3://btx/p/key"
    assert "127.0.0.1:9" in caught.value.strerror and "\n" not in caught.value.strerror


def test_inputs_from_outside(storage, store, tmp_path, monkeypatch):
    """file:// is relative to the working folder; s3:// uses the storage's endpoint."""
    store.put("data/x.jsonl", b"{}")
    found, key = open_outside(f"{storage.uri}/data/", storage)
    assert [head.key.endswith("data/x.jsonl") for head in found.list(key)] == [True]
    monkeypatch.chdir(tmp_path)
    Path("here.txt").write_text("here")
    found, key = open_outside("file://here.txt", storage)
    assert found.read(key) == b"here"
    assert found.local(key) == tmp_path / "here.txt"


def test_a_model_from_the_hub_that_is_not_cached(tmp_path, monkeypatch):
    """Offline, a model that is not in the local cache is one line naming it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    storage = Storage(uri="file://storage")

    with pytest.raises(OSError, match="Errno") as caught:
        open_outside("hf://someone/model@0123", storage)
    assert caught.value.filename == "hf://someone/model@0123"
    assert caught.value.strerror and "\n" not in caught.value.strerror


def test_a_full_disk_names_the_file(tmp_path):
    """No space left is an OSError with the object's own path; nothing is left behind."""
    store = open_store(Storage(uri=f"file://{tmp_path}"))
    sink = store.sink("folder/big")
    sink._file.close()
    sink._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - the sink closes it
    with pytest.raises(OSError, match="No space left") as caught, sink:
        sink.write(b"x")

    assert caught.value.filename == str(tmp_path / "folder/big")
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"]


def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path, monkeypatch):
    """A listing without it would be other data: it fails, naming the folder."""
    store = open_store(Storage(uri=f"file://{tmp_path}"))
    store.put("data/open/a.txt", b"")
    store.put("data/secret/a.txt", b"")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="secret"):
        list(store.list("data/"))


def test_deleting_the_last_file_removes_empty_folders(tmp_path):
    """Pruned checkpoints and collected stages leave no empty folders on file://."""
    store = open_store(Storage(uri=f"file://{tmp_path / 'storage'}"))
    store.put("stages/mix/1/a", b"")
    store.put("runs/x.json", b"")
    store.delete("stages/mix/1/a")

    assert sorted(p.name for p in (tmp_path / "storage").iterdir()) == ["runs"]
