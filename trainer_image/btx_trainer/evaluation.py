"""Measures one model on the held-out text of every domain and on every task, and where its routers
send them.

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
from transformers import PreTrainedModel

from btx_trainer import routing
from btx_trainer.analysis import Excerpt, Slots
from btx_trainer.answers import Desk, answer
from btx_trainer.data import held_out_batches
from btx_trainer.distributed import Compute
from btx_trainer.errors import DivergedError, PreemptedError
from btx_trainer.model import (
    IGNORED,
    chunked_cross_entropy,
    forward_hidden,
    is_expert,
    load_model,
)
from btx_trainer.scores import Measured, Sums
from btx_trainer.shards import Prepared
from btx_trainer.tally import Tally, excerpt
from btx_trainer.tasks import Questions
from btx_trainer.tokenizer import Tokenizer
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
    tokenizer: Tokenizer
    """Of the domains."""
    tasks: tuple[Questions, ...] = ()


class Watch:
    """Publishes how far the evaluation is, and stops it when asked to."""

    def __init__(self, work: Work, plan: Plan, models: int) -> None:
        held_out = (domain.index.held_out for domain in plan.domains.values())
        # A document's first token is not predicted.
        targets = sum(min(plan.tokens, h.tokens - h.documents) for h in held_out)
        self._all = models * (targets + sum(task.effort for task in plan.tasks))
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
    Raises ConfigurationError if it cannot be loaded, DivergedError if a loss is not finite,
    PreemptedError when asked to stop.
    """
    watch.phase("loading")
    dtype = torch.bfloat16 if plan.compute.precision is Precision.BF16 else torch.float32
    model = load_model(folder, dtype).to(plan.compute.device)
    experts = routing.count_experts(model)
    if experts:
        asked = Routing(method=RoutingMethod(plan.routing), k=model.config.num_experts_per_tok)
        rule = routing.rule_for(asked, experts, model.config.model_type)
        routing.install(model, rule)
    watch.phase("evaluating")
    sums, tallies, excerpts = {}, {}, {}
    for name, prepared in plan.domains.items():
        sums[name], tallies[name], excerpts[name] = _domain(model, prepared, plan, watch)
        if not math.isfinite(sums[name].loss):
            raise DivergedError(str(folder), f"its loss on {name} is not finite")
    desk = Desk(
        tokenizer=plan.tokenizer, device=plan.compute.device, room=plan.sequence_length,
        batch_tokens=plan.batch_size * plan.sequence_length, done=watch.done,
    )  # fmt: skip
    answered = {task.shape.name: answer(model, task, desk) for task in plan.tasks}
    total, active = _parameters(model)
    slots = None
    if experts:
        # `install` has put the rule's own k into the config.
        k = model.config.num_experts_per_tok
        slots = Slots(
            k=k, unit="weight" if k == experts else "slots",
            counts={name: tally.load.tolist() for name, tally in tallies.items()},
            histograms={name: tally.histogram.tolist() for name, tally in tallies.items()},
            tasks={name: tally.load.tolist() for name, (_, tally) in answered.items()},
            excerpts={name: shown for name, shown in excerpts.items() if shown},
        )  # fmt: skip
    return Measured(
        sums=sums, parameters=total, active=active, slots=slots,
        tasks={name: found for name, (found, _) in answered.items()},
    )  # fmt: skip


def _domain(
    model: PreTrainedModel, prepared: Prepared, plan: Plan, watch: Watch
) -> tuple[Sums, Tally, Excerpt | None]:
    """The sums, and of a Mixture-of-Experts where the tokens with a target went."""
    nats, targets, size, tally, shown = 0.0, 0, 0.0, Tally(), None
    for batch in held_out_batches(
        prepared, sequence_length=plan.sequence_length, max_tokens=plan.tokens,
        batch_size=plan.batch_size,
    ):  # fmt: skip
        ids, positions, labels = map(
            plan.compute.tensor, (batch.input_ids, batch.position_ids, batch.labels)
        )
        with routing.record(model) as layers:
            hidden = forward_hidden(model, ids, positions)
        head = model.get_output_embeddings().weight
        loss, found = chunked_cross_entropy(hidden, head, labels)
        nats, targets, size = nats + loss.item(), targets + int(found), size + batch.target_bytes
        predicts = labels != IGNORED
        tally.add(layers, predicts)
        if layers and not shown:
            shown = excerpt(layers, ids, predicts, plan.tokenizer.decode)
        watch.done(int(found))
    return Sums(loss=nats, tokens=targets, bytes=size), tally, shown


def _parameters(model: PreTrainedModel) -> tuple[int, int]:
    """All parameters (tied ones once), and those that one token uses."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if is_expert(name))
    if not experts:
        return total, total
    used = experts // routing.count_experts(model) * model.config.num_experts_per_tok
    return total, total - experts + used
