"""prepare beside `encode_batch_fast` alone (the floor) and beside `datasets.map`.

The input is JSONL made of Python's own library and of the packages installed here, the tokenizer a
byte-level BPE trained on a tenth of it. A contender has one core to itself (affinity; the
tokenizer library's own threads off), so all it starts counts, and what is timed begins when its
imports are done. The floor has the texts in memory and only encodes, in batches of a chunk's size;
`datasets` loads the JSONL and maps the same call over it; ours reads, checks, splits, encodes,
writes, checksums, syncs and commits. Speed is MB of text per second.
"""

import json
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import common
import tokenizers
from btx_api.names import TASK_ENV
from btx_api.spec import Scheduling, Source, SourceShape, Storage
from btx_api.stage import (
    VERSIONS,
    Content,
    Kind,
    Location,
    PrepareRecipe,
    Stage,
    Task,
    TaskExecution,
    recipe_of,
)
from btx_trainer.fingerprint import (
    SETTLED_SECONDS,
    fingerprint_sources,
    fingerprint_tokenizer,
)
from btx_trainer.processes import allocator
from btx_trainer.sources import CHUNK_BYTES

FOLDER = common.RESULTS / "prepare"
SERIAL = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
TIMED = """
import json, os, sys, time
os.sched_setaffinity(0, json.loads(sys.argv[1]))
def spent():
    return sum(os.times()[:4])  # with that of children that have ended
{imports}
wall, cpu = time.perf_counter(), spent()
{work}
cpu, wall = spent() - cpu, time.perf_counter() - wall
print(json.dumps({{"wall": wall, "cpu": cpu}}))
"""
OURS = TIMED.format(
    imports="import btx_trainer.stages.prepare\nfrom btx_trainer.__main__ import main",
    work="assert main() == 0",
)
FLOOR = TIMED.format(
    imports="""
import tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[3])
tokenizer.encode_special_tokens = True
batches, size = [[]], 0
for line in open(sys.argv[2]):
    batches[-1].append(json.loads(line)["text"])
    size += len(batches[-1][-1])
    if size > int(sys.argv[4]):
        batches, size = [*batches, []], 0
""",
    work="""
for batch in batches:
    tokenizer.encode_batch_fast(batch)
""",
)
DATASETS = TIMED.format(
    imports="""
import datasets, tokenizers
datasets.disable_progress_bars()
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[3])
def encode(batch):
    return {"ids": [item.ids for item in tokenizer.encode_batch_fast(batch["text"])]}
""",
    work="""
data = datasets.load_dataset("json", data_files=sys.argv[2], split="train", cache_dir=sys.argv[4])
data.map(encode, batched=True, remove_columns=data.column_names)
""",
)
BYTES, VOCABULARY = 24_000_000, 16_000


def main() -> None:
    """Measures and writes build/bench/prepare.json."""
    arguments = common.options(__doc__ or "")
    os.environ |= SERIAL | {"XDG_CACHE_HOME": str(FOLDER / "cache"), "HF_HUB_OFFLINE": "1"}
    corpus = Corpus.made(100_000 if arguments.tiny else BYTES)
    rows = compare(corpus, arguments.rounds or (1 if arguments.tiny else 9))
    packages, malloc = ("tokenizers", "datasets"), os.path.realpath(allocator() or "glibc")
    common.finish(
        "prepare", rows, tiny=arguments.tiny, packages=packages, malloc=os.path.basename(malloc)
    )
    shutil.rmtree(FOLDER)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The documents as one file and as two halves, and the tokenizer."""

    bytes: int
    whole: Path
    halves: tuple[Path, Path]
    tokenizer: Path

    @classmethod
    def made(cls, size: int) -> "Corpus":
        """Writes them."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        texts, written = [], 0
        for text in python_sources():
            texts.append(text)
            written += len(text.encode())
            if written >= size:
                break
        whole = lines(FOLDER / "whole.jsonl", texts)
        halves = lines(FOLDER / "even.jsonl", texts[::2]), lines(FOLDER / "odd.jsonl", texts[1::2])
        tokenizer = trained(texts[::10], FOLDER / "tokenizer.json")
        print(f"{len(texts)} documents, {written / 1e6:.1f} MB", flush=True)
        # Hashes are looked up, as after preflight: those of young files are not kept.
        time.sleep(SETTLED_SECONDS)
        return cls(bytes=written, whole=whole, halves=halves, tokenizer=tokenizer)


def python_sources() -> Iterator[str]:
    """Every Python file of the installation that is text of ordinary length."""
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(root).rglob("*.py")):
            data = path.read_bytes()
            if 100 < len(data) < 200_000:
                try:
                    yield data.decode()
                except UnicodeDecodeError:
                    continue


