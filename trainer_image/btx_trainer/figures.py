"""The report's plots: inline SVG by matplotlib, in the page's own colours and fonts.

Pure: a report in, SVG text out, the same bytes each time. `name` is what a plot's ids begin with,
another one for each plot of a page. Called by report.py; nothing else imports matplotlib.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import count as count_from
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from btx_trainer.analysis import RoutingTable
from btx_trainer.scores import Curve, Report, Row
from btx_trainer.sentences import count

SERIES = 8
"""Colours for experts before they repeat; the page defines --series-0 ... --series-7."""
INK, MUTED, RULE, SURFACE = "#010101", "#020202", "#030303", "#040404"
# matplotlib cannot write a CSS variable: these colours stand for one until the SVG is text.
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", SURFACE: "surface"} | {
    f"#05050{i}": f"series-{i}" for i in range(SERIES)
}
HEAT = (0.25, 0.52, 0.80)
"""Of the heatmaps, laid over the page with the share as opacity: legible in light and dark."""
OPAQUE = 0.85
"""Opacity of the largest share there can be; numbers stay legible on it."""
MAX_NUMBERS = 16
"""Layers, and experts, up to which a heatmap prints its numbers, and its experts' names."""
_STYLE = {
    "svg.fonttype": "none", "font.size": 9.5, "axes.edgecolor": RULE, "axes.linewidth": 0.8,
    "axes.labelcolor": MUTED, "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.major.size": 0, "ytick.major.size": 0, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left",
    "legend.frameon": False, "legend.fontsize": 9, "axes.grid": True, "grid.color": RULE,
    "grid.linewidth": 0.6, "axes.axisbelow": True, "figure.facecolor": "none",
    "axes.facecolor": "none",
}  # fmt: skip


def changes(models: Sequence[tuple[str, Row]], domains: Sequence[str], name: str) -> str:
    """Loss minus that of the run's seed, by domain: gains on the left, forgetting on the right."""
    others = [(title, row) for title, row in models if row.role != "seed"]
    with _style(name):
        figure = Figure(figsize=(8.6, 1.3 + 0.55 * len(domains)), layout="constrained")
        axes = figure.subplots()
        for i, (mark, (title, row)) in enumerate(zip(_marks(others), others, strict=True)):
            # Spread within the line, so that models with equal losses stay apart.
            shift = 0.6 * ((i + 0.5) / len(others) - 0.5)
            known = [(line, row.scores[n]) for line, n in enumerate(domains) if n in row.scores]
            axes.scatter(
                [score.versus_seed for _, score in known], [line + shift for line, _ in known],
                label=title, linewidths=1.4, zorder=3, **mark,
            )  # fmt: skip
        axes.axvline(0, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), label="seed")
        axes.set_yticks(range(len(domains)), domains)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(domains) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("loss minus the seed's, nats per token (left: gain; right: forgetting)")
        _legend(figure, [title for title, _ in others])
        return _svg(figure, "Change of loss against the seed, by model and domain", name)


def _marks(models: Sequence[tuple[str, Row]]) -> Iterator[dict[str, Any]]:
    """Experts are coloured discs, what runs were for is solid, baselines are hollow."""
    experts, results = count_from(0), cycle("DPX*")
    for _, row in models:
        if row.role == "expert":
            yield {"marker": "o", "color": _color(next(experts)), "s": 42}
        elif row.role in ("final", "dense"):
            yield {"marker": next(results), "color": INK, "s": 56}
        else:
            marker = "s" if row.role == "soup" else "D"
            yield {"marker": marker, "facecolors": "none", "edgecolors": MUTED, "s": 44}


def _legend(figure: Figure, titles: Sequence[str]) -> None:
    columns = max(1, 110 // (max(map(len, titles)) + 6))
    figure.legend(loc="outside upper left", ncols=columns, handletextpad=0.4, columnspacing=1.4)


def _color(index: int) -> str:
    return f"#05050{index % SERIES}"


def curves(report: Report, name: str) -> str:
    """Training loss over tokens; experts on the left, what was trained after them on the right."""
    experts = [curve for curve in report.curves if curve.role == "expert"]
    others = [curve for curve in report.curves if curve.role != "expert"]
    panels = [(title, group) for title, group in (("experts", experts), ("", others)) if group]
    with _style(name):
        figure = Figure(figsize=(8.6, 3.3), layout="constrained")
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, group) in zip(grid, panels, strict=True):
            for i, curve in enumerate(group):
                _line(axes, curve, _color(i) if title else INK)
            axes.set_title(title or group[0].role, color=INK)
            axes.set_xlabel("tokens of this training")
            axes.xaxis.set_major_formatter(lambda value, _: count(value))
            axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
            axes.set_xlim(left=0)
        if experts:
            _legend(figure, [curve.label for curve in experts])
        grid[0].set_ylabel("training loss, nats per token")
        return _svg(figure, "Training loss over tokens", name)


