"""What a stage costs by formula: tokens, steps, FLOPs; and how fast such work went; pure.

Called by views.py and cli.py for `btx plan`.

Counted as torch counts them (FlopCounterMode, tests/trainer/test_plan_flops.py): two per multiplied
weight and token, attention over the full square, 4 L H T forward and 10 L H T backward, since its
kernels compute the scores a second time. All before the loss head runs forward once more where the
balancing loss of a batch in several micro-batches needs its means first. N, L, H, T: parameters
that are multiplied (of an MoE: the active ones), layers, heads x head size, sequence length.
Held-out data counts as full rows, as many as the recipe allows.
Not counted: norms, softmax, gates, the optimizer.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from btx_api.methods import Graph, graph
from btx_api.spec import BTXRunSpec, DataInit, Scheduling, Trainable
from btx_api.stage import (
    MICRO_BATCH_TOKENS,
    RECIPES,
    ROUTER_TOKENS,
    VERSIONS,
    EvaluateRecipe,
    FinetuneRecipe,
    Kind,
    Parameters,
    Stage,
    TrainRecipe,
)
from btx_api.status import State, Status

from btx_operator.attempts import scheduling_of

SPARSE_ROLES = ("mixed", "final")
MEASURED_SECONDS = 10
"""A row counts whole seconds: a shorter stage says too little of a rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of one stage; all 0 for stages that run no model."""

    tokens: int = 0
    """Trained on, whole steps."""
    steps: int = 0
    flops: float = 0.0
    """At most: held-out data may be shorter than the recipe allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Forward:
    """FLOPs of one token's forward pass, by part."""

    body: int
    """Every matrix of the layers, routers too."""
    experts: int
    """Of `body`: those of the experts that the token uses."""
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.body + self.attention + self.head


