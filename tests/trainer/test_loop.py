"""The loop on tiny models and real inputs, in this process: training, accumulation, resume."""

import itertools
import json
import math
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from btx_api.artifact import HISTORY, checkpoints_folder
from btx_api.spec import Optimizer, Routing, Trainable
from btx_api.stage import FinetuneRecipe, Progress, Task, TrainRecipe
from btx_trainer import loop, optim
from btx_trainer.checkpoint import Checkpoint, Checkpoints
from btx_trainer.errors import ConfigurationError, DivergedError, PreemptedError
from btx_trainer.model import load_model
from btx_trainer.ranks import Ranks
from btx_trainer.stages import finetune, train
from btx_trainer.storage import Sink
from btx_trainer.tokenizer import EOS
from btx_trainer.work import Made, Work
from safetensors.torch import load, load_file
from torch import nn
from torch.nn import functional as F
from training import BATCH, LENGTH, SHAPE, TEXTS, Studio, finetune_recipe, phase, train_recipe
from transformers import LlamaConfig, MixtralConfig

WEIGHTS = "model.safetensors"
SEED, MIXED = ["seed", "letters"], ["mixed", "letters", "sums"]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """Every test adds stages of its own to one storage."""
    return Studio(tmp_path_factory.mktemp("studio"))


def run(work: Work) -> Made:
    """The real stage."""
    return (finetune if isinstance(work.recipe, FinetuneRecipe) else train).run(work)


def made(studio: Studio, task: Task) -> tuple[Made, dict[str, bytes]]:
    """One uninterrupted attempt: what it says and its files."""
    work = studio.work(task)
    result = run(work)
    return result, studio.files(work)


def after(steps: int) -> tuple[Callable[[Progress], None], Callable[[], bool]]:
    """`publish` and `stopping` of a process that is asked to stop once so many steps are done."""
    seen: list[int] = []
    return lambda progress: seen.append(progress.step), lambda: max(seen, default=0) >= steps


class Killed(BaseException):
    """The process ends here."""


def dying(steps: int) -> Callable[[Progress], None]:
    """`publish` of a process that is killed once so many steps are done."""

    def publish(progress: Progress) -> None:
        if progress.phase == "training" and progress.step >= steps:
            raise Killed

    return publish


# What a stage makes.


def test_an_expert_learns_its_domain(studio: Studio) -> None:
    """The held-out loss falls by what `gain` says, and the history has every step."""
    result, files = made(studio, studio.task(train_recipe(60), SEED))
    metrics = result.metrics
    assert metrics["loss_after"] < metrics["loss_before"] - 2
    assert metrics["gain"] == metrics["loss_before"] - metrics["loss_after"]
    assert (metrics["steps"], metrics["tokens"]) == (60, 60 * LENGTH * BATCH)
    lines = [json.loads(line) for line in files[HISTORY].splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 61)]
    assert lines[-1]["tokens"] == metrics["tokens"]
    assert lines[-1].keys() == {"step", "tokens", "loss", "lr", "grad_norm"}
    last = [line["loss"] for line in lines[-loop.AVERAGED :]]
    assert metrics["train_loss"] == pytest.approx(sum(last) / len(last))
    assert metrics["train_loss"] < lines[0]["loss"] - 2
    # The schedule's end.
    assert lines[-1]["lr"] == pytest.approx(3e-4)


def test_the_artifact_is_a_model_like_its_input(studio: Studio, tmp_path: Path) -> None:
    """Config and tokenizer are the input's own bytes; the weights load and are new."""
    folder = studio.places["seed"][1].uri.removeprefix("file://")
    given = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    _, files = made(studio, studio.task(train_recipe(2), SEED))
    assert files.keys() == given.keys() | {HISTORY}
    assert [name for name in given if files[name] != given[name]] == [WEIGHTS]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert load_model(tmp_path).config.model_type == "llama"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_artifact_has_the_dtype_of_its_input(studio: Studio, dtype: torch.dtype) -> None:
    """An expert and its seed can be mixed, whatever the seed's dtype, also trained in bf16."""
    name = f"seed-{dtype}"
    studio.add_model(name, LlamaConfig(**SHAPE | {"tie_word_embeddings": True}), dtype=dtype)
    result, files = made(studio, studio.task(train_recipe(30, precision="bf16"), [name, "letters"]))
    tensors = load(files[WEIGHTS])
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert "lm_head.weight" not in tensors, "a tied head is stored once"
    assert result.metrics["gain"] > 1


