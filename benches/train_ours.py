"""The trainer's side of bench_train.py: our loop, step by step as the bench asks.

`train_ours.py {run,padded,resume,head,plain-head} FOLDER OPTIONS` with OPTIONS as JSON; prints
JSON objects, one to a line. Run by bench_train.py, which names the sizes.
"""

import hashlib
import json
import os
import resource
import sys
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

from btx_trainer.__main__ import ENVIRONMENT

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)  # before torch, as the trainer does
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from btx_api.spec import Phase  # noqa: E402
from btx_api.stage import FinetuneRecipe, TrainRecipe  # noqa: E402
from btx_trainer.data import IGNORED, Batch  # noqa: E402
from btx_trainer.errors import PreemptedError  # noqa: E402
from btx_trainer.loop import Job, begin, train  # noqa: E402
from btx_trainer.model import chunked_cross_entropy  # noqa: E402
from btx_trainer.stages import finetune  # noqa: E402
from btx_trainer.work import Work  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from train_pace import Pace, say  # noqa: E402
from training import Studio  # noqa: E402
from transformers import LlamaConfig, MixtralConfig  # noqa: E402

DOCUMENT_BYTES = (40, 600)
"""Of a text: from, to."""


def texts() -> list[str]:
    """Python's own library, cut into documents of different lengths."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    whole = "".join(p.read_text("utf-8", "ignore") for p in sorted(folder.glob("[a-g]*.py")))
    cuts, end = [], 0
    draws = np.random.default_rng(0)
    while end < min(len(whole), 2_000_000):
        cuts.append(whole[end : (end := end + int(draws.integers(*DOCUMENT_BYTES)))])
    return cuts


def studio(folder: Path, options: dict[str, Any]) -> tuple[Studio, TrainRecipe | FinetuneRecipe]:
    """Model and data in a storage of their own."""
    experts = "num_local_experts" in options["model"]
    made = Studio(folder)
    made.add_domain("text", texts(), held_out_every=0)
    config = MixtralConfig if experts else LlamaConfig
    made.add_model("model", config(**options["model"]))
    tokens = options["batch"] * options["length"]
    return made, (FinetuneRecipe if experts else TrainRecipe)(
        sequence_length=options["length"], batch_tokens=tokens, held_out_tokens=512,
        precision=options["precision"], optimizer={"lr": 1e-4, "warmup_steps": 2},
        data=(Phase(tokens=options["steps"] * tokens, domains={"1": 1.0}),),
    )  # fmt: skip


def padded(job: Job) -> Any:
    """One document per row, the rest empty: what a loop without packing trains on."""
    stream = job.data._streams
    leaf = next(iter(stream.values()))
    starts = leaf.starts(0, leaf.total)
    length, size = job.recipe.sequence_length, job.data.batch_size
    # Of all documents: what the few of a step happen to hold would be the figure otherwise.
    Pace.text = size * float(np.minimum(np.diff(starts) - 1, length).mean())

    def batch(step: int, rank: int = 0, world: int = 1) -> Batch:
        ids, positions = np.zeros((size, length), np.int64), np.tile(np.arange(length), (size, 1))
        labels = np.full((size, length), IGNORED, np.int64)
        for row in range(size):
            first, stop = starts[step * size + row : step * size + row + 2]
            tokens = leaf.tokens(int(first), int(min(stop, first + length + 1)))
            ids[row, : len(tokens) - 1], labels[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        return Batch(
            input_ids=ids, labels=labels, position_ids=positions, domains=np.zeros(size, np.int64)
        )

    return batch


def run(folder: Path, options: dict[str, Any], *, pad: bool) -> None:
    """Trains, `options["pace"]` steps at a time."""
    made, recipe = studio(folder, options)
    seconds = 20 if options["device"] == "cuda" else 3600
    task = made.task(
        recipe, ["model", "text"], micro_batch=options["batch"], threads=options["threads"],
        checkpoint_seconds=seconds, compile=options.get("compile", False),
    )  # fmt: skip
    pace = Pace(options["pace"])
    work = made.work(task, publish=lambda progress: pace.step())
    begun = partial(begun_by_bench, pace, folder, pad)
    if isinstance(recipe, FinetuneRecipe):
        finetune.begin = begun  # type: ignore[attr-defined]  # the stage's own way to its job
        finetune.run(work)
    else:
        train(work, begun(work, recipe, recipe.data))


def begun_by_bench(  # noqa: PLR0917 - the last three are those of `begin`
    pace: Pace, folder: Path, pad: bool, work: Work, recipe: Any, phases: Any
) -> Job:
    """As the loop's `begin`; leaves the rows to the peer, and waits with the first step."""
    job = begin(work, recipe, phases)
    if pad:
        job.data.batch = padded(job)  # type: ignore[method-assign]  # of this one
    else:
        batches = [job.data.batch(step) for step in range(job.data.steps)]
        for name in ("input_ids", "labels", "position_ids"):
            np.save(folder / f"{name}.npy", np.concatenate([getattr(b, name) for b in batches]))
    pace.ready()
    return job


def resume(folder: Path, options: dict[str, Any]) -> None:
    """Says whether a run that is stopped half-way and resumed ends in the same bytes."""
    made, recipe = studio(folder, options)
    task = made.task(recipe, ["model", "text"], threads=options["threads"])

    def ends(salt: str, stop: int = 0) -> tuple[str, int]:
        seen = [0]

        def publish(progress: Any) -> None:
            seen[0] = progress.step

        stage = task.stage.model_copy(update={"salt": salt})
        again = task.model_copy(update={"stage": stage})
        work = made.work(again, publish=publish, stopping=lambda: 0 < stop <= seen[0])
        done = train(work, begin(work, recipe, recipe.data))
        found = hashlib.sha256(made.files(work)["model.safetensors"]).hexdigest()
        return found, done.resumed_step

    half = options["steps"] // 2
    whole, _ = ends("whole")
    try:
        ends("stopped", stop=half)
    except PreemptedError:
        say(exact=ends("stopped") == (whole, half))


def head(options: dict[str, Any], *, plain: bool) -> None:
    """Bytes that forward and backward pass of the loss head need beyond its operands."""
    torch.set_num_threads(options["threads"])
    rows, width, vocabulary = options["head"]
    place = {"device": options["device"], "requires_grad": True}
    hidden, weight = torch.randn(rows, width, **place), torch.randn(vocabulary, width, **place)
    labels = torch.randint(0, vocabulary, (rows,), device=options["device"])
    before = _most(options["device"])
    if plain:
        loss = F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")
    else:
        loss = chunked_cross_entropy(hidden, weight, labels)[0]
    (loss / rows).backward()
    say(bytes=_most(options["device"]) - before)


def _most(device: str) -> int:
    """Bytes at most so far, of tensors on a GPU or of the process."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """See above."""
    what, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    if what in {"run", "padded"}:
        run(folder, options, pad=what == "padded")
    elif what == "resume":
        resume(folder, options)
    else:
        head(options, plain=what == "plain-head")


if __name__ == "__main__":
    main()
