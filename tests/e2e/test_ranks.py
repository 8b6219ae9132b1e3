"""`btx run` of a stage on two ranks: from the manifest to the model, with the real trainer."""

import json
from pathlib import Path

from workspace import Workspace


def test_a_stage_on_two_ranks_succeeds(tmp_path: Path) -> None:
    """execution.train.processes: 2 is all that is asked for; the artifact is any other's."""
    workspace = Workspace.with_inputs(tmp_path / "w")
    workspace.btx("run", workspace.manifest(method="Dense", execution={"train": {"processes": 2}}))

    assert workspace.status().state == "Succeeded"
    (log,) = (workspace.folder / ".btx/runs/tiny/logs").glob("train*.log")
    assert "rank 0 of 2" in log.read_text()
    stage = log.name.rpartition("-")[0]
    lines = (workspace.artifact(stage) / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, len(lines) + 1)]
    assert workspace.survivors() == []
