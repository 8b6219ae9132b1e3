"""report.json: what an evaluation found, as one value; everything else of a report is made from it.

Pure. `tabulate` turns sums into the Report (called by stages/evaluate.py); report.py, sentences.py
and figures.py read it. Labels come from the recipe only, so a run's name changes no byte.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from btx_api.spec import Method, Model, Real
from btx_api.stage import EvaluatedModel, EvaluateRecipe

DIGITS = 6
"""Decimals that report.json keeps; a hundred times finer than what is claimed of a loss."""
CURVE_POINTS = 400
"""At most so many points of a training history."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """One model over one domain: what a mean is made of. `loss` in nats."""

    loss: float
    tokens: int
    bytes: float
    """Of text; a share of them where a document is cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """How one model routed."""

    k: int
    unit: Literal["slots", "weight"]
    counts: Mapping[str, Sequence[Sequence[float]]]
    """By domain: [layers][experts], what each expert got of the unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One model, measured."""

    sums: Mapping[str, Sums]
    """By domain; the same domains, tokens and bytes for every model."""
    parameters: int
    active: int
    """Parameters that one token uses."""
    slots: Slots | None = None
    """Of a Mixture-of-Experts."""


class Score(Model):
    """One model on one domain."""

    loss: Real
    """Held-out cross-entropy, nats per token."""
    perplexity: Real
    """exp(loss)."""
    bits_per_byte: Real
    """Nats in all / ln 2 / bytes of the text predicted; comparable across tokenizers."""
    versus_seed: Real
    """loss minus the seed's: below 0 the model gained on the domain, above 0 it forgot."""
    gap_closed: Real | None = None
    """(seed - model) / (seed - expert of this domain): 0 like the seed, 1 like the expert. None
    where no expert has this domain, or its expert is no better than the seed by 0.0005."""


class Row(Model):
    """One model of the table."""

    label: str
    """An expert's name, or the role."""
    role: str
    """seed, expert, soup, mixed (before finetuning), final or dense."""
    origin: str = ""
    """`<kind>/<digest>` of the artifact, or `content/<fingerprint>` of a model from outside."""
    parameters: int
    """All parameters; tied ones count once."""
    active_parameters: int
    """Those that one token uses; equal to `parameters` for a dense model."""
    scores: dict[str, Score]
    """By domain."""
    mean_loss: Real
    """Mean of the losses over the domains, each domain weighing the same."""
    mean_bits_per_byte: Real
    """Likewise of the bits per byte."""

    @property
    def title(self) -> str:
        """Name in tables and sentences."""
        return f"{self.label} expert" if self.role == "expert" else self.role

    def mean(self, domains: Iterable[str]) -> float:
        """Mean loss over some domains."""
        return _mean([self.scores[name].loss for name in domains])


class Domain(Model):
    """One column of the table."""

    name: str
    origin: str = ""
    """`prepare/<digest>`: equal origins (and limits) mean the same held-out text."""
    tokens: int
    """Tokens predicted, the same ones by every model."""
    bytes: int
    """Bytes of text that these tokens stand for."""
    expert: str = ""
    """Label of the expert that was trained on this domain; empty: none was."""


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

    def over_layers(self, domain: str) -> list[float]:
        """Shares by expert, mean over the layers."""
        table = self.domains[domain]
        return [sum(column) / len(table) for column in zip(*table, strict=True)]


class Curve(Model):
    """Training loss of one model; at most 400 points, each the mean of the steps it stands for."""

    label: str
    role: str
    steps: tuple[int, ...]
    """Last step of each point."""
    tokens: tuple[int, ...]
    """Tokens trained on by then."""
    loss: tuple[Real, ...]
    """Nats per token, without the balancing loss."""


class Report(Model):
    """One evaluation: the content of report.json."""

    schema_version: int = 1
    """Raised when a field changes its meaning."""
    method: str
    """Method of the run: BTX, Dense."""
    precision: str
    """Compute dtype of the evaluation."""
    sequence_length: int
    """Tokens of context at the most; documents never see each other."""
    limit: int
    """At most so many tokens were predicted per domain."""
    tokenizer: str
    """`bytes` (built in) or `file` (the model's tokenizer.json)."""
    domains: tuple[Domain, ...]
    models: tuple[Row, ...]
    """In the order of the recipe; the seed is among them."""
    oracle: dict[str, Real]
    """By domain that an expert was trained on: that expert's loss."""
    routing: tuple[RoutingTable, ...] = ()
    curves: tuple[Curve, ...] = ()
    """Of the models that the run trained."""
    deviations: tuple[str, ...] = ()
    """What happened that the recipes do not say, in words."""

    @property
    def seed(self) -> Row:
        """The model that was branched."""
        return next(row for row in self.models if row.role == "seed")

    @property
    def result(self) -> Row:
        """What the run was for: the final model, or the dense one."""
        return next(row for row in self.models if row.role in ("final", "dense"))

    @property
    def experts(self) -> tuple[Row, ...]:
        """In the order of their indices."""
        return tuple(row for row in self.models if row.role == "expert")

    def of(self, role: str) -> Row | None:
        """The model of a role that at most one has."""
        return next((row for row in self.models if row.role == role), None)

    def json_text(self) -> str:
        """One top-level field a line; the same report gives the same bytes."""
        fields = [
            f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
            for key, value in self.plain().items()
        ]
        return "{" + ",\n ".join(fields) + "}\n"


