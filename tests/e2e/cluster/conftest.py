"""One installation for the folder's tests. Needs root."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.cases import LONG, Case
from cluster.installation import Installation, installation
from workspace import Workspace

BUILD = Path(__file__).parent.parent.parent.parent / "build/cluster"


@pytest.fixture(scope="session")
def installed() -> Iterator[Installation]:
    """The operator on a real node, the demo's inputs in its S3 server."""
    assert os.geteuid() == 0, "a node needs root: network namespaces, mounts, cgroups, buildah"
    with installation(BUILD / "e2e") as found:
        yield found


@pytest.fixture(scope="session")
def inputs(installed: Installation, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The demo's data and randomly initialised model; also in S3, where the examples look."""
    workspace = Workspace.with_inputs(tmp_path_factory.mktemp("inputs") / "w")
    installed.upload(workspace.folder / "build/demo/init", "demo/seed")
    installed.upload(workspace.folder / "build/demo/data", "demo/data")
    return workspace


@pytest.fixture
def team(installed: Installation) -> str:
    """A new namespace as a user has it: restricted, with a way to S3."""
    return installed.namespace()


@pytest.fixture
def case(installed: Installation, inputs: Workspace) -> Iterator[Case]:
    """A run that is not applied yet; gone at the end, so that it takes no more of the machine."""
    made = Case(installed)
    yield made
    installed.kubectl("delete", "namespace", made.namespace, "--wait=false")


@pytest.fixture
def long_case(installed: Installation, inputs: Workspace) -> Iterator[Case]:
    """One that trains for about a minute."""
    made = Case(installed, tokens=LONG)
    yield made
    installed.kubectl("delete", "namespace", made.namespace, "--wait=false")
