"""Which files a pattern names, and which documents are in them."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from btx_api.spec import Source, SourceShape, Storage
from btx_trainer import sources
from btx_trainer.errors import ConfigurationError
from btx_trainer.sources import Lost, chunks, documents, list_files
from btx_trainer.storage import FileStore, open_outside
from hypothesis import given
from hypothesis import strategies as st

TREE = (
    "a.py", "b.txt", "deep/c.py", "deep/er/d.py", "deep/er/e.txt", "deep/.hidden/f.py",
    ".g.py", "deep[1]/h.py", "deeper/i.py",
)  # fmt: skip
LIMIT = 1 << 20


def read(folder, *names, limit=LIMIT, **shape):
    """Texts and losses of some files."""
    store = FileStore(folder)
    files = [(store, name, store.head(name)) for name in names]
    texts, lost, why = [], {lost: 0 for lost in Lost}, []
    for chunk in chunks(files, SourceShape(**shape), limit):
        found = documents(chunk, limit)
        texts += [text.decode() for text in found.texts]
        for name, count in found.lost.items():
            lost[name] += count
        why += [found.example] * bool(found.example)
    return texts, tuple(lost.values()), why


def lines(*records):
    """JSONL."""
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.py", ["a.py"]),
        ("*.py", ["a.py"]),
        ("**/*.py", ["a.py", "deep/c.py", "deep/er/d.py", "deep[1]/h.py", "deeper/i.py"]),
        ("deep/**/*.py", ["deep/c.py", "deep/er/d.py"]),
        ("deep*/*.py", ["deep/c.py", "deep[1]/h.py", "deeper/i.py"]),
        ("deep[1]/*.py", ["deep[1]/h.py"]),
        ("deep/**", ["deep/c.py", "deep/er/d.py", "deep/er/e.txt"]),
        ("deep/", ["deep/c.py", "deep/er/d.py", "deep/er/e.txt"]),
        ("deep/.hidden/*.py", ["deep/.hidden/f.py"]),
        ("**/er/*", ["deep/er/d.py", "deep/er/e.txt"]),
    ],
)
def test_patterns(storage, store, pattern, expected):
    """A pattern names the same files on every storage, sorted, hidden ones by their name only."""
    for name in TREE:
        store.put(name, b"x")
    root = storage.uri.rstrip("/") + "/"
    found = list_files(Source(uri=root + pattern), storage)
    prefix = open_outside(root, storage)[1]
    assert [key.removeprefix(prefix) for _, key, _ in found] == expected
    assert [head.size for _, _, head in found] == [1] * len(expected)


@pytest.mark.parametrize("pattern", ["none.txt", "*.none", "none/", "none/**/*.py", "deep"])
def test_a_pattern_without_files_is_named(tmp_path, pattern):
    """A pattern that matches nothing, or a folder without its slash, is the user's error."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.py").write_text("x")
    uri = f"file://{tmp_path}/{pattern}"
    with pytest.raises(ConfigurationError, match="matches no file") as error:
        list_files(Source(uri=uri), Storage(uri="file://storage"))
    assert error.value.problem.field == uri


def test_the_hub_holds_no_data():
    """hf:// is for models."""
    with pytest.raises(ConfigurationError, match="hf:// holds models"):
        list_files(Source(uri="hf://some/data"), Storage(uri="file://storage"))


def test_relative_paths_are_of_the_working_directory(tmp_path, monkeypatch):
    """file://folder is below the working directory."""
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert len(list_files(Source(uri="file://*.txt"), Storage(uri="file://storage"))) == 1