def test_the_held_out_loss_is_the_stock_models(studio: Studio) -> None:
    """`loss_before` is the mean over tokens of the documents that no training sees, one by one."""
    length = 64
    task = studio.task(train_recipe(1, held_out_tokens=10**6, sequence_length=length), SEED)
    result, _ = made(studio, task)
    model = load_model(Path(studio.places["seed"][1].uri.removeprefix("file://"))).eval()
    nats, targets = 0.0, 0
    for text in TEXTS["letters"][::8]:
        ids = torch.tensor([*text.encode(), EOS])
        for start in range(0, len(ids) - 1, length):
            piece = ids[start : start + length + 1]
            logits = model(piece[None, :-1], use_cache=False).logits[0]
            nats += F.cross_entropy(logits, piece[1:], reduction="sum").item()
            targets += len(piece) - 1
    assert result.metrics["loss_before"] == pytest.approx(nats / targets, rel=1e-5)


def test_the_router_starts_from_the_domains(studio: Studio) -> None:
    """DomainMean with tokens 0: new routers and nothing else, and both losses are reported."""
    recipe = finetune_recipe(0, routing=Routing(init="DomainMean"), experts=(1, 2, 0, 0))
    result, files = made(studio, studio.task(recipe, MIXED))
    folder = Path(studio.places["mixed"][1].uri.removeprefix("file://"))
    before, new = load_file(folder / WEIGHTS), load(files[WEIGHTS])
    changed = {name for name in before if not torch.equal(before[name], new[name])}
    assert changed == {name for name in before if "gate" in name}
    assert result.metrics["steps"] == 0
    assert result.metrics["loss_after"] == result.metrics["loss_after_init"]
    assert result.metrics["loss_after"] != result.metrics["loss_before"]
    assert files[HISTORY] == b""


@pytest.mark.parametrize("scope", list(Trainable))
def test_frozen_parameters_keep_their_bits(studio: Studio, scope: Trainable) -> None:
    """Through the real loop: what is out of scope is bit-identical, and all in scope moves."""
    _, files = made(studio, studio.task(finetune_recipe(3, trainable=scope), MIXED))
    folder = Path(studio.places["mixed"][1].uri.removeprefix("file://"))
    before, new = load_file(folder / WEIGHTS), load(files[WEIGHTS])
    assert before.keys() == new.keys()
    for name, tensor in before.items():
        trained = {
            Trainable.ALL: True,
            Trainable.ALL_BUT_EXPERTS: ".experts." not in name,
            Trainable.ROUTER: ".gate." in name,
        }[scope]
        assert torch.equal(tensor, new[name]) is not trained, name


def test_only_the_rule_changes_the_config(studio: Studio) -> None:
    """Soft routing sends every token to all experts, and the config says so."""
    recipe = finetune_recipe(1, routing=Routing(method="Soft"))
    _, files = made(studio, studio.task(recipe, MIXED))
    folder = Path(studio.places["mixed"][1].uri.removeprefix("file://"))
    given = json.loads((folder / "config.json").read_text())
    assert json.loads(files["config.json"]) == {**given, "num_experts_per_tok": 4}


def test_a_finetune_reports_its_routing(studio: Studio) -> None:
    """Balance, load and losses are in the metrics, the history and the published progress."""
    seen: list[Progress] = []
    work = studio.work(studio.task(finetune_recipe(12), MIXED), publish=seen.append)
    result = run(work)
    assert result.metrics["loss_after"] < result.metrics["loss_before"] - 1
    assert result.metrics["dead_experts"] == 0
    assert "gain" not in result.metrics
    line = json.loads(studio.files(work)[HISTORY].splitlines()[-1])
    steps = [progress for progress in seen if progress.phase == "training"]
    assert [progress.step for progress in steps] == [*range(1, 13)]
    assert {progress.phase for progress in seen} == {"training", "evaluating"}
    last = steps[-1]
    assert last.steps == 12 and last.tokens == 12 * LENGTH * BATCH
    assert last.balance == pytest.approx(line["balance"], rel=1e-5)
    assert sum(last.expert_load) == pytest.approx(1)
    assert list(last.expert_load) == pytest.approx(line["expert_load"], abs=1e-4)
    assert last.tokens_per_second > 0 and last.eta_seconds == 0


