"""How tokens choose experts: one class per routing rule, and what is measured and trained on it.

Stock MoE blocks stay as they are: `install` gives their routers a subclass that runs the rule.
Called by finetune (rule, balancing loss, dead experts, router init) and evaluate (routing shares).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from btx_api.spec import Routing, RoutingMethod
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from btx_trainer.distributed import fill, forward
from btx_trainer.errors import ConfigurationError
from btx_trainer.model import forward_hidden

EXPORTED: Mapping[str, Mapping[str, int]] = {
    "mixtral": {},
    "granitemoe": {},
    "qwen2_moe": {"norm_topk_prob": True},
    "qwen3_moe": {"norm_topk_prob": True},
    "flex_olmo": {"norm_topk_prob": True},
}
"""Architectures (`model_type`) whose stock router can weigh the top k by their softmax, and how."""
_BY_LOGITS = frozenset({"granitemoe"})
"""Those whose stock router takes the top k of the logits, not of their softmax."""
_STOCK_ROUTERS = frozenset({
    "MixtralTopKRouter", "GraniteMoeTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter",
    "FlexOlmoTopKRouter",
})  # fmt: skip
"""By name: importing five architectures to run one takes time."""

Batch = tuple[Tensor, Tensor]
"""input_ids and position_ids, both [sequences, length]."""


class Gates(NamedTuple):
    """The experts of every token and their weights, largest first; both [tokens, k]."""

    weights: Tensor
    experts: Tensor


class Rule(Protocol):
    """One routing rule. `logits` are fp32, [tokens, experts]; all results keep their gradient."""

    @property
    def num_experts(self) -> int:
        """How many experts there are to choose from."""

    def gate(self, logits: Tensor, step: Tensor) -> Gates:
        """Training's choice at optimizer step `step` ([], int64)."""

    def infer(self, logits: Tensor) -> Gates:
        """Inference's choice."""

    def export(self, family: str) -> dict[str, int] | str:
        """The fields of the stock config (`model_type` = family), or why there are none."""


@dataclass(frozen=True)
class TopK:
    """Softmax over the k largest logits: the default of BTX (paper section 3.2) and of Mixtral.

    Equal to a softmax over all experts renormalised over the k kept.
    Raises ConfigurationError on a k that cannot be.
    """

    num_experts: int
    k: int
    by_logits: bool = False
    """Compare logits, not probabilities: where rounding ties two, take the one that stock takes."""

    def __post_init__(self) -> None:
        if self.k == 1:
            raise ConfigurationError(
                "finetune.routing.k",
                "1 with TopK gives the router no gradient; use method Switch or SampleTop1",
            )
        if self.k > self.num_experts:
            raise ConfigurationError(
                "finetune.routing.k", f"{self.k} is more than the {self.num_experts} experts"
            )

    def gate(self, logits: Tensor, step: Tensor) -> Gates:
        return self.infer(logits)

    def infer(self, logits: Tensor) -> Gates:
        scores = logits if self.by_logits else logits.softmax(-1)
        experts = scores.topk(self.k, dim=-1).indices
        # Weighed by the kept logits: the others get a gradient of exactly 0, which rounding
        # would make noise that Adam blows up to full steps.
        return Gates(logits.gather(-1, experts).softmax(-1), experts)

    def export(self, family: str) -> dict[str, int] | str:
        if family in EXPORTED:
            return {"num_experts_per_tok": self.k, **EXPORTED[family]}
        return f"{family} has no stock router that renormalises over the top k"


class Soft(TopK):
    """Every token goes to every expert, weighed by the full softmax: TopK with k = N."""

    def __init__(self, num_experts: int) -> None:
        object.__setattr__(self, "num_experts", num_experts)
        object.__setattr__(self, "k", num_experts)


def rule_for(routing: Routing, num_experts: int, family: str) -> Rule:
    """The rule of a finetune recipe for a target (`model_type`).

    Raises ConfigurationError naming the field that cannot be.
    """
    if routing.method is RoutingMethod.SOFT:
        return Soft(num_experts)
    assert routing.method is RoutingMethod.TOP_K, "the spec refuses methods that are not served"
    return TopK(num_experts, routing.k, by_logits=family in _BY_LOGITS)


