"""Storage of both schemes for the trainer's tests."""

import uuid
from pathlib import Path

import pytest
from btx_api.spec import Storage
from btx_trainer.storage import Store, open_store
from s3_server import BUCKET


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
