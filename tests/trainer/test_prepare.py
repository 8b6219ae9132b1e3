"""prepare: sources in, token shards out; and tokenizers."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from btx_api.artifact import Maker
from btx_api.spec import Scheduling, Source, SourceShape, Storage
from btx_api.stage import (
    VERSIONS,
    Content,
    Kind,
    Location,
    PrepareRecipe,
    Stage,
    TaskExecution,
    recipe_of,
)
from btx_trainer import processes, shards
from btx_trainer.artifacts import Attempt, Outside, find
from btx_trainer.errors import ConfigurationError, PreemptedError
from btx_trainer.fingerprint import fingerprint_sources, fingerprint_tokenizer
from btx_trainer.processes import TokenizerProcesses
from btx_trainer.shards import Prepared
from btx_trainer.stages import prepare
from btx_trainer.storage import open_store
from btx_trainer.tokenizer import (
    EOS,
    ByteTokenizer,
    FileTokenizer,
    byte_tokenizer_files,
    byte_tokenizer_json,
)
from btx_trainer.work import Made, Work
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "runs",
    "away",
    "into",
    "deep",
    "woods",
]


def document(i, size=60):
    """The i-th of many different documents."""
    draw = np.random.default_rng(i)
    return f"{i} " + " ".join(draw.choice(WORDS, size))


def jsonl(path, texts, field="text"):
    """Writes documents; returns the file's name."""
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path.name


@dataclass
class Attempted:
    """One run of the stage."""

    work: Work
    published: list

    def run(self) -> Made:
        return prepare.run(self.work)

    def commit(self) -> tuple[Made, Prepared, Path]:
        """Runs and commits; the artifact as a consumer opens it, and where it is."""
        made = self.run()
        self.work.out.commit(
            metrics=made.metrics, deviations=(), maker=Maker(),
            parents=[item.parent for item in self.work.inputs],
        )  # fmt: skip
        stage = self.work.stage
        folder = find(self.work.store, stage.kind, stage.digest).fetch()
        return made, shards.open(folder), folder


def a_stage(folder, *sources, tokenizer=None, threads=1, stopping=lambda: False, **recipe):
    """An attempt at preparing these sources (name -> fields, names relative to `folder`)."""
    storage = Storage(uri=f"file://{folder / 'storage'}")
    sources = tuple(Source(**{**s, "uri": f"file://{folder}/{s['uri']}"}) for s in sources)
    shapes = tuple(SourceShape(format=s.format, field=s.field, weight=s.weight) for s in sources)
    block = PrepareRecipe(
        tokenizer="file" if tokenizer else "bytes", sources=shapes, **{"held_out": 0.1, **recipe}
    )
    data = Outside(
        location=Location(sources=sources), fingerprint=fingerprint_sources(sources, storage),
        storage=storage,
    )  # fmt: skip
    inputs = [data]
    if tokenizer:
        inputs.append(
            Outside(
                location=Location(uri=f"file://{tokenizer}"), storage=storage, tokenizer=True,
                fingerprint=fingerprint_tokenizer(tokenizer.read_bytes()),
            )
        )  # fmt: skip
    stage = Stage(
        kind=Kind.PREPARE, version=VERSIONS[Kind.PREPARE], recipe=recipe_of(block),
        inputs=tuple(Content(fingerprint=item.fingerprint) for item in inputs),
    )  # fmt: skip
    store, published = open_store(storage), []
    work = Work(
        stage=stage, recipe=block, inputs=tuple(inputs), out=Attempt(store, stage), store=store,
        execution=TaskExecution(storage=storage, scheduling=Scheduling(threads=threads)),
        scratch=folder, publish=published.append, stopping=stopping,
    )  # fmt: skip
    return Attempted(work, published)


def training(opened):
    """Training documents of every source, as ids without eos."""
    found = []
    for source in opened.sources:
        starts = [*source.starts(0, source.total), source.total]
        ids = [source.tokens(a, b).tolist() for a, b in pairwise(starts)]
        assert all(document[-1] == opened.index.eos for document in ids)
        found.append([document[:-1] for document in ids])
    return found


