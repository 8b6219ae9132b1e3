"""The `btx` command as a user runs it: real processes of btx, which start real trainer processes.

Stages are done by the stand-in of `standin/btx_trainer.py`, found through PYTHONPATH; tests that
need no stage at all take the real trainer (`trainer="real"`).
"""

import json
import os
import select
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from btx_operator.cli import main

STANDIN = Path(__file__).parent / "standin"
MANIFEST = """\
apiVersion: btx.dev/v1alpha1
kind: BTXRun
metadata: {{name: {name}}}
spec:
  method: {method}
  storage: {{uri: "file://storage"}}
  seed: {{uri: "file://seed"}}
  experts:
  - {{name: code, tokens: 2K, data: [{{uri: "file://code.txt"}}]}}
  - {{name: prose, tokens: 2K, data: [{{uri: "file://prose.txt"}}]}}
  prepare: {{tokenizer: bytes}}
  train: {{sequenceLength: 32, batchTokens: 128}}
  policy: {{backoffSeconds: 0}}
"""
STAGES = [
    "prepare-code", "prepare-prose", "train-code", "train-prose", "average", "mix", "finetune",
    "evaluate",
]  # fmt: skip


class Place:
    """A working directory with two manifests and a seed."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "seed").mkdir()
        for name, method in (("tiny", "BTX"), ("dense", "Dense")):
            text = MANIFEST.format(name=name, method=method)
            (folder / f"{name}.yaml").write_text(text)
        os.mkfifo(folder / "held")

    def start(self, *arguments, script=None, trainer="standin"):
        """A btx process with its output in pipes."""
        environment = {**os.environ, "SCRIPT": json.dumps(script or {}), "PYTHONUNBUFFERED": "1"}
        if trainer == "standin":
            environment["PYTHONPATH"] = str(STANDIN)
        command = [sys.executable, "-m", "btx_operator.cli", *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def btx(self, *arguments, **how):
        """(exit code, standard output, standard error) of a btx process that ended."""
        process = self.start(*arguments, **how)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def holders(self, number):
        """Waits until so many stand-ins hold; their process ids."""
        text, pipe = "", os.open(self.folder / "held", os.O_RDWR)
        while text.count("\n") < number:
            assert select.select([pipe], [], [], 60)[0], "nobody holds"
            text += os.read(pipe, 1000).decode()
        os.close(pipe)
        return [int(line) for line in text.split()]


@pytest.fixture
def place(tmp_path):
    """A fresh working directory."""
    return Place(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A working directory in which both manifests ran side by side, and what that printed."""
    place = Place(tmp_path_factory.mktemp("finished"))
    return place, *place.btx("run", "tiny.yaml", "dense.yaml")


def rows(text):
    """First words -> the other words of each line of a table."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}


def gone(pid):
    """Whether there is no such process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_run_goes_from_manifest_to_report(finished):
    """All stages complete, each is told, and at the end stand model, report and its summary."""
    _, code, out, err = finished
    assert (code, err) == (0, "")
    for stage in STAGES:
        assert f"tiny/{stage}: Complete" in out
    tiny, dense = out.split("\n\ntiny: ")[1].split("\ndense: ")
    assert tiny.startswith("Succeeded\n  model   file://storage/stages/finetune/")
    assert tiny.endswith("report  .btx/runs/tiny/report/report.html\n\nsummary of tiny\n")
    assert dense.startswith("Succeeded\n  model   file://storage/stages/train/")


def test_status_shows_every_stage_of_a_run(finished):
    """After the run every stage is Complete after one attempt, trained experts with their gain."""
    out = finished[0].btx("status", "tiny")[1]
    assert out.startswith("tiny: Succeeded\n")
    assert [rows(out)[stage][0] for stage in STAGES] == ["Complete"] * len(STAGES)
    assert rows(out)["train-code"][1:4] == ["1", "2K", "+0.5000"]
    assert rows(finished[0].btx("status")[1]) == {
        "run": ["method", "state", "complete", "process"],
        "dense": ["Dense", "Succeeded", "4/4"],
        "tiny": ["BTX", "Succeeded", "8/8"],
    }


def test_runs_side_by_side_make_a_shared_stage_once(finished):
    """What two runs of one process need is made by one of them; the other shows it as reused."""
    states = [rows(finished[0].btx("status", run)[1])["prepare-code"] for run in ("tiny", "dense")]
    assert sorted("yes" in state for state in states) == [False, True]


