"""One control plane and one hollow node for each module of tests; a namespace for each test."""

import os
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.chaos import Deeds, plain_run
from cluster.control_plane import Cluster, control_plane
from cluster.hollow_node import hollow_node
from cluster.operator_process import Operator, operator
from cluster.space import Space, install
from kubernetes import client
from s3_server import free_ports

BUILD = Path(__file__).parent.parent.parent / "build/cluster"


def pytest_configure(config: pytest.Config) -> None:
    """The mark of test_features.py."""
    config.addinivalue_line("markers", "shows(behaviour, ...): rows of test_features.py")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A control plane; data and logs stay in build/cluster until the next start."""
    with control_plane(BUILD / f"tests-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}") as started:
        yield started


@pytest.fixture(scope="module")
def hollow(cluster: Cluster) -> Iterator[str]:
    """Name of a node whose pods follow their scripts."""
    with hollow_node(cluster) as name:
        yield name


@pytest.fixture(scope="module")
def api(cluster: Cluster) -> client.ApiClient:
    """The administrator's client."""
    return cluster.client()


@pytest.fixture
def namespace(cluster: Cluster, api: client.ApiClient) -> str:
    """A new namespace with its default service account."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    core = client.CoreV1Api(api)
    core.create_namespace({"metadata": {"name": name}})
    cluster.wait_for(
        "the service account",
        lambda: bool(core.list_namespaced_service_account(name).items),
    )
    return name


@pytest.fixture(scope="module")
def crd(cluster: Cluster) -> None:
    """BTXRuns are served."""
    install(cluster)


@pytest.fixture(scope="module")
def storage(cluster: Cluster, s3_endpoint: str) -> None:
    """The lanes of chaos.py keep their artifacts on a real S3 server."""
    cluster.s3_endpoint = s3_endpoint


@pytest.fixture(scope="module")
def plain_and_writes(
    cluster: Cluster, api: client.ApiClient, hollow: str, crd: None, storage: None
) -> tuple[Deeds, Counter[str]]:
    """A run without faults, and its writes by `verb resource`."""
    return plain_run(cluster, api)


@pytest.fixture(scope="module")
def plain(plain_and_writes: tuple[Deeds, Counter[str]]) -> Deeds:
    """A run without faults."""
    return plain_and_writes[0]


@pytest.fixture(scope="module")
def trainer_port() -> int:
    """Where the operator asks trainers for their progress."""
    return free_ports(1)[0]


@pytest.fixture(scope="module")
def engine(cluster: Cluster, hollow: str, crd: None, trainer_port: int) -> Iterator[Operator]:
    """An operator of the whole cluster."""
    settings = {
        "serviceAccounts": ["default", "gpu"], "imagePullSecrets": ["pull"],
        "trainerPort": trainer_port,
    }  # fmt: skip
    with operator(cluster, **settings) as started:
        yield started


@pytest.fixture
def space(cluster: Cluster, api: client.ApiClient, hollow: str, crd: None) -> Iterator[Space]:
    """A namespace with a user, a storage, and pods that follow their scripts."""
    made = Space(cluster, api, f"test-{uuid.uuid4().hex[:8]}")
    yield made
    made.close()