def held_out(opened):
    """Held-out documents as ids without eos."""
    held = opened.held_out
    return [held.tokens(start, start + count - 1).tolist() for start, count, _ in held.documents]


def texts_of(documents):
    """Byte ids to text."""
    return [bytes(ids).decode() for ids in documents]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A BPE tokenizer.json with Llama's habits: <s> before a text, padding and truncation set."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((document(i) for i in range(50)), trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=64, pad_id=1, pad_token="</s>")
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_documents_arrive_once_on_one_side(tmp_path):
    """Every document of every format is in training or held out, in order, never in both."""
    lists = [[document(100 * part + i) for i in range(80)] for part in range(3)]
    jsonl(tmp_path / "a.jsonl", lists[0], "body")
    table = pyarrow.table({"text": lists[1]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=7)
    (tmp_path / "c").mkdir()
    for i, text in enumerate(lists[2]):
        (tmp_path / f"c/{i:03d}.txt").write_text(text)
    made, opened, _ = a_stage(
        tmp_path, {"uri": "a.jsonl", "field": "body", "weight": 2.5}, {"uri": "*.parquet"},
        {"uri": "c/**"},
    ).commit()  # fmt: skip
    train, held = [texts_of(d) for d in training(opened)], texts_of(held_out(opened))
    for documents, mine in zip(lists, train, strict=True):
        assert mine == [text for text in documents if text not in held]
    assert sorted([*held, *train[0], *train[1], *train[2]]) == sorted(chain(*lists))
    assert 8 <= len(held) <= 40
    assert [source.index.weight for source in opened.sources] == [2.5, 1, 1]
    assert made.metrics == {
        "tokens": sum(len(t) + 1 for part in train for t in part), "documents": 240 - len(held),
        "held_out_tokens": sum(len(t) + 1 for t in held), "held_out_documents": len(held),
        "records": 240, "empty": 0, "undecodable": 0, "oversized": 0,
    }  # fmt: skip
    assert opened.held_out.index.bytes == sum(map(len, held))


def test_a_document_is_on_the_same_side_everywhere(tmp_path):
    """The side follows from the text: in other files, formats and domains it is the same."""
    texts = [document(i) for i in range(100)]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    jsonl(tmp_path / "one/a.jsonl", texts)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [*reversed(texts[:50]), *texts[:50]]}), tmp_path / "two/b.parquet"
    )
    first = set(texts_of(held_out(a_stage(tmp_path / "one", {"uri": "a.jsonl"}).commit()[1])))
    second = texts_of(held_out(a_stage(tmp_path / "two", {"uri": "b.parquet"}).commit()[1]))
    assert set(second) == first & set(texts[:50])
    assert len(second) == 2 * len(set(second)) > 0


@pytest.mark.parametrize("with_bpe", [False, True])
def test_the_bytes_do_not_depend_on_the_workers(tmp_path, monkeypatch, bpe, with_bpe):
    """One thread or four: the same files with the same bytes."""
    monkeypatch.setattr("btx_trainer.sources.CHUNK_BYTES", 4000)
    monkeypatch.setattr(shards, "FILE_BYTES", 10_000)
    found = []
    for threads in (1, 4):
        folder = tmp_path / str(threads)
        folder.mkdir()
        jsonl(folder / "a.jsonl", [document(i) for i in range(200)])
        (folder / "b.txt").write_text("\n\n".join(document(i) for i in range(300, 600)))
        attempt = a_stage(
            folder, {"uri": "a.jsonl"}, {"uri": "b.txt"}, threads=threads,
            tokenizer=bpe if with_bpe else None,
        )  # fmt: skip
        folder = attempt.commit()[2]
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[0] == found[1]
    assert len([name for name in found[0] if name.startswith("source-0-0")]) > 1


