"""Several real ranks over gloo: the same data, the same losses, the same bits after a stop."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from btx_api.artifact import HISTORY, checkpoints_folder
from btx_api.spec import Optimizer, Precision, Routing, Scheduling, Trainable
from btx_api.stage import FinetuneRecipe, Progress, Task, TrainRecipe
from btx_trainer import loop
from btx_trainer.checkpoint import Checkpoints
from btx_trainer.distributed import set_up
from btx_trainer.errors import PreemptedError
from btx_trainer.ranks import Ranks
from btx_trainer.stages import finetune, train
from btx_trainer.storage import FileStore
from crew import together
from safetensors.torch import load
from training import BATCH, LENGTH, SHAPE, Studio, finetune_recipe, phase, train_recipe
from transformers import LlamaConfig, MixtralConfig

WEIGHTS = "model.safetensors"
STEPS = 4
GENTLE = Optimizer(lr=0.1, warmup_steps=0, eps=0.1, clip=0.5)
"""A large eps makes an update a smooth function of the gradient; the norm is above 0.5."""


def test_gpus_that_are_not_there_are_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver that does not fit costs days: it must not look like slow training."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    set_up(Scheduling(), Precision.FP32)
    assert caplog.messages == []

    compute = set_up(Scheduling(gpus=8), Precision.FP32)
    assert compute.device.type == "cpu"
    assert caplog.messages == ["gpus: 8 asked for, none seen; computing on the CPU"]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """Without dropout, which no two numbers of ranks draw alike."""
    studio = Studio(tmp_path_factory.mktemp("studio"))
    studio.add_model("tied", LlamaConfig(**SHAPE))
    studio.add_model("untied", LlamaConfig(**SHAPE | {"tie_word_embeddings": False}))
    # Of three experts one rank in four has no row, and of three ranks each has another number.
    odd = SHAPE | {"tie_word_embeddings": False, "num_hidden_layers": 1}
    studio.add_model("odd", MixtralConfig(**odd, num_local_experts=3, num_experts_per_tok=2))
    return studio


@dataclass
class Told:
    """What a rank tells of its attempt."""

    metrics: dict[str, float] = field(default_factory=dict)
    resumed: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    """Of rank 0."""
    losses: list[tuple[float, ...]] = field(default_factory=list)
    """Per step: loss, norm of the gradient, balance."""
    fed: list[list[list[int]]] = field(default_factory=list)
    """Tokens of every training pass."""
    stopped: str = ""


def attempt(
    ranks: Ranks, studio: Studio, task: Task, stop: int = 0, store: Any = None, save: bool = False
) -> Told:
    """Runs the stage on this rank; the last rank alone is asked to stop after `stop` steps.

    `save`: a checkpoint is due, and written, after every step.
    """
    told = Told()

    def publish(progress: Progress) -> None:
        if progress.phase == "training":
            told.losses.append((progress.loss or 0, progress.grad_norm or 0, progress.balance or 0))

    def stopping() -> bool:
        return bool(stop) and ranks.rank == ranks.world - 1 and len(told.losses) >= stop

    def listen(folder: Path) -> Any:
        model = load_model(folder)
        model.model.embed_tokens.register_forward_pre_hook(
            lambda module, args: told.fed.append(args[0].tolist()) if module.training else None
        )
        return model

    load_model, loop.load_model = loop.load_model, listen
    work = studio.work(task, publish, stopping)
    work.out.token = ranks.share(lambda: work.out.token)
    if save:
        wait_for_every_save()
    if store:
        object.__setattr__(work, "store", store(studio.store.local(""), ranks.rank))
    try:
        made = (finetune if isinstance(work.recipe, FinetuneRecipe) else train).run(work)
    except PreemptedError as error:
        told.stopped = str(error)
        return told
    told.metrics, told.resumed = made.metrics, made.resumed_step
    told.files = studio.files(work) if ranks.rank == 0 else {}
    return told


def wait_for_every_save() -> None:
    """In a rank, which ends with the test: saves are due always, and end before the next step."""
    save = Checkpoints.save

    def patient(self: Checkpoints, *args: Any) -> None:
        save(self, *args)
        loop._settle(self)

    Checkpoints.save = patient  # type: ignore[method-assign]
    loop.time = type("Late", (), {"monotonic": iter(range(10**9)).__next__})  # type: ignore[assignment]


def alone(studio: Studio, task: Task, **how: Any) -> Told:
    """One rank."""
    return done(together(1, attempt, studio, task, *how.values()))[0]


def done(told: list[Any]) -> list[Told]:
    """Every rank's answer; the first error is raised."""
    for answer in told:
        if isinstance(answer, Exception):
            raise answer
    return told


