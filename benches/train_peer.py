"""The peer's side of bench_train.py: HF Trainer on the rows that our loop was given.

`train_peer.py {run,resume} FOLDER OPTIONS`, run with the peers' Python. Same model, rows, packing
(positions that start again at 0, no cache), targets, AdamW, clipping, dtype and threads; its
defaults else.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_pace import Pace, say
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]  # of dicts
    """Packed rows in the order in which our loop takes them."""

    def __init__(self, folder: Path) -> None:
        names = ("input_ids", "labels", "position_ids")
        self._arrays = {name: np.load(folder / f"{name}.npy") for name in names}

    def __len__(self) -> int:
        return len(self._arrays["labels"])

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        row = {name: torch.from_numpy(array[number]) for name, array in self._arrays.items()}
        # Ours are the next tokens already.
        return row | {"shift_labels": row["labels"]}


class Paced(TrainerCallback):  # type: ignore[misc]  # untyped
    """Waits between two rounds."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._pace.ready()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._pace.step()


def trainer(folder: Path, options: dict[str, Any], name: str, **more: Any) -> Trainer:
    """A fresh one on a freshly loaded model."""
    torch.set_num_threads(options["threads"])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model.config.use_cache = False  # with a cache documents of a row see each other
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = True  # and with them the balancing loss, as ours has
    arguments = TrainingArguments(
        output_dir=str(folder / name), per_device_train_batch_size=options["batch"],
        max_steps=options["steps"], use_cpu=options["device"] == "cpu",
        torch_compile=options.get("compile", False),
        bf16=options["precision"] == "bf16", learning_rate=1e-4, warmup_steps=2,
        lr_scheduler_type="cosine", adam_beta2=0.95, weight_decay=0.1, max_grad_norm=1.0,
        logging_strategy="no", report_to="none", remove_unused_columns=False, disable_tqdm=True,
        train_sampling_strategy="sequential", **{"save_strategy": "no", **more},
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Rows(folder))


def resume(folder: Path, options: dict[str, Any]) -> None:
    """Says whether resume_from_checkpoint ends in the weights of the uninterrupted run."""
    half = options["steps"] // 2
    first = trainer(folder, options, "whole", save_strategy="steps", save_steps=half)
    first.train()
    second = trainer(folder, options, "resumed")
    second.train(resume_from_checkpoint=str(folder / f"whole/checkpoint-{half}"))
    whole, resumed = (_digest(one.model) for one in (first, second))
    say(exact=whole == resumed)


def _digest(model: Any) -> str:
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    """See above."""
    what, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    if what == "resume":
        resume(folder, options)
        return
    peer = trainer(folder, options, "out")
    peer.add_callback(Paced(Pace(options["pace"])))
    peer.train()


if __name__ == "__main__":
    main()