def test_losses_are_counted_per_source(tmp_path):
    """Empty, undecodable and oversized records are in the index, by source, and in the metrics."""
    good = [json.dumps({"text": document(i)}) for i in range(30)]
    bad = [
        json.dumps({"text": " "}),
        "{",
        json.dumps({"text": 1}),
        json.dumps({"text": "x" * 2000}),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(good[:20] + bad))
    (tmp_path / "b.jsonl").write_text("\n".join(good[20:] + bad[:1] * 3))
    made, opened, _ = a_stage(
        tmp_path, {"uri": "a.jsonl"}, {"uri": "b.jsonl"}, max_record_bytes=1000
    ).commit()
    counts = [(s.records, s.empty, s.undecodable, s.oversized) for s in opened.index.sources]
    assert counts == [(24, 1, 2, 1), (13, 3, 0, 0)]
    assert sum(s.held_out for s in opened.index.sources) == opened.index.held_out.documents
    names = ("records", "empty", "undecodable", "oversized")
    assert tuple(made.metrics[name] for name in names) == (37, 4, 2, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"other": "x"}\n{"text": ""}\n',
         r"no document in 2 records: 1 empty, 1 undecodable, 0 oversized \(no string field 'text'\)"),
        ("", "no document in 0 records"),
        ("x" * 500, "no document in 1 records: 0 empty, 0 undecodable, 1 oversized"),
    ],
)  # fmt: skip
def test_a_source_with_nothing_left_is_named(tmp_path, data, message):
    """One empty source among others is the user's error, with what became of its records."""
    jsonl(tmp_path / "good.jsonl", [document(i) for i in range(20)])
    (tmp_path / "bad.jsonl").write_text(data)
    attempt = a_stage(tmp_path, {"uri": "good.jsonl"}, {"uri": "bad.jsonl"}, max_record_bytes=450)
    with pytest.raises(ConfigurationError, match=message) as error:
        attempt.run()
    assert error.value.problem.field == f"file://{tmp_path}/bad.jsonl"


def test_a_source_that_is_held_out_whole_is_named(tmp_path):
    """A source whose only document is held out cannot be trained on."""
    texts = [document(i) for i in range(20)]
    jsonl(tmp_path / "a.jsonl", texts)
    held = texts_of(held_out(a_stage(tmp_path, {"uri": "a.jsonl"}).commit()[1]))
    jsonl(tmp_path / "b.jsonl", held[:1])
    attempt = a_stage(tmp_path, {"uri": "a.jsonl"}, {"uri": "b.jsonl"})
    with pytest.raises(ConfigurationError, match=r"all 1 documents are held out.*prepare\.heldOut"):
        attempt.run()


def test_a_source_of_weight_0_is_left_out(tmp_path):
    """Nothing is read from it, so it may be useless; the others have all its share."""
    jsonl(tmp_path / "a.jsonl", [document(i) for i in range(20)])
    (tmp_path / "b.jsonl").write_text("useless")
    opened = a_stage(tmp_path, {"uri": "b.jsonl", "weight": 0}, {"uri": "a.jsonl"}).commit()[1]
    assert [source.total > 0 for source in opened.sources] == [False, True]


@pytest.mark.parametrize("share", [0.0001, 0.5])
@pytest.mark.parametrize("count", [2, 3, 30])
def test_small_domains_have_both_sides(tmp_path, share, count):
    """From two documents on there is one to train on and one held out, whatever the share."""
    jsonl(tmp_path / "a.jsonl", [document(i) for i in range(count)])
    opened = a_stage(tmp_path, {"uri": "a.jsonl"}, held_out=share).commit()[1]
    assert len(training(opened)[0]) + len(held_out(opened)) == count
    assert 1 <= len(held_out(opened)) < count
    if share < 0.5:
        assert len(held_out(opened)) == 1


