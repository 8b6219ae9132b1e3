"""report.html: one self-contained page, no scripts and no requests, legible in light and dark.

Pure. Called by report.py.
"""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files

from btx_api.spec import GENERAL

from btx_trainer import figures
from btx_trainer.analysis import RoutingTable
from btx_trainer.scores import Report, Row, Score
from btx_trainer.sentences import compare, count, listed, percent, sentences, signed
from btx_trainer.table import (
    RETAINED,
    UNTRAINED,
    Line,
    Runs,
    Table,
    loss_table,
    retained,
    task_table,
    tasks_of,
)

Cell = tuple[str, str]
"""CSS class and HTML."""
EXCERPTS = 12
"""Domains whose first tokens are shown."""
VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "␍"}
"""What stands for characters that a line cannot show."""


def page(runs: Runs) -> str:
    """The whole page; the same reports give the same bytes."""
    title = " and ".join(name for name, _ in runs)
    table = loss_table(runs)
    parts = [
        _header(runs, table),
        _section("What the numbers say", _said(runs)),
        _section("Held-out loss", _losses(table)),
        _section("Gain and forgetting", _changes(table)),
        _section("Tasks", _tasks(runs)),
        _section("Training", _each(runs, _training)),
        _section("Routing", _each(runs, _routing)),
        _section("How it was measured", _each(runs, _method)),
        _section("Deviations", _each(runs, _deviations)),
        _section("Lineage", _each(runs, _lineage)),
    ]
    css = files("btx_trainer").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Or the browser asks for /favicon.ico.
        '<link rel="icon" href="data:,">\n'
        f"<title>{_e(title)}: evaluation</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n<footer>Made from report.json, which holds every number of this page.</footer>\n"
        "</body>\n</html>\n"
    )


def _e(text: str) -> str:
    return html.escape(text)


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>" if body else ""


def _each(runs: Runs, body: Callable[[Report, str], str]) -> str:
    """One part per run, under its name unless all are alike; the body gets a prefix for ids."""
    texts = [body(report, f"run{i}") for i, (_, report) in enumerate(runs)]
    if len(set(texts)) == 1:
        return texts[0]
    return "\n".join(
        f"<h3>{_e(name)}</h3>\n{text}" for (name, _), text in zip(runs, texts, strict=True) if text
    )