def lines(path: Path, texts: list[str]) -> Path:
    """Writes JSONL."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def trained(texts: list[str], path: Path) -> Path:
    """A byte-level BPE tokenizer.json."""
    level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=level.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return path


def ours(corpus: Corpus, path: Path, cores: list[int], salt: int) -> common.Sample:
    """One prepare stage with a thread per core."""
    storage = Storage(uri=f"file://{FOLDER}/storage")
    source, tokenizer = Source(uri=f"file://{path}"), corpus.tokenizer
    recipe = PrepareRecipe(sources=(SourceShape(),), held_out=0.01)
    prints = (
        fingerprint_sources((source,), storage),
        fingerprint_tokenizer(tokenizer.read_bytes()),
    )
    stage = Stage(
        kind=Kind.PREPARE, version=VERSIONS[Kind.PREPARE], recipe=recipe_of(recipe),
        inputs=tuple(Content(fingerprint=found) for found in prints), salt=f"{salt} {path.name}",
    )  # fmt: skip
    execution = TaskExecution(
        storage=storage, scheduling=Scheduling(threads=len(cores)),
        inputs=(Location(sources=(source,)), Location(uri=f"file://{tokenizer}")),
    )  # fmt: skip
    task = Task(stage=stage, execution=execution)
    command = [common.OURS, "-c", OURS, json.dumps(cores)]
    sample = common.run(command, **{TASK_ENV: json.dumps(task.plain())})
    shutil.rmtree(FOLDER / "storage/stages/prepare" / stage.digest)
    return timed(sample)


def timed(sample: common.Sample) -> common.Sample:
    """What the process timed itself, not its start."""
    return common.Sample(
        wall=sample.values["wall"], cpu=sample.values["cpu"], peak=sample.peak,
        anonymous=sample.anonymous,
    )  # fmt: skip


def both(corpus: Corpus, cores: list[int], salt: int) -> common.Sample:
    """Two prepare stages at once, a half and a core each; the slower one counts."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(ours, corpus, half, [core], salt)
            for half, core in zip(corpus.halves, cores, strict=True)
        ]
        found = [job.result() for job in jobs]
    return common.Sample(wall=max(s.wall for s in found), cpu=sum(s.cpu for s in found))


def floor(corpus: Corpus, core: int) -> common.Sample:
    """encode_batch_fast and nothing else."""
    command = [common.OURS, "-c", FLOOR, json.dumps([core])]
    return timed(common.run([*command, corpus.whole, corpus.tokenizer, str(CHUNK_BYTES)]))


def datasets(corpus: Corpus, python: Path, core: int) -> common.Sample:
    """The peer, with an empty cache."""
    cache = FOLDER / "datasets"
    command = [python, "-c", DATASETS, json.dumps([core]), corpus.whole, corpus.tokenizer, cache]
    sample = common.run(command)
    shutil.rmtree(cache)
    return timed(sample)


def compare(corpus: Corpus, count: int) -> list[common.Row]:
    """All rows."""
    cores = sorted(os.sched_getaffinity(0))
    first, pair, salts = cores[0], cores[:2], iter(range(1000))
    contenders: dict[str, Callable[[], common.Sample]] = {
        "ours": lambda: ours(corpus, corpus.whole, [first], next(salts)),
        "floor": lambda: floor(corpus, first),
    }
    if python := common.peer("python"):
        contenders["datasets"] = lambda: datasets(corpus, python, first)
    if len(pair) == 2:
        contenders["two processes"] = lambda: both(corpus, pair, next(salts))
        contenders["two threads"] = lambda: ours(corpus, corpus.whole, pair, next(salts))
    found = common.rounds(count, contenders, warm=False)

    def speeds(name: str) -> list[float]:
        return [corpus.bytes / 1e6 / sample.wall for sample in found.get(name, [])]

    def per_cpu(name: str) -> list[float]:
        return [corpus.bytes / 1e6 / sample.cpu for sample in found.get(name, [])]

    alone, one = "encode_batch_fast alone", "one process, one core"
    unit, cpu = "MB/s", "MB per s of CPU"
    rows = [
        common.row("prepare, one core", speeds("ours"), speeds("floor"), peer_name=alone,
                   unit=unit, goal=">= 0.95"),
        common.row("prepare, CPU", per_cpu("ours"), per_cpu("floor"), peer_name=alone, unit=cpu),
        common.row("prepare, one core", speeds("ours"), speeds("datasets"),
                   peer_name="datasets.map", unit=unit, goal=">= 1.05"),
        common.row("prepare, CPU", per_cpu("ours"), per_cpu("datasets"),
                   peer_name="datasets.map", unit=cpu),
    ]  # fmt: skip
    if "two processes" in found:
        rows += [
            common.row("prepare, two processes on two cores", speeds("two processes"),
                       speeds("ours"), peer_name=one, unit=unit, goal=">= 1.8"),
            common.row("prepare, two threads on two cores", speeds("two threads"),
                       speeds("ours"), peer_name=one, unit=unit),
        ]  # fmt: skip
    peak = [sample.peak / 2**20 for sample in found["ours"]]
    return [*rows, common.row("prepare, peak memory", peak, unit="MiB")]


if __name__ == "__main__":
    main()