def cost(stage: Stage, parameters: Parameters, scheduling: Scheduling) -> Cost:
    """Tokens, steps and FLOPs of one stage over all its attempts, none of it lost."""
    recipe = RECIPES[stage.kind].parse(stage.recipe)
    if isinstance(recipe, EvaluateRecipe):
        return _evaluate(recipe, parameters)
    if not isinstance(recipe, TrainRecipe | FinetuneRecipe):
        return Cost()
    steps = sum(-(-phase.tokens // recipe.batch_tokens) for phase in recipe.data)
    tokens = steps * recipe.batch_tokens
    if isinstance(recipe, FinetuneRecipe):
        one = _forward(parameters, recipe.sequence_length, sparse=True)
        step = _step(one, recipe.trainable, parameters.layers) + _means_first(
            recipe, one, scheduling
        )
        start = _router_start(recipe, parameters)
    else:
        one = _forward(parameters, recipe.sequence_length, sparse=False)
        step, start = _step(one, Trainable.ALL, parameters.layers), 0
    domains = {name for phase in recipe.data for name, weight in phase.domains.items() if weight}
    measured = (3 if start else 2) * len(domains) * recipe.held_out_tokens
    flops = tokens * step + measured * one.total + start
    return Cost(tokens=tokens, steps=steps, flops=float(flops))


def forward_flops(parameters: Parameters, sequence_length: int, *, sparse: bool) -> int:
    """FLOPs of one token's forward pass through the seed, or (`sparse`) the mixed model."""
    return _forward(parameters, sequence_length, sparse=sparse).total


def _forward(p: Parameters, sequence_length: int, *, sparse: bool) -> _Forward:
    multiplied = (p.active if sparse else p.dense) - p.head
    return _Forward(
        body=2 * (multiplied - p.embedding), experts=2 * p.experts if sparse else 0,
        attention=4 * p.layers * p.hidden * sequence_length, head=2 * p.embedding,
    )  # fmt: skip


def _step(one: _Forward, trainable: Trainable, layers: int) -> float:
    """Of one token's forward and backward pass."""
    if trainable is Trainable.ROUTER:
        # No weight has a gradient, and nothing before the first router passes one on.
        behind = (layers - 1) / layers if layers else 1
        return 2 * one.head + one.body * (1 + behind) + one.attention * (1 + 2.5 * behind)
    frozen = one.experts if trainable is Trainable.ALL_BUT_EXPERTS else 0
    return 3 * (one.head + one.body) + 3.5 * one.attention - frozen


def _means_first(recipe: FinetuneRecipe, one: _Forward, scheduling: Scheduling) -> int:
    """Of one token in the pass without gradient that the balancing loss needs."""
    micro_batch = scheduling.micro_batch or max(1, MICRO_BATCH_TOKENS // recipe.sequence_length)
    alone = recipe.batch_tokens <= micro_batch * recipe.sequence_length
    return 0 if alone or not recipe.routing.alpha else one.body + one.attention


def _router_start(recipe: FinetuneRecipe, parameters: Parameters) -> int:
    """The forward passes behind a router's start from data, each with one expert per token."""
    if recipe.routing.init is not DataInit.DOMAIN_MEAN:
        return 0
    length = recipe.sequence_length
    tokens = max(1, min(ROUTER_TOKENS, recipe.batch_tokens) // length) * length
    dense = _forward(parameters, length, sparse=False)
    return sum(map(bool, recipe.experts)) * tokens * (dense.body + dense.attention)


def _evaluate(recipe: EvaluateRecipe, parameters: Parameters) -> Cost:
    per_token = sum(
        forward_flops(parameters, recipe.sequence_length, sparse=model.role in SPARSE_ROLES)
        for model in recipe.models
    )
    return Cost(flops=float(per_token * recipe.tokens * len(recipe.columns)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """How fast stages of a kind run."""

    flops_per_second: float
    """Of one GPU, or of one process without."""
    source: str
    """Where the number comes from, for a person."""

    def hours(self, flops: float) -> float:
        """Of one GPU (or process) for so much work."""
        return flops / self.flops_per_second / 3600


class PastRun(Protocol):
    """What is known of a run of this machine (local.SavedRun)."""

    @property
    def name(self) -> str: ...
    @property
    def uid(self) -> str: ...
    @property
    def created(self) -> float: ...
    @property
    def spec(self) -> BTXRunSpec: ...
    @property
    def status(self) -> Status: ...


def measured_rates(runs: Iterable[PastRun]) -> dict[Kind, Rate]:
    """By kind: the FLOPs of the latest run's longest stage by the time of all its attempts."""
    rates: dict[Kind, Rate] = {}
    for run in sorted(runs, key=lambda run: run.created):
        best: dict[Kind, int] = {}
        for kind, seconds, rate in _measured(run):
            if seconds > best.get(kind, 0):
                best[kind], rates[kind] = seconds, rate
    return rates


def _measured(run: PastRun) -> Iterator[tuple[Kind, int, Rate]]:
    """Kind, seconds and rate of every complete stage that took long enough to tell."""
    resolved, nodes = run.status.resolved, Graph()
    if resolved is not None:
        versions = run.status.release.kinds if run.status.release else VERSIONS
        # An edit that is not accepted yet may ask for other inputs than those resolved.
        with suppress(ValueError):
            nodes = graph(run.spec, resolved, run.status.members, versions=versions, uid=run.uid)
    for row in run.status.stages:
        node = nodes.get(row.name)
        if node is None or resolved is None or node.stage.digest != row.digest:
            continue
        flops = cost(node.stage, resolved.parameters, scheduling_of(run.spec, row.name)).flops
        if row.state is State.COMPLETE and row.seconds >= MEASURED_SECONDS and flops:
            source = f"{row.name} of run {run.name!r} on this machine, {row.seconds} s"
            yield row.kind, row.seconds, Rate(flops_per_second=flops / row.seconds, source=source)


def longest_chain(nodes: Graph, weight: Mapping[str, float]) -> list[str]:
    """The stages, first to last, that cannot run side by side and weigh most together."""
    ends: dict[str, tuple[float, list[str]]] = {}
    for name, node in nodes.items():
        before = max((ends[need] for need in node.needs), default=(0.0, []))
        ends[name] = (before[0] + weight[name], [*before[1], name])
    return max(ends.values(), default=(0.0, []))[1]