@pytest.mark.parametrize("size", [1, 7, 50, LIMIT])
def test_jsonl(tmp_path, monkeypatch, size):
    """Each bad line is counted for what it is, wherever the blocks of reading end."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", size)
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + lines({"text": "one"}, {"text": "two\n"})
        + b"\r\n \n"
        + lines({"text": " \n"}, {"text": ""}, {"other": 1}, {"text": 3}, {"text": None}, ["text"])
        + b'{"text": "not closed\n' + b'{"text": "\xff"}\n' + b'{"text": "\\ud800"}\n'
        + lines({"text": "x" * 100}) + lines({"text": "grüße"})
        + b'{"text": "last"}'
    )  # fmt: skip
    texts, lost, why = read(tmp_path, "a.jsonl", limit=80)
    assert texts == ["one", "two\n", "grüße", "last"]
    assert lost == (2, 7, 1)
    assert why[0] == "no string field 'text'"


@given(st.lists(st.text(max_size=20), max_size=8), st.integers(1, 40), st.integers(20, 60))
def test_where_blocks_end_changes_nothing(tmp_path_factory, texts, size, limit):
    """The documents and counts of a JSONL file do not depend on how much is read at a time."""
    folder = tmp_path_factory.mktemp("lines")
    (folder / "a.jsonl").write_bytes(lines(*({"text": text} for text in texts)))
    whole = read(folder, "a.jsonl", limit=limit)[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK_BYTES", size)
        assert read(folder, "a.jsonl", limit=limit)[:2] == whole


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_long_records_are_never_held(tmp_path, monkeypatch, name):
    """Of a line far over the limit no more than the limit and a block is in memory."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1000)
    (tmp_path / name).write_bytes(b"x" * 10**6 + b"\nshort\n")
    store = FileStore(tmp_path)
    found = list(chunks([(store, name, store.head(name))], SourceShape(), 40_000))
    assert sum(chunk.lost[Lost.OVERSIZED] for chunk in found) == 1
    assert [blob for chunk in found for blob in chunk.blobs] == [b"short\n"]


def test_nesting_without_end_is_undecodable(tmp_path):
    """A line that the parser gives up on is counted, not raised."""
    (tmp_path / "a.jsonl").write_bytes(b"[" * 100_000 + b"\n" + lines({"text": "fine"}))
    texts, lost, why = read(tmp_path, "a.jsonl")
    assert (texts, lost, why) == (["fine"], (0, 1, 0), ["nested too deeply"])


def test_a_field_of_any_name(tmp_path):
    """The field is the user's."""
    (tmp_path / "a.json").write_bytes(lines({"my text": "one", "text": "two"}))
    assert read(tmp_path, "a.json", field="my text")[0] == ["one"]


