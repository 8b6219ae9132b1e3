"""The tables of a report: models down; domains across, or tasks; the best of each column marked.

Pure; made once and printed three ways (terminal, page, model card). Called by report.py, page.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from btx_trainer.scores import Report, Row, common_domains, common_tasks
from btx_trainer.sentences import percent

Runs = Sequence[tuple[str, Report]]
"""Named reports, in the order of the page."""

DAGGER = "†"
UNTRAINED = f"{DAGGER} no model of the run was trained on this domain"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A loss, nats per token, or an accuracy; None: this model was not measured there."""

    value: float | None
    best: bool = False
    """As shown, no model of the column is better."""

    @property
    def text(self) -> str:
        """Three decimals, or a dash."""
        return "–" if self.value is None else f"{self.value:.3f}"

    @property
    def percent(self) -> str:
        """Per cent with one decimal, or a dash."""
        return "–" if self.value is None else percent(self.value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One model, or (without row) an oracle."""

    title: str
    row: Row | None
    cells: tuple[Cell, ...]
    """One per domain, then the mean over the domains that can be compared."""

    @property
    def is_result(self) -> bool:
        """What a run was for."""
        return self.row is not None and self.row.role in ("final", "dense")


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Held-out losses of all models of some runs."""

    domains: tuple[str, ...]
    lines: tuple[Line, ...]
    untrained: frozenset[str] = frozenset()
    """Domains that nobody trained on."""

    @property
    def headers(self) -> list[str]:
        """Of the domains' columns; a dagger marks what nobody trained on."""
        return [name + DAGGER * (name in self.untrained) for name in self.domains]

    @property
    def models(self) -> list[tuple[str, Row]]:
        """(title, row) of the lines that are models."""
        return [(line.title, line.row) for line in self.lines if line.row]


def loss_table(runs: Runs) -> Table:
    """Every model once: what several runs share (the seed, an expert) has one line."""
    domains = list(dict.fromkeys(d.name for _, report in runs for d in report.domains))
    common = common_domains([report for _, report in runs])
    models = _models(runs)
    losses = [[*(_loss(row, name) for name in domains), _mean(row, common)] for _, row in models]
    # Only what was measured alike has a lowest.
    best = [
        min((round(v, 3) for v in column if v is not None), default=None)
        if name in common or (name is None and common)
        else None
        for name, column in zip([*domains, None], zip(*losses, strict=True), strict=True)
    ]
    lines = [
        Line(title=title, row=row, cells=tuple(
            Cell(value=v, best=v is not None and round(v, 3) == b)
            for v, b in zip(values, best, strict=True)
        ))
        for (title, row), values in zip(models, losses, strict=True)
    ]  # fmt: skip
    for name, report in runs:
        if report.oracle:
            oracle = [report.oracle.get(domain) for domain in domains]
            owned = [report.oracle[domain] for domain in common if domain in report.oracle]
            complete = owned and len(owned) == len(common)
            oracle.append(sum(owned) / len(owned) if complete else None)
            title = "oracle" if len(runs) == 1 else f"{name}: oracle"
            cells = tuple(Cell(value=value) for value in oracle)
            lines.append(Line(title=title, row=None, cells=cells))
    untrained = frozenset(d.name for _, r in runs for d in r.domains if d.untrained)
    trained = {d.name for _, r in runs for d in r.domains if not d.untrained}
    return Table(domains=tuple(domains), lines=tuple(lines), untrained=untrained - trained)


def task_table(runs: Runs) -> list[tuple[str, Row, list[Cell]]]:
    """(title, row, accuracy per task of `tasks_of`) of every model; empty without tasks."""
    names, common = tasks_of(runs), common_tasks([report for _, report in runs])
    models = [(title, row) for title, row in _models(runs) if row.tasks]
    columns = [[row.tasks[n].accuracy if n in row.tasks else None for _, row in models]
               for n in names]  # fmt: skip
    most = [
        max(round(v, 3) for v in column if v is not None) if name in common else None
        for name, column in zip(names, columns, strict=True)
    ]
    return [
        (title, row, [
            Cell(value=v, best=bool(v) and round(v or 0, 3) == m)
            for v, m in zip(values, most, strict=True)
        ])
        for (title, row), values in zip(models, zip(*columns, strict=True), strict=False)
    ]  # fmt: skip


def tasks_of(runs: Runs) -> list[str]:
    """Names of the tasks of some runs."""
    return list(dict.fromkeys(task.name for _, report in runs for task in report.tasks))


def retained(row: Row) -> list[float | None]:
    """Loss minus the seed's: on an expert's own domain, as a mean over the others, on the one of
    those where that is largest, on `general`; then the share of the gap to the oracle closed."""
    changes = {name: score.versus_seed for name, score in row.scores.items()}
    own = changes.pop(row.label, None) if row.role == "expert" else None
    worst = max(changes.values(), default=None)
    return [own, row.forgetting, worst, row.retention, row.gap_closed]


RETAINED = ("own domain", "other domains", "worst other", "general", "gap closed")
"""Columns of `retained`."""


def _models(runs: Runs) -> list[tuple[str, Row]]:
    found: dict[object, tuple[str, Row]] = {}
    for name, report in runs:
        for i, row in enumerate(report.models):
            losses = tuple((domain, score.loss) for domain, score in row.scores.items())
            key = (row.origin, losses) if row.origin else (name, i)
            shared = key in found or len(runs) == 1
            # Not every run need have asked the same tasks.
            tasks = {**found[key][1].tasks, **row.tasks} if key in found else row.tasks
            title = row.title if shared else f"{name}: {row.title}"
            found[key] = (title, row.model_copy(update={"tasks": tasks}))
    return list(found.values())


def _loss(row: Row, domain: str) -> float | None:
    return row.scores[domain].loss if domain in row.scores else None


def _mean(row: Row, domains: Sequence[str]) -> float | None:
    return row.mean(domains) if domains else None
