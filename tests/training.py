"""A small storage in which train and finetune stages run for real: models, domains, tasks.

Used by tests/trainer/test_loop.py (in this process) and test_kills.py (in processes).
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from btx_api.artifact import Maker
from btx_api.spec import Phase, Scheduling, Storage
from btx_api.stage import (
    Content,
    FinetuneRecipe,
    Kind,
    Location,
    Output,
    Progress,
    Stage,
    Task,
    TaskExecution,
    TrainRecipe,
    recipe_of,
)
from btx_trainer import shards
from btx_trainer.artifacts import Artifact, Attempt, Outside, find
from btx_trainer.fingerprint import fingerprint_model
from btx_trainer.model import new_model, save_model
from btx_trainer.storage import open_outside, open_store
from btx_trainer.tokenizer import ByteTokenizer, byte_tokenizer_files
from btx_trainer.work import Work
from transformers import LlamaConfig, MixtralConfig

SHAPE = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.1, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
LENGTH, BATCH = 32, 8
"""Of a sequence, in tokens; of a step, in sequences."""
TEXTS = {
    "letters": [f"the {a} is a letter and so is {b}\n" * 3 for a in "abcdef" for b in "uvwxyz"],
    "sums": [f"{a}+{b}={a + b}\n" * 4 for a in range(9) for b in range(9)],
}


class Studio:
    """One storage with prepared domains, and models beside it."""

    def __init__(self, folder: Path, storage: Storage | None = None) -> None:
        self.folder = folder
        self.storage = storage or Storage(uri=f"file://{folder}/storage")
        self.store = open_store(self.storage)
        self.places: dict[str, tuple[Content | Output, Location]] = {}
        self.tag = 0
        """Told apart by `salt`: runs of one recipe in one storage."""
        for name, texts in TEXTS.items():
            self.add_domain(name, texts)
        # Dropout: what a step draws must not depend on what was drawn before.
        self.add_model("seed", LlamaConfig(**SHAPE, attention_dropout=0.1))
        self.add_model("mixed", MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2))

    def add_domain(self, name: str, texts: list[str], held_out_every: int = 8) -> None:
        """A committed prepare artifact; one document in so many is held out (0: none)."""
        stage = Stage(kind=Kind.PREPARE, version=1, recipe={"made": name}, inputs=())
        attempt, tokenizer = Attempt(self.store, stage), ByteTokenizer()
        data = [text.encode() for text in texts]
        tokens, lengths = tokenizer.encode(data)
        held_out = [bool(held_out_every) and i % held_out_every == 0 for i in range(len(data))]
        encoded = shards.Encoded(
            tokens=tokens, lengths=lengths, sizes=np.array([len(text) for text in data], np.int64),
            hashes=np.arange(len(data), dtype=np.uint64), held_out=np.array(held_out),
            lost=Counter(),
        )  # fmt: skip
        with shards.Writer(attempt, tokenizer) as writer:
            with writer.source(1.0) as source:
                source.write(encoded)
            writer.finish()
        attempt.commit(metrics={}, deviations=(), maker=Maker(), parents=())
        self.places[name] = (Output(digest=stage.digest), Location(kind=Kind.PREPARE))

    def add_model(
        self,
        name: str,
        config: Any,
        change: Callable[[Any], None] = lambda model: None,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        """A random model with the byte tokenizer's files, after `change`; returns its folder."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        model = new_model(config, seed=1)
        with torch.no_grad():
            change(model)
        save_model(model, folder, dtype)
        config_file = folder / "config.json"
        # Written by somebody else's hand.
        config_file.write_text(json.dumps(json.loads(config_file.read_text()), indent=1))
        for file, text in byte_tokenizer_files().items():
            (folder / file).write_text(text)
        uri = f"file://{folder}"
        found = fingerprint_model(*open_outside(uri, self.storage))
        self.places[name] = (Content(fingerprint=found), Location(uri=uri))
        return folder

    def task(self, recipe: TrainRecipe | FinetuneRecipe, names: list[str], **how: Any) -> Task:
        """A task of its own (never done before) on the named model and domains."""
        self.tag += 1
        inputs, locations = zip(*(self.places[name] for name in names), strict=True)
        stage = Stage(
            kind=Kind.TRAIN if isinstance(recipe, TrainRecipe) else Kind.FINETUNE, version=1,
            recipe=recipe_of(recipe), inputs=inputs, salt=str(self.tag),
        )  # fmt: skip
        # One thread: spinning ones are slow beside a busy core.
        scheduling = Scheduling(**{"threads": 1, "checkpoint_seconds": 3600, **how})
        execution = TaskExecution(
            storage=self.storage, run="test", inputs=locations, scheduling=scheduling
        )
        return Task(stage=stage, execution=execution)

    def work(
        self,
        task: Task,
        publish: Callable[[Progress], None] = lambda progress: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Work:
        """One attempt at the task, as __main__ would build it."""
        stage, execution = task.stage, task.execution
        assert stage
        recipe = TrainRecipe if stage.kind is Kind.TRAIN else FinetuneRecipe
        return Work(
            stage=stage, recipe=recipe.parse(stage.recipe), execution=execution, store=self.store,
            inputs=tuple(map(self._open, stage.inputs, execution.inputs)),
            out=Attempt(self.store, stage), scratch=Path(tempfile.mkdtemp(dir=self.folder)),
            publish=publish, stopping=stopping,
        )  # fmt: skip

    def _open(self, item: Content | Output, location: Location) -> Artifact | Outside:
        if isinstance(item, Content):
            return Outside(location=location, fingerprint=item.fingerprint, storage=self.storage)
        assert location.kind
        found = find(self.store, location.kind, item.digest)
        assert found
        return found

    def files(self, work: Work) -> dict[str, bytes]:
        """What an attempt has put into its artifact so far."""
        folder = self.store.local(work.out.folder)
        assert folder
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def phase(steps: int, **domains: float) -> Phase:
    """So many steps; `d1=1.0` weighs input 1."""
    weights = {name.removeprefix("d"): weight for name, weight in domains.items()}
    return Phase(tokens=steps * LENGTH * BATCH, domains=weights)


def train_recipe(steps: int = 20, **changes: Any) -> TrainRecipe:
    """Of an expert on one domain."""
    return TrainRecipe(**{**COMMON, "data": (phase(steps, d1=1.0),), **changes})


def finetune_recipe(steps: int = 20, **changes: Any) -> FinetuneRecipe:
    """On two domains."""
    return FinetuneRecipe(**{**COMMON, "data": (phase(steps, d1=1.0, d2=1.0),), **changes})


COMMON = {
    "sequence_length": LENGTH, "batch_tokens": LENGTH * BATCH, "precision": "fp32",
    "held_out_tokens": 512, "optimizer": {"lr": 3e-3, "warmup_steps": 3},
}  # fmt: skip
