"""The benches run: each once on the smallest input, its file with every field, the page from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIELDS = {"metric", "ours", "peer", "peer_name", "unit", "ratio", "goal", "machine", "versions"}
RUNNER = """
import runpy, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import common, write_docs
common.RESULTS, common.PEERS = Path(sys.argv[2]), Path(sys.argv[2]) / "no peers"
common.ROOT = Path(sys.argv[2])
write_docs.TARGET = Path(sys.argv[2]) / "performance.md"
script, sys.argv = sys.argv[3], [sys.argv[3], *sys.argv[4:]]
if script == "write_docs":
    write_docs.main()
else:
    runpy.run_path(f"{sys.path[0]}/{script}.py", run_name="__main__")
"""


def run(folder: Path, *script: str) -> str:
    """Runs a bench without peers and with its results below `folder`; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(ROOT / "benches"), str(folder), *script],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "peer", "without_ratio"),
    [
        ("mix", "mergekit-moe", {True, False}), ("prepare", "python", {True, False}),
        ("train", "python", {True, False}), ("s3", "s5cmd", {True}),
    ],
)  # fmt: skip
def test_a_bench_runs_and_says_which_peer_is_left_out(tmp_path, name, peer, without_ratio):
    """Without build/peers ours is measured all the same; the row has no ratio with that peer."""
    out = run(tmp_path, f"bench_{name}", "--tiny")
    assert f"LEFT OUT: {peer}" in out
    rows = json.loads((tmp_path / f"tiny/{name}.json").read_text())
    assert all(row.keys() >= FIELDS for row in rows)
    assert all(row["ours"] > 0 for row in rows)
    assert {row["ratio"] is None for row in rows} == without_ratio
    assert not (tmp_path / name).exists(), "gigabytes stay behind"


def test_the_page_has_figures_and_says_what_is_missing(tmp_path):
    """Rows become a table with the verdict on each goal; a bench that did not run is named."""
    about = {"machine": "a machine", "versions": {"python": "3"}, "date": "2020-01-02"}
    row = {
        "metric": "mix x", "ours": 4.0, "peer": 10.0, "peer_name": "cp", "unit": "s", "ratio": 0.4,
        "ratio_range": [0.3, 0.5], "goal": "<= 0.5", "met": True, "rounds": 5,
    }  # fmt: skip
    slow = {**row, "metric": "mix y", "ratio": 0.6, "met": False}
    (tmp_path / "mix.json").write_text(json.dumps([{**r, **about} for r in (row, slow)]))
    run(tmp_path, "write_docs")
    page = (tmp_path / "performance.md").read_text()
    assert "| mix x | 4 | 10 | cp | s | **0.40** | 0.30 to 0.50 (5) | ratio <= 0.5 | met |" in page
    assert "| **missed** |" in page
    assert "Measured 2020-01-02 on a machine; python 3." in page
    assert "no `build/bench/prepare.json`" in page
    assert "no `build/bench/train-gpu.json` (`make bench-train DEVICE=cuda`)" in page