def _line(axes: Axes, curve: Curve, color: str) -> None:
    axes.plot(curve.tokens, curve.loss, color=color, linewidth=0.8, alpha=0.3)
    width = max(1, len(curve.loss) // 20)
    kernel = np.ones(width)
    # Divided by how many points the window really covers: no sag at the ends.
    smooth = np.convolve(curve.loss, kernel, "same") / np.convolve(
        np.ones(len(curve.loss)), kernel, "same"
    )
    label = curve.label if curve.role == "expert" else None
    axes.plot(curve.tokens, smooth, color=color, linewidth=1.8, label=label)


def heatmaps(table: RoutingTable, name: str) -> str:
    """Routing shares: one panel per domain and task, layers down, experts across."""
    names, layers = list(table.text), len(table.layers)
    columns = min(len(names), 4 if len(table.experts) <= 8 else 2)
    rows = -(-len(names) // columns)
    high = max(1.1, min(0.3, 6 / layers) * layers) + 1.0
    with _style(name):
        figure = Figure(figsize=(8.6, rows * high), layout=_spaced())
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for axes, domain in zip(grid, names, strict=False):
            _panel(axes, table, domain)
        for axes in grid[len(names) :]:
            axes.set_visible(False)
        for axes in grid[::columns]:
            axes.set_ylabel("layer")
        label = f"Share of {table.unit} by layer and expert, {table.role} model"
        return _svg(figure, label, name)


def _spaced() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(wspace=0.05, hspace=0.08)


def _panel(axes: Axes, table: RoutingTable, domain: str) -> None:
    shares = np.array(table.text[domain])
    layers, experts = shares.shape
    most = 1 / table.k if table.unit == "slots" else 1.0
    image = np.empty((layers, experts, 4))
    image[..., :3] = HEAT
    image[..., 3] = OPAQUE * np.clip(shares / most, 0, 1)
    axes.imshow(image, aspect="auto", interpolation="none")
    axes.set_title(f"task {domain}" if domain in table.tasks else domain, color=INK)
    if experts <= MAX_NUMBERS:
        upright = experts > 6 or max(map(len, table.experts)) > 7
        axes.set_xticks(range(experts), table.experts, rotation=90 if upright else 0)
    else:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.hlines(np.arange(1, layers) - 0.5, -0.5, experts - 0.5, color=SURFACE, linewidth=1.5)
    axes.vlines(np.arange(1, experts) - 0.5, -0.5, layers - 0.5, color=SURFACE, linewidth=1.5)
    if max(layers, experts) > MAX_NUMBERS:
        return
    for (layer, expert), share in np.ndenumerate(shares):
        axes.text(expert, layer, f"{share:.0%}".rstrip("%"), ha="center", va="center", fontsize=8)


def histograms(table: RoutingTable, name: str) -> str:
    """Routing probabilities: one panel per expert, layers down, probability across."""
    shares = np.sqrt(np.array(table.histograms))
    layers, experts, bins = shares.shape
    shown = min(experts, MAX_NUMBERS)
    columns = min(shown, 4)
    rows = -(-shown // columns)
    high = max(1.1, min(0.3, 6 / layers) * layers) + 0.8
    with _style(name):
        figure = Figure(figsize=(8.6, rows * high), layout=_spaced())
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for expert, axes in enumerate(grid[:shown]):
            image = np.empty((layers, bins, 4))
            image[..., :3], image[..., 3] = HEAT, OPAQUE * shares[:, expert]
            extent = (0, 1, layers - 0.5, -0.5)
            axes.imshow(image, aspect="auto", interpolation="none", extent=extent)
            axes.set_title(table.experts[expert], color=INK)
            axes.yaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            axes.grid(axis="y", visible=False)
        for axes in grid[shown:]:
            axes.set_visible(False)
        for axes in grid[::columns]:
            axes.set_ylabel("layer")
        return _svg(figure, f"Routing probability by layer and expert, {table.role} model", name)


def profile(table: RoutingTable, name: str) -> str:
    """By layer: load of the most and least used expert, entropy, distance from the layer before."""
    layers, experts = range(len(table.layers)), len(table.experts)
    with _style(name):
        figure = Figure(figsize=(8.6, 2.9), layout="constrained")
        load, entropy, distance = figure.subplots(1, 3)
        mark: dict[str, Any] = {"marker": "o", "markersize": 3.5, "linewidth": 1.4}
        load.plot(layers, [part.most for part in table.layers], color=INK, label="most", **mark)
        load.plot(
            layers, [part.least for part in table.layers], color=MUTED, label="least",
            linestyle=(0, (1, 1)), **mark,
        )  # fmt: skip
        load.axhline(1 / experts, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
        load.set_title(f"share of {table.unit}", color=INK)
        load.legend(loc="best")
        load.set_ylim(bottom=0)
        most = np.log(experts) if experts > 1 else 1.0
        entropy.plot(layers, [part.entropy / most for part in table.layers], color=INK, **mark)
        entropy.set_title("entropy, of its maximum", color=INK)
        entropy.set_ylim(0, 1.05)
        for i, (domain, values) in enumerate(table.distances.items()):
            if i < SERIES:
                distance.plot(layers[1:], values[1:], color=_color(i), label=domain, **mark)
        distance.set_title("distance from the layer before", color=INK)
        distance.set_ylim(0, max(0.05, 1.1 * max(max(v) for v in table.distances.values())))
        for axes in (load, entropy, distance):
            axes.set_xlabel("layer")
            axes.set_xlim(-0.4, len(layers) - 0.6)
            axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
        if len(layers) > 1:
            distance.legend(loc="best", fontsize=8)
        return _svg(figure, f"Load, entropy and distance by layer, {table.role} model", name)


def _style(salt: str) -> AbstractContextManager[None]:
    return mpl.rc_context({**_STYLE, "svg.hashsalt": salt})


def _svg(figure: Figure, label: str, name: str) -> str:
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # The fonts of the page, and of all ids those in use, under names that no other plot has.
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    size = re.search(r'viewBox="[^"]*"', text)
    assert size, "matplotlib writes a viewBox"
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{label}" '
    return head + size[0] + text[text.index(">") :]
