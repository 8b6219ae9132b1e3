"""One control plane and one hollow node for the folder's tests; a namespace for each test."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.control_plane import Cluster, control_plane
from cluster.hollow_node import hollow_node
from kubernetes import client

BUILD = Path(__file__).parent.parent.parent / "build/cluster"


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
