"""The one training loop: resume, measure, step, checkpoint, measure, save; nats per token.

`train` is the whole story; read it first. Every draw depends on (randomSeed, step) alone, so the
state of a run is its step, weights, moments and records, and a resumed run ends in the same bits.
Called by the stages train and finetune, on one rank or on several: each takes its samples of every
batch, four sums of `_gradients` go over all (targets, balance terms, loss, slots), FSDP2 adds up
the gradients, and whatever decides what happens next is agreed.
"""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import islice
from operator import add
from pathlib import Path
from typing import Any

import torch
from btx_api.artifact import HISTORY
from btx_api.spec import Phase, Train
from btx_api.stage import MICRO_BATCH_TOKENS, Kind, Progress
from torch import Tensor
from transformers import PreTrainedModel

from btx_trainer import optim, shards
from btx_trainer.checkpoint import Checkpoint, Checkpoints
from btx_trainer.data import Batch, Sampler, held_out_batches
from btx_trainer.distributed import Compute, forward, place_model, set_up
from btx_trainer.errors import ConfigurationError, DivergedError, PreemptedError
from btx_trainer.model import chunked_cross_entropy, forward_hidden, load_model, save_model
from btx_trainer.routing import (
    BalanceTerms,
    DeadExperts,
    LayerRouting,
    balance_terms,
    balancing_loss,
    balancing_share,
    init_domain_mean,
    record,
    shares,
    slot_counts,
)
from btx_trainer.shards import Prepared
from btx_trainer.storage import MODEL_FILES
from btx_trainer.weights import LocalFolder, open_checkpoint
from btx_trainer.work import Made, Work

log = logging.getLogger(__name__)

Part = tuple[Tensor, Tensor, Tensor]
"""input_ids, position_ids and labels of a micro-batch, each [sequences, length]."""

HISTORY_LINES = 2000
"""At most so many lines in the history of a stage, evenly spread."""
AVERAGED = 10
"""Logged steps that the metrics train_loss and balance are means of: the last ones."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a stage gives the loop."""

    model: PreTrainedModel
    """fp32, with its rule installed and its scope frozen; `train` puts it on the device."""
    source: Path
    """The folder it came from: its config, tokenizer and dtype go into the artifact."""
    recipe: Train
    data: Sampler
    domains: Mapping[str, Prepared]
    """By input index."""
    held_out: Sequence[Prepared]
    """Of the domains trained on: the loss is measured on these at both ends."""
    compute: Compute
    micro_batch: int
    """Sequences per forward pass."""
    alpha: float = 0.0
    """Weight of the balancing loss."""
    router_data: Sequence[tuple[int, Sequence[tuple[Tensor, Tensor]]]] = ()
    """For `init_domain_mean` as the first act; empty: the router stays as it is."""
    config: Mapping[str, int] = field(default_factory=dict)
    """Fields that the routing rule sets in the config; the others stay as in `source`."""


