"""mix beside mergekit-moe's best setting and beside `cp` of the bytes that it writes.

Four Llama models of 0.49 B parameters in bf16 (hidden 1536, intermediate 4096, 16 layers) become
one Mixture of Experts: 3.9 GB in, 2.8 GB out. Ours is the stage as the engine starts it: a fresh
process, inputs verified by their CRC32C, attention, embeddings and norms averaged in fp32 (the
peer takes those of one model), the output's CRC32C, fsync, the commit. mergekit-moe writes without
fsync and averages nothing. `cp` is measured with fsync beside ours as it is, and without beside
ours with os.fsync doing nothing. Every contender begins with nothing left to write. A larger model
shows that memory stays.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import common
import numpy as np
from btx_api.artifact import Maker
from btx_api.names import TASK_ENV
from btx_api.spec import Storage
from btx_api.stage import (
    VERSIONS,
    Content,
    Kind,
    Location,
    MixRecipe,
    Output,
    Stage,
    Task,
    TaskExecution,
    recipe_of,
)
from btx_trainer.artifacts import Artifact, Attempt, find
from btx_trainer.families import read_config
from btx_trainer.fingerprint import SETTLED_SECONDS, fingerprint_model
from btx_trainer.storage import Sink, open_outside, open_store
from btx_trainer.tokenizer import byte_tokenizer_files

FOLDER = common.RESULTS / "mix"
PEER = "mergekit-moe"
BEST = ("--out-shard-size", "500M", "--async-write", "--write-threads", "2")
WITHOUT_FSYNC = (
    "import os, sys; os.fsync = lambda file: None;"
    "from btx_trainer.__main__ import main; sys.exit(main())"
)
Size = tuple[int, int, int, int]
"""hidden, intermediate, layers, vocabulary."""
SIZES: dict[str, Size] = {
    "4 x 0.49 B": (1536, 4096, 16, 12_288),
    "4 x 1.1 B, tensors 4 x as large": (3072, 8192, 8, 24_576),
    "tiny": (64, 96, 2, 512),
    "tiny, tensors 4 x as large": (128, 192, 2, 512),
}


def main() -> None:
    """Measures and writes build/bench/mix.json."""
    arguments = common.options(__doc__ or "")
    os.environ |= {"XDG_CACHE_HOME": str(FOLDER / "cache"), "HF_HUB_OFFLINE": "1"}
    first, second = list(SIZES)[2:] if arguments.tiny else list(SIZES)[:2]
    rows = compare(Models.made(first, 3), arguments.rounds or (1 if arguments.tiny else 5))
    shutil.rmtree(FOLDER)
    # One member three times: opened, verified and read as three, and less to write before.
    rows += memory(Models.made(second, 1))
    shutil.rmtree(FOLDER)
    packages = ("numpy", "google-crc32c", "mergekit", "torch", "transformers")
    common.finish("mix", rows, tiny=arguments.tiny, packages=packages)


@dataclass(frozen=True, kw_only=True)
class Models:
    """A seed and three committed members on disk."""

    name: str
    folder: Path
    storage: Storage
    seed: Path
    members: tuple[Artifact, ...]

    @classmethod
    def made(cls, name: str, different: int) -> "Models":
        """Writes a seed and so many different members, of which there are three in all."""
        size, folder = SIZES[name], FOLDER / "models"
        storage, seed = Storage(uri=f"file://{folder}/storage"), folder / "seed"
        store, members = open_store(storage), []
        print(f"writing {name}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        outside = open_store(Storage(uri=f"file://{seed}"))
        write_model(size, different, outside.sink)
        for number in range(different):
            attempt = Attempt(
                store, Stage(kind=Kind.TRAIN, version=1, recipe={}, inputs=(), salt=str(number))
            )
            write_model(size, number, attempt.sink)
            members.append(attempt.commit(metrics={}, deviations=(), maker=Maker(), parents=()))
        # The seed's hash is looked up, as after preflight: that of a young file is not kept.
        time.sleep(SETTLED_SECONDS)
        used = tuple(islice(cycle(members), 3))
        return cls(name=name, folder=folder, storage=storage, seed=seed, members=used)

    @property
    def paths(self) -> list[Path]:
        """Folders of the seed and of the members."""
        root = self.folder / "storage"
        return [self.seed, *((root / member.key("x")).parent for member in self.members)]

    def task(self, salt: int) -> Task:
        """A mix that was never done."""
        fingerprint = fingerprint_model(*open_outside(f"file://{self.seed}", self.storage))
        outputs = tuple(Output(digest=member.digest) for member in self.members)
        stage = Stage(
            kind=Kind.MIX, version=VERSIONS[Kind.MIX], recipe=recipe_of(MixRecipe(top_k=2)),
            inputs=(Content(fingerprint=fingerprint), *outputs), salt=str(salt),
        )  # fmt: skip
        locations = (Location(uri=f"file://{self.seed}"), *[Location(kind=Kind.TRAIN)] * 3)
        execution = TaskExecution(storage=self.storage, inputs=locations)
        return Task(stage=stage, execution=execution)


def write_model(size: Size, seed: int, sink: Callable[[str], Sink]) -> None:
    """A Llama with drawn weights, the byte tokenizer and one bf16 file."""
    hidden, intermediate, layers, vocabulary = size
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 32, "tie_word_embeddings": False,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    shapes = read_config(config, "bench").shapes()
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with sink("model.safetensors") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in drawn(seed, end):
            file.write(part)
    files = {"config.json": json.dumps(config), **byte_tokenizer_files()}
    for name, content in files.items():
        with sink(name) as file:
            file.write(content.encode())


def drawn(seed: int, size: int) -> Iterator[memoryview]:
    """`size` bytes of normal bf16 numbers; a block of 32 MiB comes again and again, rolled."""
    draws = np.random.default_rng(seed)
    block = draws.normal(0, 0.02, 2**24).astype("<f4").view("<u4") >> 16
    values = block.astype("<u2")
    while size:
        part = np.roll(values, draws.integers(2**24)).data.cast("B")[:size]
        yield part
        size -= len(part)


def ours(models: Models, salt: int, *command: str) -> common.Sample:
    """The stage in a process of its own; its output is deleted afterwards."""
    task = models.task(salt)
    assert task.stage
    os.sync()
    command = command or ("-m", "btx_trainer")
    sample = common.run([common.OURS, *command], **{TASK_ENV: json.dumps(task.plain())})
    shutil.rmtree(models.folder / "storage/stages/mix" / task.stage.digest)
    return sample


def mergekit(models: Models, program: Path) -> common.Sample:
    """The peer at its best setting, on the same four models."""
    seed, *members = map(str, models.paths)
    experts = [{"source_model": path, "positive_prompts": [""]} for path in (*members, seed)]
    config = {"base_model": seed, "gate_mode": "random", "dtype": "bfloat16", "experts": experts}
    file, target = models.folder / "mergekit.yml", models.folder / "mergekit"
    file.write_text(json.dumps(config))
    os.sync()
    sample = common.run([program, file, target, *BEST])
    shutil.rmtree(target)
    return sample


def copy(models: Models, source: Path, *, durable: bool) -> common.Sample:
    """`cp` of our output's files; `durable`: and fsync of each, timed with it."""
    target = models.folder / "copy"
    os.sync()
    samples = [common.run(["cp", "-r", source, target])]
    if durable:
        samples += [common.run(["sync", *target.iterdir()])]
    shutil.rmtree(target)
    return common.Sample(wall=sum(s.wall for s in samples), cpu=sum(s.cpu for s in samples))