# The same training.


CASES: dict[str, tuple[Callable[..., TrainRecipe | FinetuneRecipe], dict[str, Any], list[str]]] = {
    "tied": (train_recipe, {}, ["tied", "letters"]),
    "untied": (train_recipe, {}, ["untied", "letters"]),
    "moe": (
        finetune_recipe,
        {"routing": Routing(init="DomainMean", alpha=0.5), "experts": (1, 2, 0, 0)},
        ["mixed", "letters", "sums"],
    ),
    "router": (
        finetune_recipe,
        {"routing": Routing(alpha=0.5), "trainable": Trainable.ROUTER},
        ["mixed", "letters", "sums"],
    ),
    "bf16": (finetune_recipe, {"precision": "bf16"}, ["mixed", "letters", "sums"]),
}  # fmt: skip


def task_of(studio: Studio, case: str, steps: int = STEPS, **how: Any) -> Task:
    """A fresh task of the case."""
    recipe, fields, names = CASES[case]
    return studio.task(recipe(steps, optimizer=GENTLE, **fields), names, **how)


def assert_close(found: Told, expected: Told, case: str) -> None:
    """Equal to rounding: losses, norms and balance of every step, metrics, weights."""
    rel = 3e-3 if case == "bf16" else 2e-6
    assert len(found.losses) == len(expected.losses)
    for mine, theirs in zip(found.losses, expected.losses, strict=True):
        assert mine == pytest.approx(theirs, rel=rel)
    assert found.metrics == pytest.approx(expected.metrics, rel=rel)
    assert found.files.keys() == expected.files.keys()
    given = load(expected.files[WEIGHTS])
    for name, tensor in load(found.files[WEIGHTS]).items():
        atol = 3e-3 if case == "bf16" else 2e-6
        torch.testing.assert_close(tensor, given[name], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_ranks_changes_rounding_only(studio: Studio, case: str) -> None:
    """Losses step by step and the artifact, for dense and sparse models, in one pass and in two."""
    one = alone(studio, task_of(studio, case))
    two = done(together(2, attempt, studio, task_of(studio, case)))
    parts = done(together(2, attempt, studio, task_of(studio, case, micro_batch=3)))
    for several in (two, parts):
        assert_close(several[0], one, case)
        assert several[1].losses == several[0].losses
        assert several[1].metrics == several[0].metrics
    assert one.losses[0][1] > GENTLE.clip, "the norm of all rows is what counts"


@pytest.mark.parametrize("world", [3, 4])
def test_parameters_with_fewer_rows_than_ranks(studio: Studio, world: int) -> None:
    """Three experts on four ranks, and rows that do not divide evenly."""
    recipe = finetune_recipe(
        data=(phase(2, d1=1.0, d2=2.0),), batch_tokens=12 * LENGTH, optimizer=GENTLE
    )
    names = ["odd", "letters", "sums"]
    one = alone(studio, studio.task(recipe, names))
    several = done(together(world, attempt, studio, studio.task(recipe, names)))
    assert_close(several[0], one, "odd")
    assert [len(rank.fed[0]) for rank in several] == [12 // world] * world


def test_the_order_of_the_data_is_the_same_at_1_2_and_4_ranks(studio: Studio) -> None:
    """The tokens that the ranks' models really read are, in turn, those of one rank."""
    recipe = finetune_recipe(
        data=(phase(3, d1=1.0), phase(3, d1=1.0, d2=3.0)), routing=Routing(alpha=0)
    )
    fed = {}
    for world in (1, 2, 4):
        task = studio.task(recipe, ["mixed", "letters", "sums"])
        ranks = done(together(world, attempt, studio, task))
        assert all(len(rank.fed) == 6 for rank in ranks)
        rows = [rank.fed for rank in ranks]
        fed[world] = [[rows[i % world][s][i // world] for i in range(BATCH)] for s in range(6)]
    assert fed[2] == fed[1] and fed[4] == fed[1]
    assert len({json.dumps(batch) for batch in fed[1]}) == 6


def test_ranks_that_cannot_share_a_batch_are_refused(studio: Studio) -> None:
    """Eight sequences on three ranks: one line that names the field."""
    for answer in together(3, attempt, studio, task_of(studio, "tied")):
        assert str(answer) == (
            "execution.train.processes: 3 ranks cannot share the 8 sequences of a batch evenly"
        )


# Stop and resume.


def test_ranks_stop_together_and_resume_in_the_same_bits(studio: Studio) -> None:
    """One rank hears the signal: all save and stop after the same step; the files end equal."""
    task = task_of(studio, "moe", steps=6)
    stopped = done(together(2, attempt, studio, task, 3))
    assert [told.stopped for told in stopped] == ["asked to stop after step 3"] * 2
    resumed = done(together(2, attempt, studio, task))
    assert [told.resumed for told in resumed] == [3, 3]
    whole = done(together(2, attempt, studio, task_of(studio, "moe", steps=6)))
    assert resumed[0].files == whole[0].files
    assert resumed[0].metrics == whole[0].metrics


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 3)])
def test_another_number_of_ranks_goes_on(studio: Studio, before: int, after: int) -> None:
    """Each takes its rows from the files of the others: same data, equal to rounding."""
    recipe = finetune_recipe(
        data=(phase(4, d1=1.0, d2=2.0),), batch_tokens=12 * LENGTH, optimizer=GENTLE
    )
    task, names = studio.task(recipe, ["odd", "letters", "sums"]), ["odd", "letters", "sums"]
    done(together(before, attempt, studio, task, 1))
    resumed = done(together(after, attempt, studio, task))
    whole = alone(studio, studio.task(recipe, names))
    assert [told.resumed for told in resumed] == [1] * after
    whole.losses = whole.losses[1:]
    assert_close(resumed[0], whole, "odd")
    fed = [resumed[i % after].fed[0][i // after] for i in range(12)]
    assert fed == whole.fed[1]


def test_a_damaged_part_makes_all_ranks_go_further_back(studio: Studio) -> None:
    """Rank 1's rows of the last checkpoint are bad: rank 0 does not use its own either."""
    task = task_of(studio, "tied", checkpoint_seconds=1)
    done(together(2, attempt, studio, task, 3, None, True))
    assert task.stage
    folder = studio.folder / "storage" / checkpoints_folder(task.stage.kind, task.stage.digest)
    (part,) = folder.glob("3-*/state-00001-of-00002.safetensors")
    part.write_bytes(part.read_bytes()[:-4] + b"oops")
    resumed = done(together(2, attempt, studio, task))
    assert [told.resumed for told in resumed] == [2, 2]
    whole = done(together(2, attempt, studio, task_of(studio, "tied")))
    assert resumed[0].files == whole[0].files


class Hiccup(FileStore):
    """A store in which the last rank cannot write the checkpoint of step 2."""

    def __init__(self, root: Path, rank: int) -> None:
        super().__init__(root)
        self.rank = rank

    def sink(self, key: str) -> Any:
        if self.rank and "/checkpoints/2-" in key:
            raise OSError(28, "No space left", key)
        return super().sink(key)


def test_a_checkpoint_that_one_rank_cannot_write_is_nobodys(studio: Studio) -> None:
    """Training goes on, the next one is written, and the stage ends as if nothing had been."""
    task = task_of(studio, "tied", checkpoint_seconds=1)
    done(together(2, attempt, studio, task, 3, Hiccup, True))
    assert task.stage
    folder = studio.folder / "storage" / checkpoints_folder(task.stage.kind, task.stage.digest)
    manifests = {path.parent.name.partition("-")[0] for path in folder.glob("*/manifest.json")}
    assert manifests == {"1", "3"}
    resumed = done(together(2, attempt, studio, task))
    assert [told.resumed for told in resumed] == [3, 3]
    assert resumed[0].files[HISTORY].count(b"\n") == STEPS