@pytest.mark.parametrize("texts", [["only one"], ["the same"] * 5])
def test_a_split_needs_two_different_documents(tmp_path, texts):
    """Without two different documents heldOut is the user's error; without heldOut there is none."""
    jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(ConfigurationError, match="at least two different documents") as error:
        a_stage(tmp_path, {"uri": "a.jsonl"}).run()
    assert error.value.problem.field == "prepare.heldOut"
    opened = a_stage(tmp_path, {"uri": "a.jsonl"}, held_out=0).commit()[1]
    assert texts_of(training(opened)[0]) == texts
    assert opened.index.held_out.documents == opened.held_out.total == 0


def test_inputs_that_changed_are_refused(tmp_path):
    """Bytes other than those preflight saw, before or while reading, are not prepared."""
    jsonl(tmp_path / "a.jsonl", [document(i) for i in range(20)])
    attempt = a_stage(tmp_path, {"uri": "*.jsonl"})
    jsonl(tmp_path / "b.jsonl", [document(30)])
    with pytest.raises(ConfigurationError, match="input changed since preflight"):
        attempt.run()
    attempt = a_stage(tmp_path, {"uri": "*.jsonl"})
    publish = attempt.published.append

    def change(progress):
        publish(progress)
        jsonl(tmp_path / "c.jsonl", [document(31)])

    object.__setattr__(attempt.work, "publish", change)
    with pytest.raises(ConfigurationError, match="input changed since preflight"):
        attempt.run()
    assert attempt.published


def test_stopping_leaves_nothing(tmp_path, monkeypatch):
    """SIGTERM ends the stage between two chunks, and no file of the attempt is left open."""
    monkeypatch.setattr("btx_trainer.sources.CHUNK_BYTES", 4000)
    jsonl(tmp_path / "a.jsonl", [document(i) for i in range(200)])
    answers = iter([False, False, True])
    attempt = a_stage(tmp_path, {"uri": "a.jsonl"}, threads=2, stopping=lambda: next(answers))
    with pytest.raises(PreemptedError):
        attempt.run()
    assert len(attempt.published) == 2
    attempt.work.out.discard()
    assert [path for path in (tmp_path / "storage").rglob("*") if path.is_file()] == []


def test_progress_is_in_bytes(tmp_path, monkeypatch):
    """Published steps rise to the size of the files."""
    monkeypatch.setattr("btx_trainer.sources.CHUNK_BYTES", 4000)
    jsonl(tmp_path / "a.jsonl", [document(i) for i in range(200)])
    attempt = a_stage(tmp_path, {"uri": "a.jsonl"}, threads=2)
    attempt.run()
    size = (tmp_path / "a.jsonl").stat().st_size
    steps = [progress.step for progress in attempt.published]
    assert steps == sorted(steps) and steps[-1] == size and len(steps) > 10
    assert {progress.steps for progress in attempt.published} == {size}


def test_a_bpe_tokenizer(tmp_path, bpe):
    """Ids are the library's own with its <s>, untruncated, unpadded, and eos at the end."""
    texts = [document(i) for i in range(40)] + ["a </s> b <s>"]
    jsonl(tmp_path / "a.jsonl", texts)
    _, opened, folder = a_stage(tmp_path, {"uri": "a.jsonl"}, tokenizer=bpe).commit()
    assert (folder / "tokenizer.json").read_bytes() == bpe.read_bytes()
    index = opened.index
    assert (index.tokenizer, index.vocab_size, index.dtype, index.eos, index.specials) == (
        "file", 320, "uint16", 1, (0, 1)
    )  # fmt: skip
    stock = tokenizers.Tokenizer.from_file(str(bpe))
    stock.no_truncation()
    stock.no_padding()
    found = [*training(opened)[0], *held_out(opened)]
    assert all(ids[0] == 0 and 0 not in ids[1:] and 1 not in ids for ids in found)
    assert sorted(stock.decode(ids[1:]) for ids in found) == sorted(texts)
    plain = {text: stock.encode(text).ids for text in texts[:-1]}
    assert all(ids in found for ids in plain.values())