class LayerRouting(NamedTuple):
    """What one router did in one forward pass; weights and probabilities carry gradients."""

    weights: Tensor  # [tokens, k]
    experts: Tensor  # [tokens, k]
    probabilities: Tensor  # [tokens, experts], the softmax over all of them


class RuledRouter(nn.Module):
    """A router with a rule for its own top-k, in fp32 whatever the model's dtype.

    Beside the stock router in the bases of what `install` makes of it: all of them take [tokens,
    hidden] and return logits, weights and experts.
    """

    weight: Tensor
    rule: Rule
    step: Tensor
    recording: bool
    stash: LayerRouting | None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden.float(), self.weight.float())
            rule = self.rule
            gates = rule.gate(logits, self.step) if self.training else rule.infer(logits)
            # Not inside the `if`: a checkpoint must save as much when it recomputes.
            probabilities = logits.softmax(-1)
        if self.recording:
            self.stash = LayerRouting(*gates, probabilities)
        return logits, *gates


@cache
def _ruled(stock: type[nn.Module]) -> type[nn.Module]:
    return type(f"Ruled{stock.__name__}", (RuledRouter, stock), {})


def _stock_routers(model: nn.Module) -> list[Any]:
    return [
        module
        for module in model.modules()
        if any(kind.__name__ in _STOCK_ROUTERS for kind in type(module).__mro__)
    ]


def count_experts(model: nn.Module) -> int:
    """How many experts each layer has; 0 if there is no router that can take a rule."""
    return next((int(router.num_experts) for router in _stock_routers(model)), 0)


def routers(model: nn.Module) -> list[RuledRouter]:
    """The routers of a model with a rule installed, first layer first."""
    return [module for module in model.modules() if isinstance(module, RuledRouter)]


def install(model: PreTrainedModel, rule: Rule) -> None:
    """Gives every stock router of a model the rule; config and stock routers follow if they can.

    Do it before sharding or compiling. Parameters and their names stay.
    Raises ConfigurationError when the model has no such router.
    """
    gates = _stock_routers(model)
    if not gates:
        raise ConfigurationError(
            model.config.model_type, "this architecture has no router that can take a routing rule"
        )
    fields = rule.export(model.config.model_type)
    for gate in gates:
        assert gate.num_experts == rule.num_experts, "the rule is for another number of experts"
        if not isinstance(gate, RuledRouter):
            stock: Any = type(gate)
            gate.__class__ = _ruled(stock)
        # A tensor: a changing Python number would compile the model anew at each step.
        gate.register_buffer(
            "step", torch.zeros((), dtype=torch.int64, device=gate.weight.device), persistent=False
        )
        gate.rule, gate.recording, gate.stash = rule, False, None
        if isinstance(fields, dict):
            gate.top_k = fields["num_experts_per_tok"]
            if "norm_topk_prob" in fields:
                gate.norm_topk_prob = True
    if isinstance(fields, dict):
        model.config.update(fields)


def remove(model: PreTrainedModel) -> None:
    """Undoes `install`: stock routers, with the exported rule's top-k."""
    for gate in routers(model):
        del gate.rule, gate.step, gate.recording, gate.stash
        gate.__class__ = type(gate).__bases__[1]


@contextmanager
def record(model: nn.Module, step: int = 0) -> Iterator[list[LayerRouting]]:
    """Runs forward passes at optimizer step `step`; the list is filled, by layer, at the end.

    It holds the last forward pass inside the block. Do the backward pass outside: a checkpointed
    layer recomputed inside would stash again, and keep the activations it was to save.
    Compile blocks outside of their checkpoint, not inside, and set
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint to avoid a graph break.
    """
    layers: list[LayerRouting] = []
    gates = routers(model)
    for gate in gates:
        gate.step.fill_(step)
        gate.recording = True
    try:
        yield layers
    finally:
        for gate in gates:
            if gate.stash is not None:
                layers.append(gate.stash)
            gate.recording, gate.stash = False, None


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceTerms:
    """Sums over tokens that the balancing loss is made of; those of parts of a batch add up."""

    sum_u: Tensor
    """[layers, experts]: gate weights after top-k, not hard counts (BTX paper section 3.3)."""
    sum_p: Tensor
    """[layers, experts]: softmax over all experts."""
    count: Tensor
    """[]: tokens, padding left out."""

    def __add__(self, other: "BalanceTerms") -> "BalanceTerms":
        return BalanceTerms(
            sum_u=self.sum_u + other.sum_u,
            sum_p=self.sum_p + other.sum_p,
            count=self.count + other.count,
        )

    def all_reduced(self, all_reduce: Callable[[Tensor], object] | None = None) -> "BalanceTerms":
        """Constants without gradient, summed over ranks by one call (in place) of `all_reduce`."""
        size = self.sum_u.numel()
        flat = torch.cat([self.sum_u.flatten(), self.sum_p.flatten(), self.count[None]]).detach()
        if all_reduce:
            all_reduce(flat)
        return BalanceTerms(
            sum_u=flat[:size].view_as(self.sum_u),
            sum_p=flat[size:-1].view_as(self.sum_p),
            count=flat[-1],
        )