def begin(work: Work, recipe: Train, phases: Sequence[Phase]) -> Job:
    """Opens a stage's inputs, a model and the prepared domains that `phases` name by index.

    Raises ConfigurationError naming a domain with tokens that the model does not know.
    """
    scheduling = work.execution.scheduling
    compute = set_up(scheduling, recipe.precision)
    source = work.inputs[0].fetch()
    domains = {str(i): shards.open(item.fetch()) for i, item in enumerate(work.inputs) if i}
    model = load_model(source)
    for number, domain in domains.items():
        if domain.index.vocab_size > model.config.vocab_size:
            raise ConfigurationError(
                f"{work.stage.kind}.inputs[{number}]",
                f"a vocabulary of {domain.index.vocab_size} tokens, "
                f"and the model knows {model.config.vocab_size}; see prepare.tokenizer",
            )
    used = dict.fromkeys(
        name for phase in phases for name, weight in phase.domains.items() if weight
    )
    length = recipe.sequence_length
    sequences, world = recipe.batch_tokens // length, compute.ranks.world
    if sequences % world:
        raise ConfigurationError(
            f"execution.{work.stage.kind}.processes",
            f"{world} ranks cannot share the {sequences} sequences of a batch evenly",
        )
    return Job(
        model=model, source=source, recipe=recipe, compute=compute,
        domains=domains, held_out=[domains[name] for name in used],
        data=Sampler(
            phases=phases, domains=domains, sequence_length=length,
            batch_tokens=recipe.batch_tokens, seed=recipe.random_seed,
        ),
        micro_batch=scheduling.micro_batch or max(1, MICRO_BATCH_TOKENS // length),
    )  # fmt: skip


def train(work: Work, job: Job) -> Made:
    """Trains the job's model to the end of its data; puts it and its history into `work.out`.

    Raises PreemptedError when asked to stop, the last step saved; DivergedError naming step and
    samples when the loss or the gradient is not finite.
    """
    place_model(job.model, job.compute)
    ranks = job.compute.ranks
    run = _Run(work, job)
    checkpoints = Checkpoints(work.store, work.stage, work.out.token, ranks.another())
    if found := checkpoints.latest():
        run.restore(found)
    resumed, interval = run.step, work.execution.scheduling.checkpoint_seconds
    try:
        if run.step == 0:
            run.measure("loss_before")
            if job.router_data:
                init_domain_mean(job.model, job.router_data)
                run.measure("loss_after_init")
        if work.execution.scheduling.compile:
            _compile(job.model)
        due = time.monotonic() + interval
        while run.step < job.data.steps:
            run.note(_step(job, run.optimizer, run.step), checkpoints.committed)
            late, busy, stop = ranks.any(time.monotonic() >= due, checkpoints.busy, work.stopping())
            # Storage slower than the interval must not hold up the steps.
            if late and not busy:
                _settle(checkpoints)
                checkpoints.save(run.checkpoint())
                due = time.monotonic() + interval
            if stop:
                raise run.preempted()
        run.measure("loss_after")
    except PreemptedError:
        _settle(checkpoints)
        # The grace period is short: nothing is written twice, and nothing before the first step.
        if run.step > checkpoints.committed[0]:
            checkpoints.save(run.checkpoint())
            checkpoints.wait()
        raise
    _settle(checkpoints)
    _put(work, job, run.history)
    return Made(metrics=run.headlines(), resumed_step=resumed)


def _settle(checkpoints: Checkpoints) -> None:
    """Waits for the checkpoint that is being written; a newer one makes its failure harmless."""
    try:
        checkpoints.wait()
    except OSError as error:
        log.warning("a checkpoint could not be written: %s", error)


def _compile(model: PreTrainedModel) -> None:
    """Block by block: one compilation serves all layers."""
    # Not before the router's start, whose rules would each compile anew.
    for layer in model.model.layers:
        layer.compile()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Taken:
    """One step, in numbers."""

    loss: float
    """Nats per token, without the balancing loss."""
    grad_norm: float
    """Before clipping."""
    lr: float
    balance: float | None
    """Balancing loss divided by layers * alpha: 1 at balance. None of a dense model."""
    load: list[list[float]]
    """Each expert's share of its layer's slots, by layer."""


def _step(job: Job, optimizer: torch.optim.Optimizer, step: int) -> _Taken:
    """One update of the weights."""
    # What a step draws depends on nothing before it, so that no generator's state is kept.
    torch.manual_seed(_draw(job, step))
    loss, balance, load = _gradients(job, step)
    norm = optim.gradient_norm(optimizer, job.compute.ranks)
    numbers = torch.stack([loss, norm]).tolist()
    if not all(map(math.isfinite, numbers)):
        size = job.data.batch_size
        raise DivergedError(
            f"step {step}",
            f"loss {numbers[0]:g}, gradient norm {numbers[1]:g}: "
            f"not finite on samples {step * size} to {(step + 1) * size - 1}",
        )
    lr = optim.lr_at(step, job.data.steps, job.recipe.optimizer)
    optim.update(optimizer, lr, norm, job.recipe.optimizer.clip)
    return _Taken(loss=numbers[0], grad_norm=numbers[1], lr=lr, balance=balance, load=load)


def _draw(job: Job, step: int) -> int:
    """Seed of what a rank draws in a step (dropout): another on every rank."""
    return ((job.recipe.random_seed << 32) + step + (job.compute.ranks.rank << 56)) % 2**63


def _gradients(job: Job, step: int) -> tuple[Tensor, float | None, list[list[float]]]:
    """Adds the gradients of one batch; its loss, and the balance and load of an MoE model.

    Neither micro-batch nor ranks change more than rounding: the loss is divided by the targets of
    the whole batch, and the balancing loss is of the whole batch, by a first pass without gradient.
    """
    ranks = job.compute.ranks
    batch = job.data.batch(step, ranks.rank, ranks.world)
    targets = job.compute.total(batch.targets)[0]
    parts = parts_of(batch, job)
    known = _whole_terms(job, parts, step) if len(parts) > 1 and job.alpha else None
    total, terms, counts = torch.zeros((), device=job.compute.device), [], []
    for part in parts:
        nats, layers = _forward(job, *part, step)
        loss = nats / targets
        total += loss.detach()
        if layers:
            own = balance_terms(layers)
            # A single part is all that the rank has; with alpha 0 it does not matter.
            whole = known or own.all_reduced(ranks.add if len(parts) == 1 else None)
            loss = loss + balancing_share(own, whole, job.alpha)
            terms.append(own.all_reduced())
            counts.append(slot_counts(layers)[0])
        torch.autograd.backward(loss)
    ranks.add(total)
    if not terms:
        return total, None, []
    sums, slots = reduce(add, terms).all_reduced(ranks.add), reduce(add, counts)
    ranks.add(slots)
    balance = balancing_loss(sums, alpha=1.0) / len(slots)
    return total, balance.item(), shares(slots).tolist()


@torch.no_grad()
def _whole_terms(job: Job, parts: Sequence[Part], step: int) -> BalanceTerms:
    """The balance terms of a batch of several micro-batches and ranks, as constants."""
    layers = (_forward(job, *part[:2], None, step)[1] for part in parts)
    return reduce(add, map(balance_terms, layers)).all_reduced(job.compute.ranks.add)


def parts_of(batch: Batch, job: Job) -> list[Part]:
    """Micro-batches on the device."""
    arrays = (batch.input_ids, batch.position_ids, batch.labels)
    pieces = (torch.split(job.compute.tensor(array), job.micro_batch) for array in arrays)
    return list(zip(*pieces, strict=True))


def _forward(
    job: Job, ids: Tensor, positions: Tensor, labels: Tensor | None, step: int
) -> tuple[Tensor, list[LayerRouting]]:
    """The sum of the nats of a micro-batch, [] (0 without labels), and what each router did."""

    def nats(model: PreTrainedModel) -> Tensor:
        with job.compute.autocast():
            hidden = forward_hidden(model, ids, positions)
        if labels is None:
            return hidden.new_zeros(())
        head = model.get_output_embeddings().weight
        with job.compute.autocast():
            return chunked_cross_entropy(hidden, head, labels)[0]

    with record(job.model, step) as layers:
        found = forward(job.model, nats)
    return found, layers


@torch.no_grad()
def held_out_loss(job: Job, batches: Iterator[Batch]) -> float | None:
    """Nats per target by the rule of inference; None if there is nothing to predict.

    The ranks take the batches in turn, and all run the model equally often.
    """
    job.model.eval()
    ranks = job.compute.ranks
    nats, targets = 0.0, 0
    while turn := list(islice(batches, ranks.world)):
        targets += sum(batch.targets for batch in turn)
        mine = ranks.rank < len(turn)
        for part in parts_of(turn[ranks.rank if mine else 0], job):
            nats += mine * _forward(job, *part, 0)[0].item()
    job.model.train()
    return job.compute.total(nats)[0] / targets if targets else None


class _Run:
    """What changes while a job runs. A checkpoint holds all of it."""

    def __init__(self, work: Work, job: Job) -> None:
        self._work, self._job = work, job
        self.optimizer = optim.adamw(job.model, job.recipe.optimizer)
        self.step = 0
        """Steps done."""
        self.metrics: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self._window = work.execution.scheduling.dead_expert_steps
        self._experts = DeadExperts(self._window)
        self._buffers: dict[str, Tensor] = {}
        self._times: deque[tuple[float, int]] = deque(maxlen=20)
        job.model.train()

    def checkpoint(self) -> Checkpoint:
        """A copy on the host, valid until the next call."""
        state = {
            "metrics": self.metrics, "history": self.history, "experts": self._experts.state(),
        }  # fmt: skip
        arrays = optim.snapshot(self._job.model, self.optimizer, self._buffers)
        rows = optim.rows(self._job.model, arrays)
        return Checkpoint(step=self.step, arrays=arrays, rows=rows, state=state)

    def restore(self, found: Checkpoint) -> None:
        """Goes on where the checkpoint was taken."""
        optim.restore(self._job.model, self.optimizer, found.arrays)
        self.step = found.step
        self.metrics, self.history = dict(found.state["metrics"]), list(found.state["history"])
        self._experts.restore(found.state["experts"])

    def preempted(self) -> PreemptedError:
        """The error of a stage that was asked to stop."""
        return PreemptedError("", f"asked to stop after step {self.step}")

    def measure(self, name: str) -> None:
        """The mean over the held-out splits of the domains; no metric if all are empty."""
        losses = [held_out_loss(self._job, self._watched(split)) for split in self._job.held_out]
        known = [loss for loss in losses if loss is not None]
        if known:
            self.metrics[name] = sum(known) / len(known)
            if not math.isfinite(self.metrics[name]):
                raise DivergedError(f"step {self.step}", "the held-out loss is not finite")

    def _watched(self, split: Prepared) -> Iterator[Batch]:
        recipe = self._job.recipe
        for batch in held_out_batches(
            split, sequence_length=recipe.sequence_length, max_tokens=recipe.held_out_tokens,
            batch_size=self._job.micro_batch,
        ):  # fmt: skip
            if self._job.compute.ranks.any(self._work.stopping())[0]:
                raise self.preempted()
            self._publish("evaluating")
            yield batch

    def note(self, taken: _Taken, committed: tuple[int, float]) -> None:
        """Records and publishes one step; `committed` is the last checkpoint's step and time."""
        self.step += 1
        for event in self._experts.update(self.step, taken.load):
            fate = "gets next to no tokens" if event.dead else "gets tokens again"
            log.warning("step %d: expert %d.%d %s", self.step, event.layer, event.expert, fate)
        mean_load = [sum(column) / len(taken.load) for column in zip(*taken.load, strict=True)]
        line = {"loss": taken.loss, "lr": taken.lr, "grad_norm": taken.grad_norm}
        if taken.balance is not None:
            line["balance"] = taken.balance
        steps = self._job.data.steps
        if self.step == steps or self.step % math.ceil(steps / HISTORY_LINES) == 0:
            short = {name: float(f"{value:.6g}") for name, value in line.items()}
            load = {"expert_load": [round(share, 4) for share in mean_load]} if mean_load else {}
            dead = {"dead_experts": names} if (names := self._dead()) else {}
            self.history.append(
                {"step": self.step, "tokens": self._tokens(), **short, **load, **dead}
            )
        self._times.append((time.monotonic(), self.step))
        self._publish(
            "training", **line, expert_load=tuple(mean_load), dead_experts=tuple(self._dead()),
            checkpoint_step=committed[0], checkpoint_time=committed[1], **self._pace(),
        )  # fmt: skip

    def headlines(self) -> dict[str, float]:
        """The numbers of the Result."""
        last = self.history[-AVERAGED:]
        found = self.metrics | {"steps": self.step, "tokens": self._tokens()}
        for name, key in (("train_loss", "loss"), ("balance", "balance")):
            if last and key in last[-1]:
                found[name] = sum(line[key] for line in last) / len(last)
        if self._experts.state():
            found["dead_experts"] = len(self._dead())
        if self._work.stage.kind is Kind.TRAIN and "loss_after" in found:
            found["gain"] = found["loss_before"] - found["loss_after"]
        return found

    def _publish(self, phase: str, **measured: Any) -> None:
        self._work.publish(
            Progress(
                kind=self._work.stage.kind, phase=phase, step=self.step,
                steps=self._job.data.steps, tokens=self._tokens(), **measured,
            )
        )  # fmt: skip

    def _tokens(self) -> int:
        return self.step * self._job.recipe.batch_tokens

    def _pace(self) -> dict[str, float]:
        """Over the last steps, checkpoints included."""
        (begun, first), (now, step) = self._times[0], self._times[-1]
        if step == first:
            return {}
        seconds = (now - begun) / (step - first)
        left = self._job.data.steps - step
        return {
            "tokens_per_second": self._job.recipe.batch_tokens / seconds,
            "eta_seconds": left * seconds,
        }

    def _dead(self) -> list[str]:
        """`layer.expert` of each expert that is dead now."""
        return [
            f"{layer}.{expert}"
            for layer, row in enumerate(self._experts.state())
            for expert, steps in enumerate(row)
            if steps == self._window
        ]


def _put(work: Work, job: Job, history: Sequence[Mapping[str, Any]]) -> None:
    """Puts weights, config, tokenizer and history into the artifact.

    The weights are in the dtype of the input's, so that trained experts and their seed can be
    mixed; the config and the tokenizer are the input's own bytes.
    """
    folder = work.scratch / "model"
    main = job.compute.ranks.rank == 0
    save_model(job.model, folder, _stored_dtype(job.source), main=main)
    if not main:
        return
    for path in sorted(folder.iterdir()):
        if path.match("*.safetensors*"):
            work.out.add(path, path.name)
    for path in sorted(job.source.iterdir()):
        # Not the config that transformers writes: it adds defaults, which mix would compare.
        if path.name == "config.json":
            work.out.put(path.name, _config(path.read_bytes(), job.config))
        elif any(map(path.match, MODEL_FILES)) and not path.match("*.safetensors*"):
            work.out.add(path, path.name)
    lines = [json.dumps(line, separators=(",", ":")) + "\n" for line in history]
    work.out.put(HISTORY, "".join(lines).encode())


def _config(given: bytes, changed: Mapping[str, int]) -> bytes:
    config = json.loads(given)
    if config | changed == config:
        return given
    return json.dumps(config | changed, indent=2, sort_keys=True).encode()


def _stored_dtype(source: Path) -> torch.dtype:
    """Of the weights in a model's folder."""
    # Not the config's, which nothing holds to the truth.
    stored = open_checkpoint(LocalFolder(source), "model").tensors["model.embed_tokens.weight"]
    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[stored.dtype]