def test_a_second_run_reuses_everything(finished):
    """The same manifest again: no attempt of any stage, the same report."""
    place = finished[0]
    before = place.btx("status", "tiny")[1]
    code, out, _ = place.btx("run", "tiny.yaml")
    assert code == 0
    assert out.endswith("summary of tiny\n")
    assert place.btx("status", "tiny")[1] == before


def test_runs_are_reported_side_by_side(finished):
    """`btx report A B --out` makes one report of both there and prints its summary."""
    place = finished[0]
    out = place.btx("report", "tiny", "dense", "--out", "both")[1]
    assert out.endswith("summary of tiny, dense\n")
    assert (place.folder / "both" / "summary.txt").exists()


def test_a_model_is_exported_by_stage(finished):
    """The default is the final model; `--stage` takes any other by name, if the run has it."""
    place = finished[0]
    said = "exported to out with its model card\n"
    assert place.btx("export", "tiny", "out")[1] == f"tiny/finetune: {said}"
    assert place.btx("export", "dense", "out")[1] == f"dense/train-dense: {said}"
    other = place.btx("export", "tiny", "o", "--stage", "train-code")[1]
    assert other == "tiny/train-code: exported to o\n"
    assert "no stage 'train-x'" in place.btx("export", "tiny", "o", "--stage", "train-x")[2]


def test_a_plan_knows_what_is_complete(finished):
    """Nothing is left to run of a finished run; a changed expert is."""
    place = finished[0]
    assert "0 of 8 stages to run" in place.btx("plan", "tiny.yaml")[1]
    changed = place.btx("plan", "tiny.yaml", "--set", "experts[0].tokens=4K")[1]
    assert rows(changed)["train-code"][:3] == ["to", "run", "4.096K"]
    assert "5 of 8 stages to run" in changed


def test_failures_are_named_with_their_log_and_forgiven(place):
    """A stage that fails for good fails the command; after `btx retry` the run succeeds."""
    given = ("run", "dense.yaml", "--set", "policy.maxRetries=0")
    code, out, err = place.btx(*given, script={"train-dense": 70})
    assert code == 70
    assert "dense: Failed" in out
    assert out.count("as scripted") == 2
    assert "train-dense: attempt 1: exit 70: train-dense: as scripted, given up" in out
    failed = next(line for line in err.splitlines() if line.startswith("btx: dense/train-dense: "))
    assert Path(place.folder, failed.rpartition("(log ")[2].rstrip(")")).exists()
    assert "Traceback" not in out + err
    assert "dense/train-dense: is Failed" in place.btx("export", "dense", "out")[2]
    assert "evaluation is not complete (Failed)" in place.btx("report", "dense")[2]
    assert "at the next `btx run`" in place.btx("retry", "dense")[1]
    assert place.btx(*given)[0] == 0