def compare(models: Models, count: int) -> list[common.Row]:
    """The rows of one size, with all peers."""
    source, salts = reference(models), iter(range(1, 1000))
    contenders = {
        "ours": lambda: ours(models, next(salts)),
        "cp, fsync": lambda: copy(models, source, durable=True),
        "ours without fsync": lambda: ours(models, next(salts), "-c", WITHOUT_FSYNC),
        "cp": lambda: copy(models, source, durable=False),
    }
    if program := common.peer("mergekit-moe"):
        contenders["mergekit"] = lambda: mergekit(models, program)
    found = common.rounds(count, contenders)
    mine, theirs, name = found["ours"], found.get("mergekit", []), models.name
    plain, copies, synced = found["ours without fsync"], found["cp"], found["cp, fsync"]
    return [
        common.row(f"mix {name}", walls(mine), walls(theirs), peer_name=PEER, goal="<= 0.5"),
        common.row(f"mix {name}, CPU", cpus(mine), cpus(theirs), peer_name=PEER),
        common.row(f"mix {name}, fsync", walls(mine), walls(synced), peer_name="cp and fsync",
                   goal="<= 1.5"),
        common.row(f"mix {name}, no fsync", walls(plain), walls(copies), peer_name="cp",
                   goal="<= 1.5"),
        common.row(f"mix {name}, no fsync, without process start",
                   [s.values["seconds"] for s in plain], walls(copies), peer_name="cp"),
        *peaks(name, mine, theirs),
    ]  # fmt: skip


def memory(models: Models) -> list[common.Row]:
    """The rows of a size that is measured for its memory alone."""
    return peaks(models.name, [ours(models, 0)], [])


def peaks(
    name: str, mine: Sequence[common.Sample], theirs: Sequence[common.Sample]
) -> list[common.Row]:
    """Resident memory, and what of it is anonymous."""
    peer_name = PEER if theirs else ""
    return [
        common.row(f"mix {name}, peak memory", [s.peak / 2**20 for s in mine],
                   [s.peak / 2**20 for s in theirs], peer_name=peer_name, unit="MiB",
                   limit="<= 1000"),
        common.row(f"mix {name}, peak anonymous memory", [s.anonymous / 2**20 for s in mine],
                   [s.anonymous / 2**20 for s in theirs], peer_name=peer_name, unit="MiB"),
    ]  # fmt: skip


def reference(models: Models) -> Path:
    """A folder with the bytes that ours writes."""
    task, target = models.task(0), models.folder / "reference"
    assert task.stage
    shutil.rmtree(target, ignore_errors=True)
    common.run(
        [common.OURS, "-m", "btx_trainer"], **{TASK_ENV: json.dumps(task.plain())}
    )  # fmt: skip
    made = find(open_store(models.storage), Kind.MIX, task.stage.digest)
    assert made
    made.fetch().rename(target)
    shutil.rmtree(models.folder / "storage/stages/mix" / task.stage.digest)
    return target


def walls(samples: Sequence[common.Sample]) -> list[float]:
    """Seconds of each."""
    return [sample.wall for sample in samples]


def cpus(samples: Sequence[common.Sample]) -> list[float]:
    """Seconds of CPU of each."""
    return [sample.cpu for sample in samples]


if __name__ == "__main__":
    sys.exit(main())
