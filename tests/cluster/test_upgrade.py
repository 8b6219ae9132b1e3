"""An upgrade, and the way back, while runs are in train and in finetune: nothing is done twice.

Before is the operator and the CRD of an earlier commit, out of this repository's history; after is
what is in the tree, and its CRD has one field more.
"""

import copy
import io
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.control_plane import Cluster
from cluster.operator_process import Operator, grant
from cluster.runs import established
from cluster.space import ROOT, TOLD, Space, attempt, row_of, running, scripted
from kubernetes import client

BEFORE = "a86b1b7e78a400fe4ea6f7e7fd26647e9670b6db"
CRD = "crds/btxruns.btx.dev.yaml"


class Another(Operator):
    """The operator of other sources."""

    def __init__(self, cluster: Cluster, kubeconfig: Path, *, sources: Path, name: str) -> None:
        super().__init__(cluster, kubeconfig, name=name)
        self._path = f"{sources / 'crds'}:{sources / 'operator'}"

    def start(self) -> None:
        """See Operator."""
        super().start()
        part = self.cluster.parts[self.name]
        if "PYTHONPATH" not in part.environment:
            part.stop(kill=True)
            part.environment = {**part.environment, "PYTHONPATH": self._path}
            part.start()


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the earlier commit."""
    folder = tmp_path_factory.mktemp("before")
    done = subprocess.run(
        ["git", "archive", BEFORE, "crds", "operator"], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, f"commit {BEFORE} is not in this clone's history: {done.stderr!r}"
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def apply(cluster: Cluster, crd: dict[str, Any]) -> None:
    """Creates the CRD, or replaces its spec, and waits until it is served so."""
    api = cluster.client()
    extensions = client.ApiextensionsV1Api(api)
    name = crd["metadata"]["name"]
    try:
        extensions.create_custom_resource_definition(crd)
    except client.ApiException as error:
        assert error.status == 409
        patch = {"spec": {"versions": crd["spec"]["versions"]}}
        extensions.patch_custom_resource_definition(name, patch)
    established(cluster, api, name)


def without_a_field(crd: dict[str, Any]) -> dict[str, Any]:
    """A CRD as it was before `suspend` was a field of the spec."""
    earlier = copy.deepcopy(crd)
    root = earlier["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    del root["properties"]["suspend"]
    return earlier


@pytest.fixture
def operators(cluster: Cluster, before: Path) -> Iterator[tuple[Operator, Operator]]:
    """The old one and the new one, under the same account; none runs."""
    rights = grant(cluster)
    old = Another(cluster, rights, sources=before, name="before")
    new = Operator(cluster, rights, name="after")
    yield old, new
    for one in (old, new):
        if one.name in cluster.parts:
            one.stop()
            del cluster.parts[one.name]


def test_up_and_back_and_up(
    cluster: Cluster, api: client.ApiClient, hollow: str, before: Path,
    operators: tuple[Operator, Operator],
) -> None:  # fmt: skip
    """0 retrained, 0 Jobs twice; objects of both schemas are served by both; all succeed."""
    old, new = operators
    earlier = without_a_field(yaml.safe_load((before / CRD).read_text()))
    later = yaml.safe_load((ROOT / CRD).read_text())
    apply(cluster, earlier)
    space = Space(cluster, api, "test-upgrade")
    try:
        old.start()
        old.wait_ready()
        space.run("training", execution=scripted(train=TOLD))
        space.run(
            "tuning",
            storage={"uri": f"file://{space.name}/2"},
            execution=scripted(finetune=TOLD),
        )
        held = [("train-code", "training"), ("train-math", "training"), ("finetune", "tuning")]
        for stage, name in held:
            space.pod(stage, running, name)
            space.until_row(stage, name, state="Running")

        apply(cluster, later)
        exchange(old, new)
        space.run("later", storage={"uri": f"file://{space.name}/3"}, suspend=True)
        space.until(lambda run: run.get("status", {}).get("state") == "Suspended", "later")
        space.edit("later", suspend=False)
        space.succeeded("later")
        unmoved(space, held)

        apply(cluster, earlier)
        exchange(new, old)
        space.run("between", storage={"uri": f"file://{space.name}/4"})
        space.succeeded("between")
        assert row_of(space.get("later"), "finetune")["state"] == "Complete"
        unmoved(space, held)

        apply(cluster, later)
        exchange(old, new)
        for stage, name in held:
            space.release(stage, name=name)
        for name in ("training", "tuning", "later", "between"):
            run = space.succeeded(name)
            rows = [row for row in run["status"]["stages"] if row.get("attempt", 0)]
            assert {row["attempt"] for row in rows} == {1}
            assert not any(row.get("failures") or row.get("lost") for row in rows)
            jobs = space.jobs(name=name)
            assert {attempt(job) for job in jobs} == {1}
            assert len({job["metadata"]["name"] for job in jobs}) == len(jobs)
        commits = space.commits()
        assert commits.count("train-code") == commits.count("train-math") == 4
        assert commits.count("finetune") == 4
    finally:
        space.close()


def exchange(gone: Operator, come: Operator) -> None:
    """A Deployment of one with strategy Recreate: the old pod ends before the new one begins."""
    gone.stop()
    come.start()
    come.wait_ready()


def unmoved(space: Space, held: list[tuple[str, str]]) -> None:
    """What was running runs on: the same single Job, nothing counted."""
    for stage, name in held:
        row = space.row(stage, name)
        assert (row["state"], row["attempt"]) == ("Running", 1)
        assert not row.get("failures") and not row.get("lost")
        assert [attempt(job) for job in space.jobs(stage, name)] == [1]