def balance_terms(layers: Sequence[LayerRouting], mask: Tensor | None = None) -> BalanceTerms:
    """The terms of one recorded forward pass; `mask` (bool or weights) has one entry per token."""
    probabilities = torch.stack([layer.probabilities for layer in layers])
    weights = torch.stack([layer.weights for layer in layers])
    experts = torch.stack([layer.experts for layer in layers])
    gates = torch.zeros_like(probabilities).scatter(-1, experts, weights)
    tokens = probabilities.new_ones(probabilities.shape[1]) if mask is None else mask.flatten()
    tokens = tokens.to(probabilities.dtype)
    # Not a matrix product, which autocast and TF32 would round.
    return BalanceTerms(
        sum_u=(gates * tokens[:, None]).sum(1),
        sum_p=(probabilities * tokens[:, None]).sum(1),
        count=tokens.sum(),
    )


def balancing_loss(terms: BalanceTerms, alpha: float) -> Tensor:
    """alpha * N * sum_i u_i p_i, summed over layers: alpha per layer at perfect balance."""
    num_experts = terms.sum_u.shape[-1]
    return alpha * num_experts * (terms.sum_u * terms.sum_p).sum() / terms.count.square()


def balancing_share(part: BalanceTerms, whole: BalanceTerms, alpha: float) -> Tensor:
    """One micro-batch's share of the whole batch's balancing loss, exact in value and gradient.

    The loss is a product of means U and P over the batch of all micro-batches and ranks, so its
    gradient is alpha * N * sum_i (P_i dU_i + U_i dP_i), and dU, dP are sums over micro-batches.
    With `whole` constant (`all_reduced` terms of a pass without gradient; with one micro-batch
    those of `part`), this is linear in `part`: shares and gradients sum to the whole's.
    """
    u, p = whole.sum_u / whole.count, whole.sum_p / whole.count
    own = p * part.sum_u + u * part.sum_p - u * p * part.count
    return alpha * u.shape[-1] * own.sum() / whole.count


def slot_counts(
    layers: Sequence[LayerRouting], groups: Tensor | None = None, num_groups: int = 1
) -> Tensor:
    """Assignments of tokens to experts, int64 [groups, layers, experts]; a token has k of them.

    `groups` holds one group per token (its domain, say); tokens of group -1 are left out.
    """
    counts = []
    for layer in layers:
        tokens, num_experts = layer.probabilities.shape
        group = layer.experts.new_zeros(tokens) if groups is None else groups.flatten()
        slots = (group[:, None] + 1) * num_experts + layer.experts
        total = slots.new_zeros((num_groups + 1) * num_experts)
        total.index_add_(0, slots.flatten(), torch.ones_like(slots).flatten())
        counts.append(total.view(num_groups + 1, num_experts)[1:])
    return torch.stack(counts, dim=1)


def shares(counts: Tensor) -> Tensor:
    """Each expert's share of its layer's slots, fp64; 0 where there are no tokens."""
    return counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)


class ExpertEvent(NamedTuple):
    """An expert died or came back."""

    step: int
    layer: int
    expert: int
    dead: bool


