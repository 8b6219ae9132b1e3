"""Where the tokens of one model went: the part of report.json about routing.

Pure; no torch. `routing_table` turns counts (tally.py) into a RoutingTable; called by scores.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from btx_api.spec import Model, Real
from pydantic import Field

DIGITS = 6
"""Decimals that report.json keeps; a hundred times finer than what is claimed of a loss."""
BINS = 20
"""Of a histogram: equal parts of 0 to 1, each without its upper end but the last."""

Layers = Sequence[Sequence[float]]
"""[layers][experts]"""


class Excerpt(Model):
    """The first held-out tokens of a domain, and where they went."""

    layers: tuple[int, ...]
    """The first, the middle and the last."""
    tokens: tuple[str, ...]
    """Text of each; U+FFFD where it is no whole character."""
    experts: tuple[tuple[int, ...], ...]
    """Per layer the index of each token's first expert, the one with the largest weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """How one model routed: counts, not shares yet."""

    k: int
    unit: Literal["slots", "weight"]
    counts: Mapping[str, Layers]
    """By domain: what each expert got of the unit."""
    histograms: Mapping[str, Sequence[Layers]] = field(default_factory=dict)
    """By domain: [layers][experts][BINS], tokens by their routing probability."""
    tasks: Mapping[str, Layers] = field(default_factory=dict)
    """By task, as `counts`."""
    excerpts: Mapping[str, Excerpt] = field(default_factory=dict)
    """By domain."""


class LayerLoad(Model):
    """How one layer's load is spread, mean over the domains, each weighing the same."""

    shares: tuple[Real, ...]
    """By expert."""
    entropy: Real
    """Of these shares, in nats; ln(number of experts) when all are loaded alike."""
    least: Real
    """Share of the least used expert."""
    most: Real
    """Share of the most used expert."""


class RoutingTable(Model):
    """Where the tokens of one model went, by its own routers; only tokens that predict count."""

    role: str
    """mixed or final."""
    method: str
    """Routing method (TopK, Soft)."""
    k: int
    """Experts per token."""
    unit: Literal["slots", "weight"]
    """What the shares are of: slots (a token has k); where every token goes to every expert, and
    slots would say nothing, the gate's weight."""
    experts: tuple[str, ...]
    """Names in the order of the expert index; the seed, if mixed in, is the last."""
    domains: dict[str, tuple[tuple[Real, ...], ...]]
    """By domain: [layer][expert], each layer's shares adding up to 1."""
    layers: tuple[LayerLoad, ...]
    distances: dict[str, tuple[Real, ...]] = Field(default_factory=dict)
    """By domain: [layer], total variation between the shares of this layer and those of the one
    before, half the sum of the absolute differences: 0 alike, 1 no expert in common. The first
    layer has 0."""
    histograms: tuple[tuple[tuple[Real, ...], ...], ...] = ()
    """[layer][expert][bin], shares of the tokens by their routing probability (the softmax over
    all experts), in 20 equal bins from 0 to 1; mean over the domains, each weighing the same."""
    tasks: dict[str, tuple[tuple[Real, ...], ...]] = Field(default_factory=dict)
    """By task, as `domains`: the tokens of each question and its right answer, no examples."""
    excerpts: dict[str, Excerpt] = Field(default_factory=dict)
    """By domain."""

    def over_layers(self, domain: str) -> list[float]:
        """Shares by expert of a domain or task, mean over the layers."""
        return mean_of({**self.tasks, **self.domains}[domain])

    @property
    def text(self) -> dict[str, tuple[tuple[Real, ...], ...]]:
        """Shares of domains, then of tasks."""
        return {**self.domains, **self.tasks}


def mean_of(rows: Layers) -> list[float]:
    """Mean of several rows."""
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def rounded(values: Sequence[float], digits: int = DIGITS) -> tuple[float, ...]:
    """As report.json keeps them."""
    return tuple(round(value, digits) for value in values)


def total_variation(one: Sequence[float], other: Sequence[float]) -> float:
    """Half the sum of the absolute differences of two distributions: 0 to 1."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2


def routing_table(role: str, method: str, slots: Slots, members: Sequence[str]) -> RoutingTable:
    """Shares and what follows from them; `members` are the mixed experts in their order."""
    domains = {name: _shares(layers) for name, layers in slots.counts.items()}
    loads = [_load(mean_of(layer)) for layer in zip(*domains.values(), strict=True)]
    experts = len(loads[0].shares)
    names = (*members, "seed") if experts == len(members) + 1 else tuple(members)
    return RoutingTable(
        role=role, method=method, k=slots.k, unit=slots.unit,
        experts=names if len(names) == experts else tuple(str(i) for i in range(experts)),
        domains={name: tuple(map(rounded, table)) for name, table in domains.items()},
        layers=tuple(loads),
        distances={
            name: rounded([0.0, *map(total_variation, table, table[1:])])
            for name, table in domains.items()
        },
        histograms=tuple(
            tuple(rounded(mean_of(_shares(bins)), 5) for bins in zip(*layer, strict=True))
            for layer in zip(*slots.histograms.values(), strict=True)
        ),
        tasks={name: tuple(map(rounded, _shares(table))) for name, table in slots.tasks.items()},
        excerpts=dict(slots.excerpts),
    )  # fmt: skip


def _shares(rows: Layers) -> list[list[float]]:
    return [[count / sum(row) for count in row] for row in rows]


def _load(shares: Sequence[float]) -> LayerLoad:
    return LayerLoad(
        shares=rounded(shares),
        entropy=round(-sum(s * math.log(s) for s in shares if s), DIGITS),
        least=round(min(shares), DIGITS),
        most=round(max(shares), DIGITS),
    )