def common_domains(reports: Sequence[Report]) -> list[str]:
    """Domains that every report measured on the same held-out text in the same way."""
    measured = [
        {
            d.name: (d.origin, d.tokens, d.bytes, report.sequence_length, report.precision)
            for d in report.domains
        }
        for report in reports
    ]
    return [name for name, key in measured[0].items() if all(m.get(name) == key for m in measured)]


def tabulate(
    recipe: EvaluateRecipe,
    measured: Sequence[Measured],
    *,
    origins: Sequence[str] = (),
    histories: Mapping[int, str] | None = None,
    tokenizer: str = "file",
    deviations: Sequence[str] = (),
) -> Report:
    """The report of a recipe's models, measured in its order.

    `origins` of all inputs in their order; `histories`: history.jsonl of models, by input index.
    Domains that were not measured (no held-out text) get no column.
    """
    seed = next(m for model, m in _pairs(recipe, measured) if model.role == "seed")
    origin = dict(enumerate(origins))
    names = {model.label: m for model, m in _pairs(recipe, measured) if model.role == "expert"}
    domains = tuple(
        Domain(
            name=column.name, origin=origin.get(column.input, ""),
            tokens=seed.sums[column.name].tokens, bytes=round(seed.sums[column.name].bytes),
            expert=column.name if column.name in names else "",
        )
        for column in recipe.columns
        if column.name in seed.sums
    )  # fmt: skip
    own = {domain.name: names[domain.name] for domain in domains if domain.expert}
    oracle = {name: _loss(expert.sums[name]) for name, expert in own.items()}
    kept = histories or {}
    return Report(
        method=Method.DENSE if any(m.role == "dense" for m in recipe.models) else Method.BTX,
        precision=recipe.precision,
        sequence_length=recipe.sequence_length,
        limit=recipe.tokens,
        tokenizer=tokenizer,
        domains=domains,
        models=tuple(
            _row(model, m, seed, oracle, origin.get(model.input, ""))
            for model, m in _pairs(recipe, measured)
        ),
        oracle=oracle,
        routing=tuple(
            _routing(model.role, recipe.routing, m.slots, list(names))
            for model, m in _pairs(recipe, measured)
            if m.slots
        ),
        curves=tuple(
            curve(model.label, model.role, kept[model.input])
            for model in recipe.models
            if kept.get(model.input)
        ),
        deviations=tuple(deviations),
    )


def _pairs(
    recipe: EvaluateRecipe, measured: Sequence[Measured]
) -> list[tuple[EvaluatedModel, Measured]]:
    return list(zip(recipe.models, measured, strict=True))


def _loss(sums: Sums) -> float:
    return round(sums.loss / sums.tokens, DIGITS)


def _row(
    model: EvaluatedModel, measured: Measured, seed: Measured, oracle: Mapping[str, float],
    origin: str,
) -> Row:  # fmt: skip
    scores = {}
    for name, sums in measured.sums.items():
        loss, before = _loss(sums), _loss(seed.sums[name])
        gap = before - oracle.get(name, before)
        scores[name] = Score(
            loss=loss,
            # Of a model that diverged the perplexity would not be a number.
            perplexity=round(math.exp(min(loss, 700.0)), DIGITS),
            bits_per_byte=round(sums.loss / math.log(2) / sums.bytes, DIGITS),
            versus_seed=round(loss - before, DIGITS),
            gap_closed=round((before - loss) / gap, DIGITS) if gap >= 0.0005 else None,
        )
    return Row(
        label=model.label, role=model.role, origin=origin,
        parameters=measured.parameters, active_parameters=measured.active, scores=scores,
        mean_loss=_mean([score.loss for score in scores.values()]),
        mean_bits_per_byte=_mean([score.bits_per_byte for score in scores.values()]),
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), DIGITS)


def _routing(role: str, method: str, slots: Slots, members: Sequence[str]) -> RoutingTable:
    domains = {
        name: tuple(tuple(count / sum(layer) for count in layer) for layer in layers)
        for name, layers in slots.counts.items()
    }
    loads = []
    for layer in zip(*domains.values(), strict=True):
        shares = [sum(column) / len(layer) for column in zip(*layer, strict=True)]
        loads.append(
            LayerLoad(
                shares=_rounded(shares),
                entropy=round(-sum(s * math.log(s) for s in shares if s), DIGITS),
                least=round(min(shares), DIGITS),
                most=round(max(shares), DIGITS),
            )
        )
    experts = len(loads[0].shares)
    names = (*members, "seed") if experts == len(members) + 1 else tuple(members)
    return RoutingTable(
        role=role, method=method, k=slots.k, unit=slots.unit,
        experts=names if len(names) == experts else tuple(str(i) for i in range(experts)),
        domains={n: tuple(_rounded(layer) for layer in table) for n, table in domains.items()},
        layers=tuple(loads),
    )  # fmt: skip


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, DIGITS) for value in values)


def curve(label: str, role: str, history: str) -> Curve:
    """Of a history.jsonl; where there are too many steps, neighbours are averaged."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in history.splitlines() if line]
    width = -(-len(lines) // CURVE_POINTS) or 1
    groups = [lines[start : start + width] for start in range(0, len(lines), width)]
    return Curve(
        label=label, role=role,
        steps=tuple(group[-1]["step"] for group in groups),
        tokens=tuple(group[-1]["tokens"] for group in groups),
        loss=tuple(_mean([line["loss"] for line in group]) for group in groups),
    )  # fmt: skip