def never_chosen(model: nn.Module) -> None:
    """Of logits a, -a, b, -b, 0 two are above 0: top-2 never takes the last expert."""
    for layer in model.model.layers:
        gate = layer.mlp.gate.weight
        gate[1], gate[3], gate[4] = -gate[0], -gate[2], 0


def test_a_dead_expert_is_reported(studio: Studio, caplog: pytest.LogCaptureFixture) -> None:
    """After so many steps without slots: in the log, the metrics, the history and the progress."""
    config = MixtralConfig(**SHAPE, num_local_experts=5, num_experts_per_tok=2)
    studio.add_model("dead", config, never_chosen)
    recipe = finetune_recipe(
        6, routing=Routing(alpha=0), optimizer=Optimizer(lr=1e-6, weight_decay=0)
    )
    seen: list[Progress] = []
    task = studio.task(recipe, ["dead", "letters", "sums"], dead_expert_steps=4)
    work = studio.work(task, publish=seen.append)
    assert run(work).metrics["dead_experts"] == 2
    lines = [json.loads(line) for line in studio.files(work)[HISTORY].splitlines()]
    names = ["0.4", "1.4"]
    assert [line.get("dead_experts", []) for line in lines] == [[], [], [], names, names, names]
    training = [progress for progress in seen if progress.phase == "training"]
    assert [list(p.dead_experts) for p in training] == [[], [], [], names, names, names]
    assert [r.getMessage() for r in caplog.records] == [
        f"step 4: expert {name} gets next to no tokens" for name in names
    ]


def test_the_balancing_loss_balances(studio: Studio) -> None:
    """The router alone, trained fast: without alpha it drifts to a few experts."""
    config = MixtralConfig(**SHAPE, num_local_experts=5, num_experts_per_tok=2)
    studio.add_model("lopsided", config, never_chosen)
    ends = []
    for alpha in (0.0, 1.0):
        recipe = finetune_recipe(
            30, trainable=Trainable.ROUTER, routing=Routing(alpha=alpha),
            optimizer=Optimizer(lr=0.01, warmup_steps=0, weight_decay=0),
        )  # fmt: skip
        result, _ = made(studio, studio.task(recipe, ["lopsided", "letters", "sums"]))
        ends.append(result.metrics["balance"])
    assert ends[0] > 1.2 and ends[1] < 1.1


# Accumulation.


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_micro_batch_changes_rounding_only(studio: Studio, micro_batch: int) -> None:
    """The same weights, with a strong balancing loss: it is the whole batch's, not the part's."""
    # A large eps makes an update a smooth function of the gradient.
    recipe = finetune_recipe(
        4, routing=Routing(alpha=1.0), optimizer=Optimizer(lr=0.1, warmup_steps=0, eps=0.1)
    )
    whole, whole_files = made(studio, studio.task(recipe, MIXED))
    parts, files = made(studio, studio.task(recipe, MIXED, micro_batch=micro_batch))
    expected = load(whole_files[WEIGHTS])
    for name, tensor in load(files[WEIGHTS]).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-6)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_model_trains_the_same(studio: Studio) -> None:
    """scheduling.compile changes rounding only."""
    recipe = train_recipe(4, optimizer=Optimizer(lr=0.1, warmup_steps=0, eps=0.1))
    studio.add_model("shallow", LlamaConfig(**{**SHAPE, "num_hidden_layers": 1}))
    names = ["shallow", "letters"]
    plain, _ = made(studio, studio.task(recipe, names))
    compiled, _ = made(studio, studio.task(recipe, names, compile=True))
    assert compiled.metrics == pytest.approx(plain.metrics, rel=1e-5)
    assert compiled.metrics["gain"] > 0.1


