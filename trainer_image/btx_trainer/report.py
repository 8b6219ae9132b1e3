"""A report for people: report.html, a table for the terminal, a model card; runs side by side.

Pure but for `render`, which writes a folder. Called by stages/evaluate.py for one run and by the
errand `report` for several. No torch; matplotlib is imported only when a page is drawn.
"""

import json
import textwrap
from pathlib import Path

from btx_api.artifact import REPORT_HTML, REPORT_JSON

from btx_trainer.scores import Report
from btx_trainer.sentences import compare, count, listed, percent, sentences, signed
from btx_trainer.table import (
    RETAINED,
    UNTRAINED,
    Runs,
    Table,
    loss_table,
    retained,
    task_table,
    tasks_of,
)

__all__ = [
    "SUMMARY", "Report", "Runs", "card", "compare", "render", "sentences", "text_table", "title",
]  # fmt: skip

SUMMARY = "summary.txt"
"""Beside report.html: the table and the sentences, for a terminal."""


def render(runs: Runs, folder: Path) -> None:
    """Writes report.html, report.json ({"runs": {name: Report}, "sentences"}) and summary.txt."""
    from btx_trainer.page import page  # noqa: PLC0415  # matplotlib; a card does without

    folder.mkdir(parents=True, exist_ok=True)
    said = all_sentences(runs)
    plain = {"runs": {name: report.plain() for name, report in runs}, "sentences": said}
    lines = [
        # A run's name is one word, however many hyphens it has.
        textwrap.fill(f"- {text}", 96, subsequent_indent="  ", break_on_hyphens=False)
        for text in said
    ]
    texts = {
        REPORT_HTML: page(runs),
        REPORT_JSON: json.dumps(plain, ensure_ascii=False) + "\n",
        SUMMARY: "\n".join([text_table(runs), *lines, ""]),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def all_sentences(runs: Runs) -> list[str]:
    """The comparison, then every run's own, under its name when there are several."""
    found = compare(runs)
    for name, report in runs:
        prefix = f"{name}: " if len(runs) > 1 else ""
        found += [prefix + sentence for sentence in sentences(report)]
    return found


def title(report: Report) -> str:
    """Of a report that has no run's name."""
    return f"{report.method} on {listed(domain.name for domain in report.domains)}"


def text_table(runs: Runs) -> str:
    """Held-out loss for a terminal, `*` at the lowest of a column."""
    table = loss_table(runs)
    cells = [["nats per token", *(f"{name} " for name in table.headers), "mean "]]
    for line in table.lines:
        cells.append([line.title, *(c.text + (" ", "*")[c.best] for c in line.cells)])
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = []
    for title, *values in cells:
        shown = [value.rjust(width) for value, width in zip(values, widths, strict=True)]
        lines.append("  ".join([title.ljust(first), *shown]).rstrip())
    width = max(map(len, lines))
    notes = ["* lowest of its column", *([UNTRAINED] if table.untrained else [])]
    return "\n".join([lines[0], "─" * width, *lines[1:], *notes, "", *_task_lines(runs)])


def _task_lines(runs: Runs) -> list[str]:
    if not (names := tasks_of(runs)):
        return []
    cells = [["accuracy", *(f"{name} " for name in names)]]
    for title, _, values in task_table(runs):
        cells.append([title, *(c.percent + (" ", "*")[c.best] for c in values)])
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = [
        "  ".join([title.ljust(first), *map(str.rjust, values, widths)]).rstrip()
        for title, *values in cells
    ]
    width = max(map(len, lines))
    return [lines[0], "─" * width, *lines[1:], "* highest of its column", ""]


def card(report: Report) -> str:
    """README.md of the result: what it is, how it was made, its table, how to load it."""
    names = listed(domain.name for domain in report.domains)
    kind = "mixture-of-experts" if report.routing else "dense"
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation",
        f"tags: [branch-train-mix, {kind}]", "---", "",
        f"# {'A mixture of experts' if report.routing else 'A dense model'} for {names}", "",
        _what(report), "", "## How it was made", "", *_made(report), "",
        "## Held-out loss", "", *_markdown(report, loss_table([("", report)])), "",
        *(f"- {sentence}" for sentence in sentences(report)), "",
        "## Gain, forgetting, retention", "", *_retained(report), "",
        *_tasks(report), *_routing(report),
        "## Limits", "", *_limits(report), "",
        "## How to load it", "", "```python", *_loading(report), "```", "",
        "## Lineage", "", "| | |", "|---|---|",
        *(f"| {row.title} | `{row.origin}` |" for row in report.models),
        *(f"| domain {domain.name} | `{domain.origin}` |" for domain in report.domains), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _what(report: Report) -> str:
    row = report.result
    size = f"{count(row.parameters)} parameters"
    if row.active_parameters != row.parameters:
        size += f", of which a token uses {count(row.active_parameters)}"
    return (
        f"A language model with {size}, made by method {report.method}. Its files are in the stock "
        "layout of its architecture and need no code of ours."
    )


def _made(report: Report) -> list[str]:
    steps = []
    for curve in report.curves:
        title = f"the {curve.label} expert" if curve.role == "expert" else f"the {curve.role} model"
        steps.append(f"- Training of {title}: {count(curve.tokens[-1])} tokens.")
    if table := next((t for t in report.routing if t.role == "final"), None):
        steps.append(
            f"- Experts of each layer, in this order: {listed(table.experts)}; {table.k} per token "
            f"({table.method}). All other weights began as the mean of the mixed models."
        )
    return steps + [f"- Deviation: {text}" for text in report.deviations]


def _markdown(report: Report, table: Table) -> list[str]:
    lines = [
        f"Nats per token, lowest in bold; at most {report.limit} tokens per domain, up to "
        f"{report.sequence_length} tokens of context, {report.precision}.", "",
        f"| model | {' | '.join(table.headers)} | mean |",
        f"|---|{'---:|' * (len(table.domains) + 1)}",
    ]  # fmt: skip
    for line in table.lines:
        shown = [f"**{cell.text}**" if cell.best else cell.text for cell in line.cells]
        lines.append(f"| {line.title} | {' | '.join(shown)} |")
    return [*lines, "", UNTRAINED + "."] if table.untrained else lines


def _retained(report: Report) -> list[str]:
    lines = [
        "Loss minus the seed's, nats per token (below 0: gain); then the share of the gap between "
        "the seed and the oracle that is closed.", "",
        f"| model | {' | '.join(RETAINED)} |", f"|---|{'---:|' * len(RETAINED)}",
    ]  # fmt: skip
    for row in report.models:
        if row.role != "seed":
            *changes, gap = retained(row)
            shown = ["–" if value is None else signed(value) for value in changes]
            shown.append("–" if gap is None else f"{gap:.0%}")
            lines.append(f"| {row.title} | {' | '.join(shown)} |")
    return lines


def _tasks(report: Report) -> list[str]:
    if not report.tasks:
        return []
    lines = ["## Tasks", "", f"| model | {' | '.join(task.name for task in report.tasks)} |",
             f"|---|{'---:|' * len(report.tasks)}"]  # fmt: skip
    for title, _, cells in task_table([("", report)]):
        shown = [f"**{cell.percent}**" if cell.best else cell.percent for cell in cells]
        lines.append(f"| {title} | {' | '.join(shown)} |")
    chance = ["–" if t.chance is None else percent(t.chance) for t in report.tasks]
    return [*lines, f"| guessing | {' | '.join(chance)} |", ""]


def _routing(report: Report) -> list[str]:
    """Shares over all layers; what is finer is in report.html."""
    table = next((table for table in report.routing if table.role == "final"), None)
    if table is None:
        return []
    lines = [
        "## Routing", "", f"Share of {table.unit} by expert, mean over the layers.", "",
        f"| | {' | '.join(table.experts)} |", f"|---|{'---:|' * len(table.experts)}",
    ]  # fmt: skip
    for name in table.text:
        shares = [f"{share:.0%}" for share in table.over_layers(name)]
        kind = " (task)" if name in table.tasks else ""
        lines.append(f"| {name}{kind} | {' | '.join(shares)} |")
    return [*lines, ""]


def _limits(report: Report) -> list[str]:
    scores = report.result.scores
    worse = [name for name, score in scores.items() if round(score.versus_seed, 3) > 0]
    tasks = f"and {listed(t.name for t in report.tasks)}" if report.tasks else "and no task"
    lines = [
        f"- Measured by held-out loss on these domains {tasks} only: no safety tests.",
        "- A base model: it continues text and was not taught to follow instructions.",
    ]
    return [*lines, f"- Worse than the seed on {listed(worse)}."] if worse else lines


def _loading(report: Report) -> list[str]:
    if report.tokenizer == "bytes":
        return [
            "import torch, transformers",
            'model = transformers.AutoModelForCausalLM.from_pretrained("path/to/the/model")',
            'print(model.generate(torch.tensor([list(b"bytes are tokens")]), max_new_tokens=64))',
        ]
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("path/to/the/model")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/the/model")',
    ]