HOLD = {"prepare-code": "hold", "prepare-prose": "hold"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_every_attempt_and_the_next_run_resumes(place, number):
    """Both trainers get SIGTERM and end, btx exits 128 + signal; run again succeeds."""
    process = place.start("run", "dense.yaml", "--slots", "2", script=HOLD)
    pids = place.holders(2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "stopping" in out
    assert "Traceback" not in err
    assert all(gone(pid) for pid in pids)
    assert place.btx("run", "dense.yaml")[0] == 0
    assert rows(place.btx("status", "dense")[1])["prepare-code"][:2] == ["Complete", "2"]


def test_a_second_signal_kills_what_does_not_stop(place):
    """A trainer that ignores SIGTERM is killed by the second Ctrl-C."""
    process = place.start("run", "dense.yaml", script={"prepare-code": "stubborn"})
    (pid,) = place.holders(1)
    process.send_signal(signal.SIGINT)
    while "stopping" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert gone(pid)


def test_a_run_at_work_is_shown_and_not_taken_over(place):
    """Status pulls step and loss from its trainer; a second `btx run` names the first process."""
    first = place.start("run", "dense.yaml", script={"train-dense": "hold"})
    place.holders(1)
    shown = place.btx("status", "dense")[1]
    assert shown.startswith(f"dense: Running, process {first.pid}\n")
    assert rows(shown)["train-dense"][:4] == ["Running", "1", "384/4.8K", "2.5000"]
    code, out, err = place.btx("run", "dense.yaml")
    assert (code, out) == (78, "")
    assert err == f"btx: run 'dense': process {first.pid} works on it; stop that one first\n"
    assert f"running process {first.pid}" in place.btx("refresh", "dense")[1]
    first.send_signal(signal.SIGINT)
    assert "dense/train-dense: Running" in first.communicate(timeout=60)[0]


def test_plan_lists_stages_without_running_any(place):
    """Every stage of both manifests with its state; nothing is made; done ones are complete."""
    code, out, _ = place.btx("plan", "tiny.yaml", "dense.yaml")
    assert code == 0
    plan = out.partition("dense: ")[0]
    assert [line.split()[0] for line in plan.splitlines()[3 : 3 + len(STAGES)]] == STAGES
    assert "8 of 8 stages to run" in plan
    assert "prepare-code   as in tiny" in out.partition("dense: ")[2]
    assert not (place.folder / "storage" / "stages").exists()
    assert not (place.folder / ".btx").exists()


def test_plan_and_run_name_what_is_missing(place):
    """A seed that is not there is one line on stderr with its field, from both commands."""
    (place.folder / "seed").rmdir()
    for command in ("plan", "run"):
        code, out, err = place.btx(command, "tiny.yaml")
        assert code != 0
        assert "btx: tiny: spec.seed.uri: no such folder: seed" in err.splitlines()
        assert "Traceback" not in out + err


def test_fields_for_a_cluster_are_noted_once(place):
    """A cluster's manifest runs here; one line names what is not read."""
    given = ("--set", "execution.train.nodeSelector={a: b}", "--set", "execution.train.nodes=2")
    code, out, _ = place.btx("plan", "dense.yaml", *given)
    assert code == 0
    fields = "execution.train.nodes, execution.train.nodeSelector"
    assert out.startswith(f"note: dense: only a cluster reads {fields}\n")


USAGE = [
    (("run", "none.yaml"), "btx: none.yaml: no such file or directory"),
    (("plan", "tiny.yaml", "--set", "x=1"), "btx: tiny.yaml: spec.x: unknown field"),
    (("plan", "tiny.yaml", "--set", "x"), "btx: tiny.yaml: --set x: is not path=value"),
    (("run", "tiny.yaml", "tiny.yaml"), "btx: metadata.name: 'tiny' is the name of 2 of the runs"),
    (("gc", "--storage", "hf://x", "--keep-days", "1"), "btx: --storage.uri: storage is file://"),
    (("status", "none"), "btx: run 'none': not found in .btx"),
    (("export", "none", "out"), "btx: run 'none': not found in .btx"),
    (("report", "none"), "btx: run 'none': not found in .btx"),
    (("retry", "none"), "btx: run 'none': not found in .btx"),
]


@pytest.mark.parametrize(("arguments", "line"), USAGE, ids=[" ".join(a) for a, _ in USAGE])
def test_a_users_error_is_one_line(place, monkeypatch, capsys, arguments, line):
    """Field or object and what is wrong on stderr, nothing on stdout, an exit code that says so."""
    monkeypatch.chdir(place.folder)
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == (78 if "'none'" in line else 2)
    assert out == ""
    assert err.startswith(line)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    ["", "nonsense", "run", "gc --keep-days 1", "gc tiny.yaml --keep-days 0",
     "run tiny.yaml --slots -1", "plan tiny.yaml --flops-per-second 0",
     "plan tiny.yaml --flops-per-second inf", "plan tiny.yaml --flops-per-second x"],
)  # fmt: skip
def test_wrong_usage_exits_2(arguments, capsys):
    """argparse says what is missing or no number above 0, and how the command is used."""
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    assert "usage: btx" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_traceback(finished):
    """`btx status | head -0` ends as the shell's own tools do."""
    with finished[0].start("status") as process:
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (128 + signal.SIGPIPE, "")


def test_version_is_that_of_the_distribution(place):
    """`btx --version` prints name and version."""
    assert place.btx("--version")[:2] == (0, f"btx {version('btx')}\n")


def test_the_real_trainer_answers_plan_and_gc(place):
    """Errands reach the real trainer: a missing seed is named, an empty storage has no stages."""
    (place.folder / "seed").rmdir()
    code, _, err = place.btx("plan", "tiny.yaml", trainer="real")
    assert code != 0
    assert "seed" in err
    assert "Traceback" not in err
    storage = ("--storage", "file://storage", "--keep-days", "1", "--dry-run")
    code, out, err = place.btx("gc", *storage, trainer="real")
    assert (code, err) == (0, "")
    assert "0 stages would be deleted" in out