# Resume.


MIXTURE = (phase(5, d1=1.0), phase(5, d1=1.0, d2=3.0))
CASES: dict[str, tuple[TrainRecipe | FinetuneRecipe, list[str], dict[str, int]]] = {
    "train": (train_recipe(10), SEED, {}),
    # Everything that a checkpoint must hold.
    "finetune": (
        finetune_recipe(data=MIXTURE, routing=Routing(init="DomainMean"), experts=(1, 2, 0, 0)),
        MIXED, {"dead_expert_steps": 2, "micro_batch": 5},
    ),
    "frozen": (
        finetune_recipe(10, trainable=Trainable.ALL_BUT_EXPERTS, precision="bf16"), MIXED, {},
    ),
}  # fmt: skip


def task_of(studio: Studio, case: str, **how: int) -> Task:
    """A fresh task of the case."""
    recipe, names, scheduling = CASES[case]
    return studio.task(recipe, names, **scheduling, **how)


every_case = pytest.mark.parametrize("case", CASES)


def assert_same(studio: Studio, case: str, result: Made, work: Work) -> None:
    """The attempt ended in the bits of an uninterrupted one."""
    expected, files = made(studio, task_of(studio, case))
    assert studio.files(work) == files
    assert result.metrics == expected.metrics


@every_case
@pytest.mark.parametrize("steps", [1, 6, 10])
def test_a_preempted_stage_ends_in_the_same_bits(studio: Studio, case: str, steps: int) -> None:
    """Asked to stop in the middle or in the last measurement: saved, resumed there, equal."""
    task = task_of(studio, case)
    publish, stopping = after(steps)
    with pytest.raises(PreemptedError, match=f"step {steps}"):
        run(studio.work(task, publish, stopping))
    work = studio.work(task)
    result = run(work)
    assert result.resumed_step == steps
    assert_same(studio, case, result, work)


def test_a_checkpoint_leaves_out_what_is_frozen(studio: Studio) -> None:
    """Weights and moments of the routers alone; the rest is in the stage's input."""
    task = studio.task(finetune_recipe(2, trainable=Trainable.ROUTER), MIXED)
    publish, stopping = after(1)
    work = studio.work(task, publish, stopping)
    with pytest.raises(PreemptedError):
        run(work)
    found = Checkpoints(studio.store, work.stage, "c" * 16).latest()
    assert found
    assert found.arrays.keys() == {
        f"{what}/model.layers.{layer}.mlp.gate.weight"
        for what in ("weight", "step", "exp_avg", "exp_avg_sq")
        for layer in (0, 1)
    }


def test_a_stage_stopped_before_its_first_step_begins_anew(studio: Studio) -> None:
    """There is nothing to save, and nothing is."""
    task = studio.task(train_recipe(3), SEED)
    work = studio.work(task, stopping=lambda: True)
    with pytest.raises(PreemptedError):
        run(work)
    assert Checkpoints(studio.store, work.stage, "c" * 16).latest() is None


@every_case
@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_stage_ends_in_the_same_bits(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, case: str, damaged: bool
) -> None:
    """The last sound checkpoint counts: a damaged one is passed over for the one before."""
    task = task_of(studio, case, checkpoint_seconds=1)
    work = studio.work(task, dying(9))
    # A second passes with every look at the clock, and each save ends before the next step.
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda *saved: (save(*saved), saved[0].wait()))
    with pytest.raises(Killed):
        run(work)
    monkeypatch.undo()
    if damaged:
        folder = checkpoints_folder(work.stage.kind, work.stage.digest)
        (state,) = (studio.folder / "storage" / folder).glob("8-*/state.safetensors")
        state.write_bytes(state.read_bytes()[:-4] + b"oops")
    work = studio.work(task)
    result = run(work)
    assert result.resumed_step == (7 if damaged else 8)
    assert_same(studio, case, result, work)


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_stage(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A line in the log, then the next interval's is written, and the stage ends as ever."""
    task = task_of(studio, "train", checkpoint_seconds=1)
    work = studio.work(task)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    save, sink = Checkpoints.save, work.store.sink
    committed: list[tuple[int, int]] = []

    def patient(self: Checkpoints, checkpoint: Checkpoint) -> None:
        save(self, checkpoint)
        futures.wait([self._writing])  # type: ignore[list-item]
        committed.append((checkpoint.step, self.committed[0]))

    def full(key: str) -> Sink:
        if "/checkpoints/3-" in key or "/checkpoints/4-" in key:
            raise OSError(28, "No space left", key)
        return sink(key)

    monkeypatch.setattr(Checkpoints, "save", patient)
    monkeypatch.setattr(work.store, "sink", full)
    result = run(work)
    monkeypatch.undo()
    assert committed == [(s, s if s not in (3, 4) else 2) for s in range(1, 11)]
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
        "a checkpoint could not be written"
    ] * 2
    assert_same(studio, "train", result, work)