def test_large_vocabularies_take_four_bytes(tmp_path):
    """Ids from 65,536 on are stored as uint32."""
    vocabulary = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    jsonl(tmp_path / "a.jsonl", ["w69999 w1", "w65536 w3", "w65535"])
    _, opened, _ = a_stage(
        tmp_path, {"uri": "a.jsonl"}, tokenizer=tmp_path / "tokenizer.json", held_out=0
    ).commit()
    assert (opened.index.dtype, opened.index.vocab_size) == ("uint32", 70_001)
    assert training(opened) == [[[69999, 1], [65536, 3], [65535]]]


@pytest.mark.parametrize(
    ("data", "message"),
    [("{}", "is no tokenizer.json"), ("x", "is no tokenizer.json"), (None, "none of .*</s>")],
)
def test_bad_tokenizers(tmp_path, data, message):
    """A file that is no tokenizer, and one without an end-of-document token, in one line."""
    path = tmp_path / "tokenizer.json"
    empty = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    path.write_text(empty.to_str() if data is None else data)
    with pytest.raises(ConfigurationError, match=message) as error:
        FileTokenizer(path)
    assert error.value.problem.field == str(path)
    assert "\n" not in str(error.value)


def children_of(pid):
    """Processes that it has started and that have not been waited for."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}


def test_tokenizer_processes_give_the_same_ids_and_end(bpe):
    """A process for each thread that asks, each with one thread; none is left behind."""
    stock, before = FileTokenizer(bpe), children_of(os.getpid())
    batches = [[document(9 * n + i).encode() for i in range(n)] for n in range(8)]
    batches.append(["Grüße, 世界! </s> <s>".encode(), b"\n"])
    barrier = threading.Barrier(2)
    with TokenizerProcesses(bpe, stock.eos) as apart, ThreadPoolExecutor(2) as pool:

        def encode(texts):
            barrier.wait(20)
            return apart.encode(texts)

        found = list(pool.map(encode, [*batches, batches[0]]))
        mine = children_of(os.getpid()) - before
        assert len(mine) == 2
        for child in mine:
            assert "\nThreads:\t1\n" in Path(f"/proc/{child}/status").read_text()
    assert children_of(os.getpid()) == before
    for texts, (ids, lengths) in zip(batches, found, strict=False):
        expected = stock.encode(texts)
        assert ids.tolist() == expected[0].tolist()
        assert lengths.tolist() == expected[1].tolist()


def test_a_tokenizer_process_uses_a_faster_malloc_where_there_is_one(bpe, monkeypatch):
    """The library is in its memory; here any stands in for it, and without one it works as well."""
    maps = Path("/proc/self/maps").read_text()
    library = next(line.split()[-1] for line in maps.splitlines() if "/libstdc++.so" in line)
    folder, name = os.path.split(library)
    monkeypatch.setattr(processes, "ALLOCATOR", name)
    for folders, there in (((folder,), True), ((), False)):
        monkeypatch.setattr(processes, "FOLDERS", folders)
        with TokenizerProcesses(bpe, 1) as apart:
            assert apart.encode([b"the quick"])[1].sum() > 1
            [process] = apart._all
            environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            assert (b"LD_PRELOAD=" + library.encode() in environment) == there
            if there:
                assert library in Path(f"/proc/{process.pid}/maps").read_text()


def test_a_killed_tokenizer_process_is_an_error_naming_the_file(tmp_path, bpe, monkeypatch):
    """As by the kernel for want of memory: the stage fails, says so, and leaves no process."""
    jsonl(tmp_path / "a.jsonl", [document(i) for i in range(300)])
    before, encode = children_of(os.getpid()), TokenizerProcesses.encode

    def killed(self, texts):
        found = encode(self, texts)
        for process in self._all:
            process.kill()
            process.wait()
        return found

    monkeypatch.setattr(TokenizerProcesses, "encode", killed)
    monkeypatch.setattr("btx_trainer.sources.CHUNK_BYTES", 20_000)
    with pytest.raises(OSError, match="a tokenizer process ended with -9") as error:
        a_stage(tmp_path, {"uri": "a.jsonl"}, tokenizer=bpe, threads=2).run()
    assert error.value.filename.endswith("tokenizer.json")
    assert children_of(os.getpid()) == before


@pytest.fixture(scope="module")
def stock_bytes(tmp_path_factory):
    """A folder with the byte tokenizer as stock files."""
    folder = tmp_path_factory.mktemp("bytes")
    for name, text in byte_tokenizer_files().items():
        (folder / name).write_text(text)
    return folder


@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_the_byte_tokenizer_equals_its_stock_form(stock_bytes, texts):
    """For any text the built-in tokenizer and its tokenizer.json give the same ids."""
    documents = [text.encode() for text in texts]
    ours, theirs = ByteTokenizer(), FileTokenizer(stock_bytes / "tokenizer.json")
    assert (ours.vocab_size, ours.eos, ours.specials) == (
        theirs.vocab_size, theirs.eos, theirs.specials
    )  # fmt: skip
    for mine, stock in zip(ours.encode(documents), theirs.encode(documents), strict=True):
        assert mine.tolist() == stock.tolist()
    ids, lengths = ours.encode(documents)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    assert [bytes(part[:-1].tolist()) for part in parts] == documents
    assert {int(part[-1]) for part in parts} == {EOS}


def test_auto_tokenizer_loads_the_stock_form(stock_bytes):
    """AutoTokenizer gives the bytes and their text back, and knows the special ids."""
    stock = AutoTokenizer.from_pretrained(stock_bytes)
    text = "Grüße, 世界!\n\t  x = 1 \x00 “quoted”"
    ids = stock(text)["input_ids"]
    assert ids == list(text.encode())
    assert stock.decode(ids) == text
    assert (stock.bos_token_id, stock.eos_token_id, stock.pad_token_id, stock.unk_token_id) == (
        256, 257, 258, 259
    )  # fmt: skip
    assert len(stock) == 260
    assert byte_tokenizer_json() == (stock_bytes / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("source-0-00000.bin", lambda data: data[:-2], "bytes, the index says"),
        ("held-out-00000.bin", lambda data: data + b"xx", "bytes, the index says"),
        ("source-0-00000.bin", None, "is missing"),
        ("source-0-documents.bin", lambda data: data[:-8], "bytes, the index says"),
        ("source-0-documents.bin", lambda data: data[:-8] + b"\1" * 8, "does not cover"),
        ("held-out-documents.bin", lambda data: data[:8] + b"\1" * 8 + data[16:], "does not cover"),
        ("shards.json", lambda data: data[:50], "is no index"),
        ("shards.json", lambda data: data.replace(b"uint16", b"uint32"), "bytes, the index says"),
        ("shards.json", lambda data: data.replace(b'"eos"', b'"eso"'), "is no index"),
        ("shards.json", None, "is no index"),
    ],
)  # fmt: skip
def test_damaged_shards_are_named(tmp_path, name, change, message):
    """A truncated token file or an index that disagrees: one line with the file's name."""
    jsonl(tmp_path / "a.jsonl", [document(i) for i in range(30)])
    folder = a_stage(tmp_path, {"uri": "a.jsonl"}).commit()[2]
    if change:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
    else:
        (folder / name).unlink()
    with pytest.raises(ConfigurationError, match=message) as error:
        shards.open(folder)
    assert "\n" not in str(error.value)
    suspect = name if name != "shards.json" or "index says" not in message else "source-0-00000.bin"
    assert error.value.problem.field.endswith(suspect)


def test_nothing_of_this_imports_torch():
    """The data side starts fast: no torch, no transformers."""
    code = (
        "import sys, btx_trainer.stages.prepare, btx_trainer.data; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
