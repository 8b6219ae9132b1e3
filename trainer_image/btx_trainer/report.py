"""A report for people: report.html, a table for the terminal, a model card; runs side by side.

Pure but for `render`, which writes a folder. Called by stages/evaluate.py for one run and by the
errand `report` for several. No torch; matplotlib is imported only when a page is drawn.
"""

import json
import textwrap
from pathlib import Path

from btx_api.artifact import REPORT_HTML, REPORT_JSON

from btx_trainer.scores import Report
from btx_trainer.sentences import compare, count, listed, sentences
from btx_trainer.table import Runs, Table, loss_table

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
    cells = [["nats per token", *(f"{name} " for name in table.domains), "mean "]]
    for line in table.lines:
        cells.append([line.title, *(c.text + (" ", "*")[c.best] for c in line.cells)])
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = []
    for title, *values in cells:
        shown = [value.rjust(width) for value, width in zip(values, widths, strict=True)]
        lines.append("  ".join([title.ljust(first), *shown]).rstrip())
    width = max(map(len, lines))
    return "\n".join([lines[0], "─" * width, *lines[1:], "* lowest of its column", ""])


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
        f"| model | {' | '.join(table.domains)} | mean |",
        f"|---|{'---:|' * (len(table.domains) + 1)}",
    ]  # fmt: skip
    for line in table.lines:
        shown = [f"**{cell.text}**" if cell.best else cell.text for cell in line.cells]
        lines.append(f"| {line.title} | {' | '.join(shown)} |")
    return lines


def _limits(report: Report) -> list[str]:
    scores = report.result.scores
    worse = [name for name, score in scores.items() if round(score.versus_seed, 3) > 0]
    lines = [
        "- Measured by held-out loss on these domains only: no downstream tasks, no safety tests.",
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
