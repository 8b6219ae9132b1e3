"""report.json: what an evaluation found, as one value; everything else of a report is made from it.

Pure. `tabulate` turns sums into the Report (called by stages/evaluate.py); report.py, sentences.py
and figures.py read it. Labels come from the recipe only, so a run's name changes no byte.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from btx_api.spec import GENERAL, Method, Model, Real, TaskShape
from btx_api.stage import EvaluatedModel, EvaluateRecipe
from pydantic import Field

from btx_trainer.analysis import DIGITS, RoutingTable, Slots, routing_table

LEAST_GAP = 0.0005
"""Between seed and expert, nats per token, of which a share says something."""
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
class Answered:
    """One model on one task."""

    asked: int
    correct: int
    """By log-likelihood; of an ExactMatch, matches."""
    correct_normalised: int | None = None
    """By log-likelihood per byte of the choice; None of an ExactMatch."""
    cut: int = 0
    """Questions of which the beginning did not fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A task, the same for every model."""

    shape: TaskShape
    questions: int
    """Scored."""
    chance: float | None
    """Share that guessing gets right; None of an ExactMatch."""
    origin: str = ""


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
    tasks: Mapping[str, Answered] = field(default_factory=dict)
    """By task; the same tasks for every model."""


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


class TaskScore(Model):
    """One model on one task."""

    accuracy: Real
    """Share of the questions answered right: of a MultipleChoice, those whose right choice has the
    largest log-likelihood; of an ExactMatch, those whose greedy answer is one of the right ones."""
    accuracy_per_byte: Real | None = None
    """MultipleChoice only: likewise by the log-likelihood divided by the choice's UTF-8 bytes."""


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
    forgetting: Real | None = None
    """Of an expert, where another domain was measured: loss minus the seed's, mean over the domains
    that are not its own; above 0 it forgot."""
    retention: Real | None = None
    """Loss minus the seed's on `general`, the seed's own data: 0 all is retained, above 0 less.
    None where `general` was not measured."""
    gap_closed: Real | None = None
    """Of the losses over all domains with an expert: (seed - model) / (seed - oracle). None where
    there is none, or the oracle is no better than the seed by 0.0005."""
    tasks: dict[str, TaskScore] = Field(default_factory=dict)
    """By task."""

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
    untrained: bool = False
    """No model of this run was trained on it, and it is not the seed's own data either."""


class Task(Model):
    """One task."""

    name: str
    kind: str
    """MultipleChoice or ExactMatch."""
    origin: str = ""
    """`content/<fingerprint>` of its files."""
    shots: int
    """Examples before each question."""
    questions: int
    """Scored, the same ones for every model."""
    chance: Real | None = None
    """Accuracy of guessing; None of an ExactMatch."""
    cut: int = 0
    """Questions of which the oldest tokens did not fit the context."""


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
    tasks: tuple[Task, ...] = ()
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


def common_tasks(reports: Sequence[Report]) -> list[str]:
    """Tasks that every report asked in the same way."""
    asked = [
        {t.name: (t, report.sequence_length, report.precision) for t in report.tasks}
        for report in reports
    ]
    return [name for name, key in asked[0].items() if all(a.get(name) == key for a in asked)]


def tabulate(
    recipe: EvaluateRecipe,
    measured: Sequence[Measured],
    *,
    origins: Sequence[str] = (),
    histories: Mapping[int, str] | None = None,
    tokenizer: str = "file",
    deviations: Sequence[str] = (),
    asked: Sequence[Asked] = (),
    trained: Collection[int] | None = None,
) -> Report:
    """The report of a recipe's models, measured in its order.

    `origins` of all inputs in their order; `histories`: history.jsonl of models, by input index;
    `trained`: the inputs with domains that some model was trained on, if that is known.
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
            untrained=trained is not None and column.input not in trained
            and column.name not in (*names, GENERAL),
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
            routing_table(model.role, recipe.routing, m.slots, list(names))
            for model, m in _pairs(recipe, measured)
            if m.slots
        ),
        curves=tuple(
            curve(model.label, model.role, kept[model.input])
            for model in recipe.models
            if kept.get(model.input)
        ),
        deviations=tuple(deviations),
        tasks=tuple(_task(task, seed) for task in asked),
    )


def _task(asked: Asked, seed: Measured) -> Task:
    shape, chance = asked.shape, asked.chance
    return Task(
        name=shape.name, kind=shape.kind, shots=shape.shots, questions=asked.questions,
        origin=asked.origin, chance=None if chance is None else round(chance, DIGITS),
        cut=seed.tasks[shape.name].cut,
    )  # fmt: skip


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
            gap_closed=round((before - loss) / gap, DIGITS) if gap >= LEAST_GAP else None,
        )
    others = [s.versus_seed for n, s in scores.items() if n != model.label]
    gap = _mean([_loss(seed.sums[n]) for n in oracle]) - _mean(list(oracle.values()))
    closed = _mean([-scores[n].versus_seed for n in oracle])
    return Row(
        label=model.label, role=model.role, origin=origin,
        parameters=measured.parameters, active_parameters=measured.active, scores=scores,
        mean_loss=_mean([score.loss for score in scores.values()]),
        mean_bits_per_byte=_mean([score.bits_per_byte for score in scores.values()]),
        forgetting=_mean(others) if others and model.role == "expert" else None,
        retention=scores[GENERAL].versus_seed if GENERAL in scores else None,
        gap_closed=round(closed / gap, DIGITS) if gap >= LEAST_GAP else None,
        tasks={name: _task_score(found) for name, found in measured.tasks.items()},
    )  # fmt: skip


def _task_score(found: Answered) -> TaskScore:
    per_byte = found.correct_normalised
    return TaskScore(
        accuracy=round(found.correct / found.asked, DIGITS),
        accuracy_per_byte=None if per_byte is None else round(per_byte / found.asked, DIGITS),
    )


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), DIGITS) if values else 0.0


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