def _table(header: Sequence[str], rows: Iterable[tuple[str, Sequence[Cell]]], caption: str) -> str:
    """Rows are (class, cells); the first cell heads its row."""
    lines = []
    for kind, (first, *rest) in rows:
        cells = "".join(f'<td class="{name}">{text}</td>' for name, text in rest)
        lines.append(f'<tr class="{kind}"><th scope="row">{first[1]}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{_e(name)}</th>' for name in header)
    body = "\n".join(lines).replace(' class=""', "")
    return (
        f'<div class="scroll"><table>\n<caption><span>{caption}</span></caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _details(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n{body}\n</details>"


def _figure(svg: str, caption: str) -> str:
    return f"<figure>\n{svg}\n<figcaption>{caption}</figcaption>\n</figure>\n"


def _bullets(lines: Iterable[str], kind: str = "") -> str:
    items = "\n".join(f"<li>{_e(line)}</li>" for line in lines)
    return f'<ul class="{kind}">\n{items}\n</ul>'


def _header(runs: Runs, table: Table) -> str:
    methods = listed(dict.fromkeys(report.method for _, report in runs))
    tokens = max(sum(domain.tokens for domain in report.domains) for _, report in runs)
    facts = [
        f"{len(table.models)} models",
        f"{len(table.domains)} domains",
        f"{count(tokens)} held-out tokens",
        listed(dict.fromkeys(report.precision for _, report in runs)),
    ]
    title = " <span>and</span> ".join(_e(name) for name, _ in runs)
    return (
        f'<header>\n<p class="eyebrow">{_e(methods)} · evaluation</p>\n<h1>{title}</h1>\n'
        f'<p class="lead">{_e(" · ".join(facts))}</p>\n</header>'
    )


def _said(runs: Runs) -> str:
    if compared := compare(runs):
        return _bullets(compared, "key") + _each(runs, lambda r, _: _bullets(sentences(r)))
    return _bullets(sentences(runs[0][1]), "key")


def _kind(line: Line) -> str:
    return "result" if line.is_result else "" if line.row else "oracle"


def _losses(table: Table) -> str:
    rows = []
    for line in table.lines:
        *cells, mean = [("best" if cell.best else "", cell.text) for cell in line.cells]
        rows.append(
            (_kind(line), [("", _e(line.title)), *cells, (f"mean {mean[0]}", mean[1]), _size(line)])
        )
    caption = (
        "Nats per token; lower is better, the lowest of each column is marked. The mean gives "
        "each domain the same weight. The oracle takes each expert on its own domain. Parameters: "
        "those that a token uses, of all."
    )
    caption += f" {UNTRAINED}." if table.untrained else ""
    return "\n".join(
        [
            _table(["model", *table.headers, "mean", "parameters"], rows, caption),
            _other(table, "Perplexity", lambda s: f"{s.perplexity:.2f}", "exp(loss), per token."),
            _other(table, "Bits per byte", lambda s: f"{s.bits_per_byte:.3f}",
                   "Of the text predicted; comparable between tokenizers."),
        ]
    )  # fmt: skip


def _size(line: Line) -> Cell:
    if line.row is None:
        return "", ""
    used, total = line.row.active_parameters, line.row.parameters
    return "", count(total) if used == total else f"{count(used)} of {count(total)}"


def _other(table: Table, title: str, value: Callable[[Score], str], caption: str) -> str:
    rows = []
    for line in table.lines:
        if row := line.row:
            shown = [value(row.scores[n]) if n in row.scores else "–" for n in table.domains]
            rows.append((_kind(line), [("", _e(line.title)), *(("", text) for text in shown)]))
    return _details(title, _table(["model", *table.headers], rows, caption))


def _changes(table: Table) -> str:
    rows = []
    for line in table.lines:
        if line.row is None or line.row.role == "seed":
            continue
        scores = [line.row.scores.get(name) for name in table.domains]
        rows.append((_kind(line), [("", _e(line.title)), *map(_change, scores)]))
    caption = (
        "Loss minus the seed's, nats per token; then the share of the gap between the seed and "
        "the domain's own expert that the model closes (the expert itself: 100%), where there is "
        "such an expert and a gap."
    )
    figure = _figure(
        figures.changes(table.models, table.domains, "changes"),
        "Loss of each model minus that of its run's seed on the same tokens: left of the dashed "
        "line a model gained on the domain, right of it it forgot.",
    )
    numbers = _table(["model", *table.headers], rows, caption)
    return figure + _retained(table) + _details("By domain, in numbers", numbers)


def _retained(table: Table) -> str:
    rows = []
    for line in table.lines:
        if line.row and line.row.role != "seed":
            *changes, gap = retained(line.row)
            cells = [_signed(value) for value in changes]
            cells.append(("mean", "–" if gap is None else f"{gap:.0%}".replace("-", "−")))
            rows.append((_kind(line), [("", _e(line.title)), *cells]))
    caption = (
        "Loss minus the seed's, nats per token: of an expert on its own domain, then the mean over "
        "all other domains, the largest of those, and on general, the seed's own data (retention). "
        "Gap closed: the share of the way from the seed to the oracle, over the domains with an "
        "expert."
    )
    return _table(["model", *RETAINED], rows, caption)


def _signed(value: float | None) -> Cell:
    if value is None:
        return "", "–"
    change = round(value, 3)
    return "good" if change < 0 else "bad" if change > 0 else "", signed(change)


def _tasks(runs: Runs) -> str:
    names, lines = tasks_of(runs), task_table(runs)
    if not lines:
        return ""
    asked = {task.name: task for _, report in reversed(runs) for task in report.tasks}
    rows: list[tuple[str, Sequence[Cell]]] = []
    for title, row, cells in lines:
        kind = "result" if row.role in ("final", "dense") else ""
        shown = [("best" if cell.best else "", cell.percent) for cell in cells]
        rows.append((kind, [("", _e(title)), *shown]))
    chance = [asked[name].chance for name in names]
    guesses = [("", "–" if value is None else percent(value)) for value in chance]
    rows.append(("oracle", [("", "guessing"), *guesses]))
    caption = (
        "Share of the questions answered right; the highest of each column is marked. "
        "MultipleChoice: the right choice has the largest log-likelihood. ExactMatch: the first "
        "line of greedy decoding is one of the right answers, but for case, white space and a "
        "final full stop."
    )
    per_byte = [
        ("", [("", _e(title)), *(("", _per_byte(row, name)) for name in names)])
        for title, row, _ in lines
    ]
    what = [
        ("", [("", _e(name)), ("", t.kind), ("", f"{t.questions:,}"), ("", str(t.shots)),
              ("", f"{t.cut:,}")])
        for name, t in asked.items()
    ]  # fmt: skip
    return "\n".join([
        _table(["model", *names], rows, caption),
        _details("Accuracy by log-likelihood per byte", _table(
            ["model", *names], per_byte,
            "MultipleChoice only: the log-likelihood is divided by the UTF-8 bytes of the choice.",
        )),
        _details("What was asked", _table(
            ["task", "kind", "questions", "shots", "cut"], what,
            "Shots are the first records of the task's files and are not scored. Cut: questions of "
            "which the oldest tokens did not fit the context.",
        )),
    ])  # fmt: skip


def _per_byte(row: Row, task: str) -> str:
    share = row.tasks[task].accuracy_per_byte if task in row.tasks else None
    return "–" if share is None else percent(share)


def _change(score: Score | None) -> Cell:
    if score is None:
        return "", "–"
    change = round(score.versus_seed, 3)
    gap = "" if score.gap_closed is None else f" · {score.gap_closed:.0%}".replace("-", "−")
    return "good" if change < 0 else "bad" if change > 0 else "", signed(change) + gap


def _training(report: Report, prefix: str) -> str:
    if not report.curves:
        return ""
    caption = "Loss on the training data without the balancing loss, as logged (thin) and averaged "
    caption += "over neighbours (thick)."
    if report.experts:
        caption += " Each expert sees its own domain only, so their levels differ."
    return _figure(figures.curves(report, f"{prefix}-curves"), caption)


def _routing(report: Report, prefix: str) -> str:
    return "\n".join(_routed(table, f"{prefix}-{table.role}") for table in report.routing)


def _routed(table: RoutingTable, name: str) -> str:
    experts = len(table.experts)
    what = "the gate's weight" if table.unit == "weight" else "slots"
    when = "before" if table.role == "mixed" else "after"
    tasks = " and task" if table.tasks else ""
    caption = (
        f"{when.title()} finetuning (the {table.role} model): share of {what} in per cent by layer "
        f"and expert, one panel per domain{tasks}; {table.k} of {experts} experts per token "
        f"({_e(table.method)}). Each row adds up to 100; an even share is {100 / experts:.0f}."
    )
    rows: list[tuple[str, Sequence[Cell]]] = []
    for i, load in enumerate(table.layers):
        shares = [("", f"{share:.1%}") for share in load.shares]
        even = load.entropy / math.log(experts) if experts > 1 else 1.0
        spread = [("mean", f"{even:.3f}"), ("", f"{load.least:.1%}"), ("", f"{load.most:.1%}")]
        rows.append(("", [("", str(i)), *shares, *spread]))
    loads = _table(
        ["layer", *table.experts, "entropy", "least", "most"], rows,
        "Mean over the domains. Entropy as a share of its maximum, ln of the number of experts.",
    )  # fmt: skip
    figure = _figure(figures.heatmaps(table, name), caption)
    return "".join([
        figure,
        _details(f"Load by layer {when} finetuning", _profile(table, name) + loads),
        _details(f"Routing probabilities {when} finetuning", _histograms(table, name)),
        _details(f"Tokens and their experts {when} finetuning", _excerpts(table)),
    ])  # fmt: skip


def _profile(table: RoutingTable, name: str) -> str:
    if not table.distances:
        return ""
    return _figure(
        figures.profile(table, f"{name}-profile"),
        "By layer: the share of the most and the least used expert, mean over the domains (dashed: "
        "an even share); the entropy of the mean shares; the distance of a domain's shares from "
        "those of the layer before, as total variation: 0 alike, 1 no expert in common.",
    )


def _histograms(table: RoutingTable, name: str) -> str:
    if not table.histograms:
        return ""
    rest = len(table.experts) - figures.MAX_NUMBERS
    more = f" {rest} more experts are in report.json only." if rest > 0 else ""
    return _figure(
        figures.histograms(table, f"{name}-histograms"),
        "How probable the router finds each expert (softmax over all of them), one panel per "
        "expert: of a layer's tokens, the darker the more have that probability (opacity is the "
        f"root of their share). Mean over the domains.{more}",
    )


def _excerpts(table: RoutingTable) -> str:
    if not table.excerpts:
        return ""
    key = "".join(_marked(name, i, name) for i, name in enumerate(table.experts))
    found = list(table.excerpts.items())[:EXCERPTS]
    parts = [f'<p class="note excerpt">{key}</p>']
    for domain, shown in found:
        parts.append(f"<h4>{_e(domain)}</h4>")
        for layer, experts in zip(shown.layers, shown.experts, strict=True):
            tokens = "".join(
                _marked(token, expert, table.experts[expert])
                for token, expert in zip(shown.tokens, experts, strict=True)
            )
            parts.append(f'<p class="excerpt"><i>layer {layer}</i>{tokens}</p>')
    note = (
        "The first held-out tokens of each domain, coloured by the expert with the largest weight "
        f"in the first, the middle and the last layer. Colours repeat after {figures.SERIES}."
    )
    return "\n".join([*parts, f'<p class="note">{note}</p>'])


def _marked(token: str, expert: int, name: str) -> str:
    text = "".join(VISIBLE.get(c, c if c.isprintable() else "\ufffd") for c in token)
    colour = expert % figures.SERIES
    return f'<span class="e{colour}" title="{_e(name)}">{_e(text)}</span>'


def _method(report: Report, _: str) -> str:
    text = (
        f"Every model predicts the same held-out tokens in the same batches: documents that no "
        f"training saw, chosen by their content, at most {report.limit:,} tokens per domain, with "
        f"up to {report.sequence_length:,} tokens of context and never across documents. Computed "
        f"in {report.precision}. The loss is the mean negative log-likelihood per token."
    )
    rows: list[tuple[str, Sequence[Cell]]] = []
    for domain in report.domains:
        owner = f"{domain.expert} expert" if domain.expert else "no expert"
        if domain.untrained:
            owner = "nobody"
        if domain.name == GENERAL:
            owner += " (the seed's own data)"
        numbers = [("", f"{domain.tokens:,}"), ("", f"{domain.bytes:,}")]
        rows.append(("", [("", _e(domain.name)), *numbers, ("", _e(owner))]))
    table = _table(["domain", "tokens", "bytes", "trained on by"], rows, "What was predicted.")
    return f"<p>{text}</p>\n{table}"


def _deviations(report: Report, _: str) -> str:
    if report.deviations:
        return _bullets(report.deviations)
    return '<p class="note">None: everything went as the recipes say.</p>'


def _lineage(report: Report, _: str) -> str:
    found = [(row.title, row.origin) for row in report.models]
    found += [(f"held-out {domain.name}", domain.origin) for domain in report.domains]
    found += [(f"task {task.name}", task.origin) for task in report.tasks]
    rows: list[tuple[str, Sequence[Cell]]] = [
        ("", [("", _e(title)), ("", f"<code>{_e(origin)}</code>")])
        for title, origin in found
        if origin
    ]
    caption = "What was read: artifacts by kind and digest, models from outside by their content."
    return _table(["", "read from"], rows, caption) if rows else ""
