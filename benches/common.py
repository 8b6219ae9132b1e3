"""What every bench shares: ours and the peer in turns, medians with their spread, and the files.

A bench runs each contender in a process of its own (`run`), in interleaved rounds (`rounds`), and
turns the samples into rows (`row`) of `build/bench/<name>.json` (`finish`), from which
write_docs.py makes docs/performance.md. Nothing heavy is imported here: a child's peak memory
begins at that of the process that started it.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build/bench"
PEERS = ROOT / "build/peers/bin"
"""Programs of the peers' own virtual environment (`make build/peers/.ready`)."""
OURS = Path(sys.executable)
POLL_SECONDS = 0.1
SIZES = ("VmHWM", "RssAnon")
"""What /proc/PID/status says of memory: the largest resident size, and what no file backs now."""
BYTECODE = {"PYTHONDONTWRITEBYTECODE": ""}
"""Nobody compiles the same sources in every process: an image has them compiled."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measured process, or one measured stretch of one."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds, user and system, children that it has waited for included."""
    peak: int = 0
    """Most resident memory, in bytes."""
    anonymous: int = 0
    """Of it, most that no file backs, in bytes."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What the process said of itself: the JSON object on its last line of output."""


def options(description: str) -> argparse.Namespace:
    """`--tiny`: everything once, in seconds, into build/bench/tiny; `--rounds N`."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a smoke test: no figure means much")
    parser.add_argument("--rounds", type=int, default=0, help="of every comparison")
    return parser.parse_args()


def peer(program: str) -> Path | None:
    """A program of the peers' environment; None, and a line that says so, without it."""
    path = PEERS / program
    if path.exists():
        return path
    print(f"LEFT OUT: {program} (no build/peers: run `make build/peers/.ready`)", flush=True)
    return None


def run(command: Sequence[str | Path], **environment: str) -> Sample:
    """Runs a process to its end and measures it; SystemExit with its output if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command], env={**os.environ, **BYTECODE, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    peaks = dict.fromkeys(SIZES, 0)
    watching = threading.Thread(target=_watch, args=(process.pid, peaks))
    watching.start()
    assert process.stdout
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    watching.join()
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}:\n{output[-4000:]}")
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return Sample(
        wall=wall, cpu=usage.ru_utime + usage.ru_stime, peak=peaks["VmHWM"],
        anonymous=peaks["RssAnon"], values=json.loads(lines[-1]) if lines else {},
    )  # fmt: skip


def _watch(pid: int, peaks: dict[str, int]) -> None:
    """Keeps the largest sizes (bytes) that the kernel tells of a process, until it ends.

    With its children, each of which counts with its own.
    """
    while sizes := _sizes(pid):
        family = [sizes, *filter(None, map(_sizes, _children(pid)))]
        for name, largest in peaks.items():
            peaks[name] = max(largest, sum(member[name] for member in family))
        time.sleep(POLL_SECONDS)


def _sizes(pid: int) -> dict[str, int]:
    """Of a process, in bytes; nothing if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    found = dict(line.split(":", 1) for line in status.splitlines())
    # A process that has ended has no memory, and is there until it was waited for.
    return {name: int(found[name].split()[0]) * 1024 for name in SIZES if name in found}


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, tasks.read_text().split())
        except OSError:
            continue
    return found


def rounds(
    count: int, contenders: Mapping[str, Callable[[], Sample]], *, warm: bool = True
) -> dict[str, list[Sample]]:
    """`count` samples of each, in turns, so that a slow minute of the machine meets them all.

    Every other round runs backwards. With `warm` a first round is not counted: it fills the page
    cache.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    for number in range(-1 if warm else 0, count):
        order = list(contenders.items())
        for name, contender in order if number % 2 else reversed(order):
            sample = contender()
            print(f"  {name}: {sample.wall:.2f} s, {sample.cpu:.2f} s of CPU", flush=True)
            if number >= 0:
                samples[name].append(sample)
    return samples


def row(
    metric: str, ours: Iterable[float], peer: Iterable[float] = (), *,
    peer_name: str = "", unit: str = "s", goal: str = "", limit: str = "", **more: Any,
) -> Row:  # fmt: skip
    """One line of the table: medians, their ratio, and the range of the ratios round by round.

    `goal` is about the ratio, `limit` about ours, each as `<= 0.5`; `more` joins the row.
    """
    mine, theirs = list(ours), list(peer)
    found = statistics.median(mine)
    row: Row = {"metric": metric, "ours": found, "ours_range": [min(mine), max(mine)]}
    row |= {"peer": None, "peer_name": peer_name, "unit": unit, "ratio": None, "goal": goal}
    if theirs:
        row["peer"] = statistics.median(theirs)
        row["peer_range"] = [min(theirs), max(theirs)]
        row["ratio"] = found / row["peer"]
        ratios = [a / b for a, b in zip(mine, theirs, strict=False)]
        row["ratio_range"] = [min(ratios), max(ratios)]
        row["met"] = holds(row["ratio"], goal)
    if limit:
        row |= {"limit": limit, "met": holds(found, limit)}
    return row | {"rounds": len(mine)} | more


def holds(value: float, goal: str) -> bool | None:
    """Whether `value` is as `goal` (`<= 0.5`) wants it; None without a goal."""
    if not goal:
        return None
    sign, bound = goal.split()
    return value <= float(bound) if sign == "<=" else value >= float(bound)


def finish(
    name: str, rows: Sequence[Row], *, tiny: bool, packages: Iterable[str] = (), **others: str
) -> None:
    """Prints the table and writes `build/bench/<name>.json`, a list of rows.

    Every row names the machine and the versions of Python and `packages`, peers' included, and of
    `others`, which are no packages.
    """
    folder = RESULTS / "tiny" if tiny else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "machine": machine(), "versions": versions(packages) | others, "date": time.strftime("%F")
    }  # fmt: skip
    path = folder / f"{name}.json"
    rows = [{**row, **about, **({"met": None} if tiny else {})} for row in rows]
    path.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(_line(row))
    print(f"{path.relative_to(ROOT)}; {about['machine']}; {about['versions']}")


def _line(row: Row) -> str:
    line = f"{row['metric']}: {row['ours']:.4g} {row['unit']}"
    if row["peer"] is not None:
        low, high = row["ratio_range"]
        line += f", {row['peer_name']} {row['peer']:.4g}, ratio {row['ratio']:.3f}"
        line += f" ({low:.3f} to {high:.3f} over {row['rounds']} rounds)"
    elif row["peer_name"]:
        line += f", {row['peer_name']} left out"
    wanted = row["goal"] or row.get("limit", "")
    verdict = {True: "met", False: "MISSED", None: "not judged"}[row.get("met")]
    return line + (f"; goal {wanted}: {verdict}" if wanted else "")


def machine() -> str:
    """Processor, cores, memory and kernel, in words."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((x.split(":")[1] for x in info.splitlines() if x.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    name = model.strip() or platform.machine()
    return f"{name}, {cores} cores, {memory:.0f} GiB, Linux {platform.release()}"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of packages, here or else in the peers' environment."""
    found = {"python": platform.python_version()}
    site = next(iter(PEERS.parent.glob("lib/python*/site-packages")), None)
    theirs = importlib.metadata.distributions(path=[str(site)]) if site else []
    installed = {d.metadata["Name"].lower(): d.version for d in theirs}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = installed.get(package, "left out")
    return found
