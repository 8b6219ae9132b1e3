"""What the terminal shows: numbers for people, aligned tables, a table in place, plain lines."""

import io
import re

import pytest
from btx_api.stage import Progress
from btx_operator.render import Line, Screen, count, drawing, duration, plain, table

STEP = Progress(
    phase="training", step=20, steps=200, tokens=40_960, tokens_per_second=2048.0, loss=3.14159,
    eta_seconds=88.4,
)  # fmt: skip


class Terminal(io.StringIO):
    """A terminal that knows line feed, cursor up and erase below."""

    def isatty(self):
        return True

    def seen(self):
        """The lines a person sees now."""
        rows, at = [""], 0
        for up, erase, feed, text in re.findall(
            r"\x1b\[(\d+)A|(\x1b\[J)|(\n)|([^\x1b\n]+)", self.getvalue()
        ):
            if up:
                at -= int(up)
            elif erase:
                rows = [*rows[:at], ""]
            elif feed:
                at += 1
                rows += [""] * (at == len(rows))
            else:
                assert not rows[at], "text over text"
                rows[at] = text
        return [row for row in rows if row]


def screen(stream, times=()):
    """A screen of 80 by 24 with a scripted clock."""
    ticks = iter(times)
    return Screen(stream=stream, clock=lambda: next(ticks), size=lambda: (80, 24))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (409_600, "409.6K"), (2e6, "2M"), (4_194_304, "4.194M"),
     (210e9, "210B"), (1.5e12, "1.5T"), (0.25, "0.25")],
)  # fmt: skip
def test_counts_are_written_as_in_a_manifest(number, text):
    """K, M, B and T are powers of ten, four digits at the most."""
    assert count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.9, "59s"), (60, "1m00s"), (3599, "59m59s"), (11_220, "3h07m"),
     (187_200, "2d04h")],
)  # fmt: skip
def test_durations_have_two_units(seconds, text):
    """Seconds up to a minute, then the two largest units."""
    assert duration(seconds) == text


def test_tables_align_numbers_right_and_words_left():
    """A column of numbers ends in line, a column of words begins in line."""
    lines = table(("stage", "tokens"), [("train-code", "409.6K"), ("mix", ""), ("finetune", "2K")])
    assert lines == [
        "stage       tokens",
        "train-code  409.6K",
        "mix",
        "finetune        2K",
    ]


def test_a_plain_line_names_run_stage_and_numbers():
    """Step, loss, tokens, speed and time to go are in the line; absent numbers are not."""
    line = Line(run="demo", stage="train-code", state="Running", progress=STEP)
    assert plain(line) == (
        "demo/train-code: Running (step 20/200, loss 3.1416, tokens 40.96K, tokens/s 2.048K, "
        "eta 1m28s, training)"
    )
    assert plain(Line(run="demo", stage="mix", state="Complete")) == "demo/mix: Complete"
    failed = Line(run="demo", stage="mix", state="Failed", note="no space")
    assert plain(failed) == "demo/mix: Failed (no space)"


def test_plain_lines_come_with_a_change_and_now_and_then():
    """Waiting is silent, a change is told once, running work again after a while, rest never."""
    stream, times = io.StringIO(), [0.0, 0.5, 1.0, 14.0, 16.5, 17.0, 99.0]
    show = screen(stream, times).show
    for state in ("Pending", "Starting", "Running", "Running", "Running", "Complete", "Complete"):
        progress = STEP if state == "Running" else None
        show([Line(run="r", stage="s", state=state, progress=progress)])
    states = [text.split()[1] for text in stream.getvalue().splitlines()]
    assert states == ["Running", "Running", "Complete"]


def test_a_terminal_shows_one_table_however_often_it_is_drawn():
    """Each drawing replaces the one before; a message stays above it."""
    stream = Terminal()
    shown = screen(stream)
    for step in range(3):
        progress = STEP.model_copy(update={"step": step})
        shown.show([
            Line(run="demo", stage="train-code", state="Running", progress=progress),
            Line(run="demo", stage="mix", state="Pending"),
        ])  # fmt: skip
        if step == 0:
            shown.say("note: hello")
    seen = stream.seen()
    assert [line.split()[0] for line in seen] == ["note:", "stage", "demo", "train-code", "mix"]
    assert "2/200" in seen[3]


def test_a_table_never_outgrows_the_terminal():
    """Stages at rest give way to running ones; lines and their number are cut to the window."""
    lines = [Line(run="r", stage=f"s{i}", state="Pending") for i in range(40)]
    lines[30] = Line(run="r", stage="s30", state="Running", progress=STEP, note="x" * 200)
    drawn = drawing(lines, 60, 10)
    assert [line.split()[0] for line in drawn] == ["stage", "r", "s30"]
    assert max(map(len, drawn)) < 60
    busy = [Line(run="r", stage=f"s{i}", state="Running") for i in range(40)]
    assert len(drawing(busy, 60, 10)) < 10