# Errors.


def test_a_loss_that_is_not_finite_stops_the_stage(studio: Studio) -> None:
    """One line names the step and the samples; nothing is updated or saved."""

    def overflow(model: nn.Module) -> None:
        model.model.norm.weight.fill_(1e38)

    studio.add_model("broken", LlamaConfig(**SHAPE), overflow)
    studio.add_domain("all-trained", TEXTS["letters"], held_out_every=0)
    with pytest.raises(DivergedError, match=r"^step 0: .*samples 0 to 7$"):
        run(studio.work(studio.task(train_recipe(3), ["broken", "all-trained"])))
    with pytest.raises(DivergedError, match=r"^step 0: the held-out loss is not finite$"):
        run(studio.work(studio.task(train_recipe(3), ["broken", "letters"])))


def test_tokens_that_the_model_does_not_know_are_refused(studio: Studio) -> None:
    """A domain prepared with another tokenizer is named before anything is trained."""
    studio.add_model("small", LlamaConfig(**{**SHAPE, "vocab_size": 200}))
    with pytest.raises(ConfigurationError, match=r"^train.inputs\[1\]: .*260.*200"):
        run(studio.work(studio.task(train_recipe(1), ["small", "letters"])))


def test_without_held_out_text_no_loss_is_claimed(studio: Studio) -> None:
    """heldOut: 0 leaves the measured losses and the gain out of the metrics."""
    studio.add_domain("no-split", TEXTS["sums"], held_out_every=0)
    result, _ = made(studio, studio.task(train_recipe(2), ["seed", "no-split"]))
    assert result.metrics.keys() == {"steps", "tokens", "train_loss"}


# The optimizer.


def test_the_schedule() -> None:
    """Linear to the peak at step warmup_steps, one cosine to the floor at the last step."""
    recipe = Optimizer(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [optim.lr_at(step, 15, recipe) for step in range(15)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[9] == pytest.approx(0.55)
    assert rates[14] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    flat = Optimizer(lr=1.0, warmup_steps=0, min_lr_ratio=1.0)
    assert [optim.lr_at(step, 2, flat) for step in range(2)] == [1.0, 1.0]
    # Shorter than its warm-up: it never gets to the peak.
    assert optim.lr_at(1, 2, Optimizer(lr=1.0, warmup_steps=9)) == pytest.approx(0.2)
    assert optim.lr_at(0, 1, Optimizer(lr=1.0, warmup_steps=0)) == 1.0


@pytest.mark.parametrize(("clip", "length"), [(0.0, 5.0), (1.0, 1.0), (10.0, 5.0)])
def test_clipping_limits_the_global_norm(clip: float, length: float) -> None:
    """A longer gradient is shortened to `clip` over all parameters; 0 switches it off."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))])
    optimizer = torch.optim.SGD(model.parameters())
    for parameter, gradient in zip(model, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    norm = optim.gradient_norm(optimizer, Ranks())
    optim.update(optimizer, 1.0, norm, clip)
    assert norm.item() == pytest.approx(5)
    assert math.hypot(*(p.item() for p in model)) == pytest.approx(length, rel=1e-5)
    assert all(p.grad is None for p in model)
