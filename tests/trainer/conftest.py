"""Storage of both schemes for the trainer's tests."""

import uuid
from pathlib import Path

import pytest
from btx_api.spec import Storage
from btx_trainer import s3 as s3_module
from btx_trainer import s3_parts
from btx_trainer.storage import Store, open_store
from s3_server import BUCKET
from s3_stores import MIB


@pytest.fixture
def s3(s3_endpoint: str) -> Storage:
    """An empty prefix of the S3 server."""
    return Storage(
        uri=f"s3://{BUCKET}/{uuid.uuid4().hex}/storage", region="us-east-1", path_style=True,
        endpoint=s3_endpoint,
    )  # fmt: skip


@pytest.fixture(params=["file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty prefix, once of files and once of the S3 server."""
    if request.param == "file":
        return Storage(uri=f"file://{tmp_path / 'storage'}")
    found: Storage = request.getfixturevalue("s3")
    return found


@pytest.fixture
def store(storage: Storage) -> Store:
    """The same, opened."""
    return open_store(storage)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts, so that an object of a few MiB has several; no time is lost in pauses."""
    monkeypatch.setattr(s3_parts, "PART_BYTES", 5 * MIB)
    monkeypatch.setattr(s3_module, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(s3_module, "LONGEST_PAUSE_SECONDS", 0.01)


@pytest.fixture
def prefix() -> str:
    """URI of a prefix in which nothing is."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"
