"""What the terminal shows: tables, and the live progress of a `btx run`.

On a terminal the table is drawn in place; elsewhere (a file, CI) a line is written when a stage
changes its state and now and then while it works. Called by cli.py; knows no engine.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from btx_api.stage import Progress

PLAIN_SECONDS = 15.0
"""Between two plain lines of a stage whose state does not change."""
RUNNING, SILENT = "Running", ("Pending", "Starting", "BackOff")
"""States (status.State): work goes on; worth no line of their own."""
HEADER = ("stage", "state", "step", "loss", "tokens", "tokens/s", "eta", "")
UP, CLEAR_BELOW = "\x1b[{}A", "\x1b[J"


class Stream(Protocol):
    """Where lines go: sys.stdout, or a test's buffer."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One stage as a person sees it."""

    run: str
    stage: str
    state: str
    """A word of status.State."""
    progress: Progress | None = None
    note: str = ""
    """Why it is in this state, in words."""


def count(number: float) -> str:
    """Powers of ten as in a manifest: 409600 -> 409.6K; up to 4 significant digits."""
    for power, letter in ((12, "T"), (9, "B"), (6, "M"), (3, "K")):
        if abs(number) >= 10**power:
            return f"{number / 10**power:.4g}{letter}"
    return f"{number:.4g}"


def duration(seconds: float) -> str:
    """7s, 2m05s, 3h07m, 2d04h."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{int(seconds) % 60:02}s" if minutes else f"{int(seconds)}s"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns; a column whose filled cells all begin like a number is flush right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [
        any(column[1:]) and all(cell[0] in "-+.<0123456789" for cell in column[1:] if cell)
        for column in columns
    ]
    return [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in (header, *rows)
    ]


def cells(line: Line) -> tuple[str, ...]:
    """The columns of HEADER for one stage."""
    p = line.progress
    if p is None:
        return (line.stage, line.state, "", "", "", "", "", line.note)
    return (
        line.stage,
        line.state,
        f"{p.step}/{p.steps}" if p.steps else "",
        "" if p.loss is None else f"{p.loss:.4f}",
        count(p.tokens) if p.tokens else "",
        count(p.tokens_per_second) if p.tokens_per_second else "",
        "" if p.eta_seconds is None else duration(p.eta_seconds),
        line.note or p.phase,
    )


def plain(line: Line) -> str:
    """One stage as one line of a log."""
    *values, note = cells(line)
    told = [f"{name} {value}" for name, value in zip(HEADER, values, strict=False) if value][2:]
    rest = ", ".join(part for part in (*told, note) if part)
    return f"{line.run}/{line.stage}: {line.state}" + (f" ({rest})" if rest else "")


def drawing(lines: Sequence[Line], width: int, height: int) -> list[str]:
    """The table of all runs, cut to the terminal: stages at rest give way to a count of them."""
    runs = dict.fromkeys(line.run for line in lines)
    if len(lines) + 2 * len(runs) > height:
        lines = [line for line in lines if line.state == RUNNING]
    header, *rows = table(HEADER, [cells(line) for line in lines])
    drawn = [f"  {header}"]
    for run in runs:
        drawn.append(run)
        drawn += [f"  {row}" for row, line in zip(rows, lines, strict=True) if line.run == run]
    return [row[: width - 1] for row in drawn[: height - 1]]


@dataclass(kw_only=True)
class Screen:
    """Shows the stages of all runs of this process, over and over."""

    stream: Stream
    clock: Callable[[], float]
    """Seconds; only differences count."""
    size: Callable[[], tuple[int, int]] = shutil.get_terminal_size
    drawn: int = 0
    """Lines of the table that is on the terminal now."""
    told: dict[tuple[str, str], tuple[str, float]] = field(default_factory=dict)
    """Plain lines: (state and note) last written of each stage, and when."""

    def show(self, lines: Sequence[Line]) -> None:
        """Draws the table again, or writes what is new."""
        if self.stream.isatty():
            rows = drawing(lines, *self.size())
            self._write([self._erasure(), *(f"{row}\n" for row in rows)])
            self.drawn = len(rows)
        else:
            self._write([f"{plain(line)}\n" for line in lines if self._is_news(line)])

    def say(self, text: str) -> None:
        """Writes a line that stays; the table is drawn below it the next time."""
        self._write([self._erasure(), f"{text}\n"])

    def _erasure(self) -> str:
        lines, self.drawn = self.drawn, 0
        return UP.format(lines) + CLEAR_BELOW if lines else ""

    def _write(self, parts: Sequence[str]) -> None:
        # A reader that has gone (`btx run | head`) is no reason to stop the work.
        with suppress(OSError):
            self.stream.write("".join(parts))
            self.stream.flush()

    def _is_news(self, line: Line) -> bool:
        """A stage's first line, a change of its state, or work worth a line by now."""
        key, state, now = (line.run, line.stage), f"{line.state} {line.note}", self.clock()
        before, when = self.told.get(key, ("", now))
        working = line.state == RUNNING and line.progress is not None
        again = working and now - when >= PLAIN_SECONDS
        if line.state in SILENT or (state == before and not again):
            return False
        self.told[key] = (state, now)
        return True
