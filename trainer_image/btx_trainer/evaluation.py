"""Measures one model on the held-out text of every domain, and where its routers send it.

The same batches for every model, whatever runs beside it; nats are added up in fp64. Called by
stages/evaluate.py, one model after the other, so that one is in memory at a time.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from btx_api.spec import Precision, Routing, RoutingMethod
from btx_api.stage import Progress
from torch import Tensor
from transformers import PreTrainedModel

from btx_trainer import routing
from btx_trainer.data import Batch, held_out_batches
from btx_trainer.distributed import Compute
from btx_trainer.errors import PreemptedError, TrainerError
from btx_trainer.model import IGNORED, chunked_cross_entropy, forward_hidden, load_model
from btx_trainer.scores import Measured, Slots, Sums
from btx_trainer.shards import Prepared
from btx_trainer.work import Work

BATCH_TOKENS = 8192
"""Of a forward pass, unless scheduling says how many sequences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How every model is measured."""

    domains: Mapping[str, Prepared]
    """By name; each has held-out text."""
    sequence_length: int
    tokens: int
    """At most so many targets per domain."""
    routing: str
    """Method of the Mixtures-of-Experts; k is in their config."""
    compute: Compute
    batch_size: int
    """Sequences per forward pass."""


class Watch:
    """Publishes how far the evaluation is, and stops it when asked to."""

    def __init__(self, work: Work, plan: Plan, models: int) -> None:
        held_out = (domain.index.held_out for domain in plan.domains.values())
        # A document's first token is not predicted.
        self._all = models * sum(min(plan.tokens, h.tokens - h.documents) for h in held_out)
        self._work, self._done, self._started = work, 0, time.monotonic()

    def phase(self, phase: str) -> None:
        """What comes now. Raises PreemptedError when asked to stop."""
        if self._work.stopping():
            raise PreemptedError("", "asked to stop; an evaluation starts afresh")
        speed = self._done / max(time.monotonic() - self._started, 1e-9)
        self._work.publish(
            Progress(
                phase=phase, step=self._done, steps=self._all, tokens=self._done,
                tokens_per_second=speed,
                eta_seconds=(self._all - self._done) / speed if speed else None,
            )
        )  # fmt: skip

    def done(self, targets: int) -> None:
        """One more batch."""
        self._done += targets
        self.phase("evaluating")


@torch.no_grad()
def measure(folder: Path, plan: Plan, watch: Watch) -> Measured:
    """Loads the model and measures it.

    Weights are loaded in the compute dtype: a model that fits its GPU in bf16 need not in fp32.
    Raises ConfigurationError if it cannot be loaded, TrainerError if a loss is not finite,
    PreemptedError when asked to stop.
    """
    watch.phase("loading")
    dtype = torch.bfloat16 if plan.compute.precision is Precision.BF16 else torch.float32
    model = load_model(folder, dtype).to(plan.compute.device)
    experts = getattr(model.config, "num_local_experts", 0)
    if experts:
        method, k = RoutingMethod(plan.routing), model.config.num_experts_per_tok
        routing.install(model, routing.rule_for(Routing(method=method, k=k), experts))
    watch.phase("evaluating")
    sums, counts = {}, {}
    for name, prepared in plan.domains.items():
        sums[name], counts[name] = _domain(model, prepared, plan, watch)
        if not math.isfinite(sums[name].loss):
            raise TrainerError(str(folder), f"its loss on {name} is not finite")
    total, active = _parameters(model)
    slots = None
    if experts:
        # `install` has put the rule's own k into the config.
        k = model.config.num_experts_per_tok
        slots = Slots(k=k, unit="weight" if k == experts else "slots", counts=counts)
    return Measured(sums=sums, parameters=total, active=active, slots=slots)


def _domain(
    model: PreTrainedModel, prepared: Prepared, plan: Plan, watch: Watch
) -> tuple[Sums, list[list[float]]]:
    """The sums, and the load of every expert by layer."""
    nats, targets, size, load = 0.0, 0, 0.0, torch.zeros(())
    for batch in held_out_batches(
        prepared, sequence_length=plan.sequence_length, max_tokens=plan.tokens,
        batch_size=plan.batch_size,
    ):  # fmt: skip
        loss, found, shares = _forward(model, batch, plan.compute)
        nats, targets, size = nats + loss, targets + found, size + batch.target_bytes
        load = load + shares
        watch.done(found)
    return Sums(loss=nats, tokens=targets, bytes=size), load.tolist()


def _forward(model: PreTrainedModel, batch: Batch, compute: Compute) -> tuple[float, int, Tensor]:
    """Nats, targets, and per layer and expert the load by positions with a target."""
    ids, positions, labels = map(
        compute.tensor, (batch.input_ids, batch.position_ids, batch.labels)
    )
    with routing.record(model) as layers:
        hidden = forward_hidden(model, ids, positions)
    head = model.get_output_embeddings().weight
    loss, targets = chunked_cross_entropy(hidden, head, labels)
    counts = torch.zeros(())
    if layers:
        predicts = labels != IGNORED
        if layers[0].experts.shape[-1] == layers[0].probabilities.shape[-1]:
            counts = routing.balance_terms(layers, predicts).sum_u.double().cpu()
        else:
            groups = torch.where(predicts, 0, -1)
            counts = routing.slot_counts(layers, groups)[0].cpu()
    return loss.item(), int(targets), counts


def _parameters(model: PreTrainedModel) -> tuple[int, int]:
    """All parameters (tied ones once), and those that one token uses."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    if not experts:
        return total, total
    config = model.config
    used = experts // config.num_local_experts * config.num_experts_per_tok
    return total, total - experts + used