class DeadExperts:
    """Finds experts that get next to nothing, in any layer, for `window` steps in a row.

    Next to nothing is a tenth of an even load: 0.1 k / N of the tokens, so 0.1 / N of the slots.
    An expert has come back at its first step above that.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._below: list[list[int]] = []  # by layer and expert: steps in a row, up to the window

    def update(self, step: int, load: Sequence[Sequence[float]]) -> list[ExpertEvent]:
        """Takes one step's `shares`, by layer and expert; returns who died or came back by it."""
        if not self._below:
            self._below = [[0] * len(layer) for layer in load]
        events = []
        for layer, row in enumerate(load):
            for expert, share in enumerate(row):
                before = self._below[layer][expert]
                after = min(before + 1, self._window) if share < 0.1 / len(row) else 0
                self._below[layer][expert] = after
                if (dead := after == self._window) != (before == self._window):
                    events.append(ExpertEvent(step, layer, expert, dead))
        return events

    def state(self) -> list[list[int]]:
        """JSON-ready, for the checkpoint."""
        return [list(row) for row in self._below]

    def restore(self, state: list[list[int]]) -> None:
        """Takes what `state` gave."""
        self._below = [[min(steps, self._window) for steps in row] for row in state]


@dataclass(frozen=True)
class _Always:
    """Every token to one expert: what the router init's forward passes run on."""

    num_experts: int
    expert: int

    def gate(self, logits: Tensor, step: Tensor) -> Gates:
        return self.infer(logits)

    def infer(self, logits: Tensor) -> Gates:
        one = logits.new_ones(logits.shape[0], 1)
        return Gates(one, torch.full_like(one, self.expert, dtype=torch.int64))

    def export(self, family: str) -> dict[str, int] | str:
        return "no stock router ignores its logits"


def _router_inputs(model: PreTrainedModel, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Means over tokens of the vector x that enters each router [layers, hidden], and of |x|^2."""
    gates = routers(model)
    sums = torch.zeros(
        len(gates), gates[0].weight.shape[-1], dtype=torch.float64, device=gates[0].weight.device
    )
    squares = sums.new_zeros(len(gates))
    tokens = 0

    def take(layer: int, args: tuple[Tensor, ...]) -> None:
        sums[layer] += args[0].sum(0, dtype=torch.float64)
        squares[layer] += args[0].float().square().sum(dtype=torch.float64)

    hooks = [
        gate.register_forward_pre_hook(lambda _, args, layer=layer: take(layer, args))
        for layer, gate in enumerate(gates)
    ]
    for input_ids, position_ids in batches:
        forward(model, forward_hidden, input_ids, position_ids)
        tokens += input_ids.numel()
    for hook in hooks:
        hook.remove()
    return sums / tokens, squares / tokens


@torch.no_grad()
def init_domain_mean(
    model: PreTrainedModel, domains: Iterable[tuple[int, Iterable[Batch]]]
) -> None:
    """Points each router row at its expert's domain; a rule must be installed.

    `domains` pairs an expert's index with batches of its data; one forward pass each, every
    token through that expert, so the router's old weights play no part. An expert without data
    gets a row of zeros (the mean of all domains). Raises ConfigurationError below two domains.

    As in mergekit's hidden-state gates, a row is the direction of its mean away from the others,
    at unit length; but of the vector that the router really reads, after the norm. From it we
    take the part along the mean of all domains, which is an offset that would favour one expert
    everywhere for want of a bias: so the mean token of each domain has its own expert on top.
    Dividing by the RMS of that vector's entries makes logits of order 1 whatever the norm's scale.
    """
    gates = routers(model)
    old = [gate.rule for gate in gates]
    means: dict[int, Tensor] = {}
    squares = []
    for expert, batches in domains:
        for gate in gates:
            gate.rule = _Always(gate.rule.num_experts, expert)
        means[expert], square = _router_inputs(model, batches)
        squares.append(square)
    for gate, rule in zip(gates, old, strict=True):
        gate.rule = rule
    if len(means) <= 1:
        raise ConfigurationError(
            "finetune.routing.init", "DomainMean needs the data of at least two experts"
        )
    away = torch.stack(list(means.values()))  # [domains, layers, hidden]
    centre = away.mean(0)
    away = away - centre
    centre = F.normalize(centre, dim=-1)
    away = away - (away * centre).sum(-1, keepdim=True) * centre
    rms = (torch.stack(squares).mean(0) / away.shape[-1]).sqrt()
    rows = F.normalize(away, dim=-1) / rms[:, None]
    for layer, gate in enumerate(gates):
        weight = rows.new_zeros(gate.weight.shape)
        weight[list(means)] = rows[:, layer]
        fill(gate.weight, weight)