def test_compressed_files(tmp_path):
    """.gz and .zst are read as what they hold."""
    data = lines(*({"text": f"document {i}"} for i in range(1000)))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data) + gzip.compress(data))
    (tmp_path / "b.jsonl.zst").write_bytes(pyarrow.compress(data, "zstd", asbytes=True))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"plain"))
    texts = read(tmp_path, "a.jsonl.gz", "b.jsonl.zst", "c.txt.gz")[0]
    assert texts[::500] == ["document 0", "document 500"] * 3 + ["plain"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(lines({"text": "one"}))[:-12]),
        ("a.jsonl.gz", b"no gzip at all"),
        ("a.jsonl.zst", pyarrow.compress(lines({"text": "one"}), "zstd", asbytes=True)[:-5]),
        ("a.jsonl.zst", b"no zstd at all"),
        ("a.parquet", b"no parquet at all"),
        ("a.parquet", b"PAR1" + b"\0" * 100 + b"PAR1"),
    ],
    ids=["cut gzip", "no gzip", "cut zstd", "no zstd", "no parquet", "empty parquet"],
)
def test_files_that_are_not_what_their_name_says(tmp_path, name, data):
    """A file that cannot be decoded as a whole is named in one line."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigurationError, match="cannot be read") as error:
        read(tmp_path, name)
    assert error.value.problem.field.endswith(name)
    assert "\n" not in str(error.value)


def test_storage_errors_pass(tmp_path, monkeypatch):
    """A storage that fails while a compressed file is read is no problem of the file."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines({"text": "one"})))

    class Failing:
        closed = False

        def read(self, size=-1):
            raise OSError("a.jsonl.gz: connection reset")

        def tell(self):
            return 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(FileStore, "open", lambda *_: Failing())
    with pytest.raises(OSError, match="connection reset"):
        read(tmp_path, "a.jsonl.gz")


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)  # fmt: skip
def test_parquet(tmp_path, kind):
    """Every Arrow type of text is read; nulls, blanks and long values are counted."""
    values = ["one", None, "", " ", "x" * 100, "grüße", None]
    values = [v.encode() if v and kind == pyarrow.binary() else v for v in values]
    column = pyarrow.array(values, pyarrow.string() if "dict" in str(kind) else kind)
    table = pyarrow.table({"n": list(range(7)), "body": column.cast(kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    texts, lost, _ = read(tmp_path, "a.parquet", field="body", limit=80)
    assert (texts, lost) == (["one", "grüße"], (2, 2, 1))


def test_parquet_bytes_that_are_no_text(tmp_path):
    """A binary value that is not UTF-8 is undecodable."""
    table = pyarrow.table({"text": pyarrow.array([b"fine", b"\xff\xfe"], pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path, "a.parquet")[:2] == (["fine"], (0, 1, 0))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"], "id": [1]}, r"no column 'text' \(columns: body, id\)"),
        ({"text": [1]}, "column 'text' holds int64, not text"),
        ({"text": [["x"]]}, "column 'text' holds list<.*>, not text"),
    ],
)
def test_parquet_without_the_column(tmp_path, columns, message):
    """A wrong column names the file, the column and what there is."""
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ConfigurationError, match=message) as error:
        read(tmp_path, "a.parquet")
    assert error.value.problem.field.endswith("a.parquet")


def test_parquet_column_among_nested_ones(tmp_path):
    """A column is found by its name, whatever stands before it."""
    columns = {"meta": [{"text": "no", "b": 1}], "text": ["yes"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert read(tmp_path, "a.parquet")[0] == ["yes"]


@pytest.mark.parametrize("size", [1000, 20_000, LIMIT])
def test_long_plain_text_is_cut(tmp_path, monkeypatch, size):
    """Over 32 KiB, a document ends at a blank line after 16 KiB, at a line's end after 32 KiB."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", size)
    paragraph = ("x" * 99 + "\n") * 50 + "\n"
    (tmp_path / "a.txt").write_text(paragraph * 10)
    (tmp_path / "b.txt").write_text(("y" * 99 + "\n") * 1000)
    (tmp_path / "c.txt").write_text("short\n\ntext")
    texts, lost, _ = read(tmp_path, "a.txt", "b.txt", "c.txt")
    assert "".join(texts) == paragraph * 10 + ("y" * 99 + "\n") * 1000 + "short\n\ntext"
    assert [len(text) for text in texts] == [20004, 30006, 32800, 32800, 32800, 1600, 11]
    assert lost == (0, 0, 0)


@pytest.mark.parametrize("size", [1000, LIMIT])
def test_bad_plain_text_is_counted(tmp_path, monkeypatch, size):
    """Empty files, bytes that are no UTF-8, and lines over the limit."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", size)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("grüße".encode("latin-1"))
    (tmp_path / "long.txt").write_bytes(b"x" * 100_000 + b"\nshort")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfmarked")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert read(tmp_path, *names, limit=50_000)[:2] == (["short", "marked"], (1, 1, 1))


def test_formats_can_be_forced(tmp_path):
    """A format that is given overrules the ending."""
    (tmp_path / "a.txt").write_bytes(lines({"text": "one"}))
    (tmp_path / "b.jsonl").write_bytes(b"two")
    assert read(tmp_path, "a.txt", format="JSONL")[0] == ["one"]
    assert read(tmp_path, "b.jsonl", format="text")[0] == ["two"]


def test_formats_on_every_storage(storage, store, tmp_path):
    """Lines, compressed lines, Parquet and plain text are read from files and from S3."""
    pyarrow.parquet.write_table(pyarrow.table({"text": ["three"]}), tmp_path / "c.parquet")
    store.put("data/a.jsonl", lines({"text": "one"}))
    store.put("data/b.jsonl.zst", pyarrow.compress(lines({"text": "two"}), "zstd", asbytes=True))
    store.put("data/c.parquet", (tmp_path / "c.parquet").read_bytes())
    store.put("data/d.md", b"four")
    store.put("data/e.txt.gz", gzip.compress(b"five"))
    files = list_files(Source(uri=f"{storage.uri}/data/"), storage)
    found = [documents(chunk, LIMIT).texts for chunk in chunks(files, SourceShape(), LIMIT)]
    assert found == [[b"one"], [b"two"], [b"three"], [b"four"], [b"five"]]


def test_progress_covers_the_files(tmp_path):
    """The chunks of a file add up to its bytes."""
    data = lines(*({"text": "x" * 1000} for _ in range(3000)))
    (tmp_path / "a.jsonl").write_bytes(data)
    store = FileStore(tmp_path)
    found = list(chunks([(store, "a.jsonl", store.head("a.jsonl"))], SourceShape(), LIMIT))
    assert len(found) == 3
    assert sum(chunk.stored for chunk in found) == len(data)
