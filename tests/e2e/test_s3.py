"""The whole graph on a real S3 server: through every fault of the wire, and repaired when broken."""

import json
import resource
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import google_crc32c
import pytest
import yaml
from fault_proxy import ALL, Fault, Script, faulty
from s3_server import BUCKET, SECRET_KEY, written_down
from workspace import Workspace

FILES = ("build/demo/data", "build/demo/init")


class OnS3:
    """A run of a workspace whose inputs and storage are in the bucket, looked at directly."""

    def __init__(self, workspace: Workspace, endpoint: str, prefix: str) -> None:
        self.workspace, self.prefix = workspace, prefix
        self.client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        self.rows = {row.name: row.digest for row in workspace.status().stages}

    def manifest_key(self, stage: str) -> str:
        kind = stage.split("-", maxsplit=1)[0]
        return f"{self.prefix}/stages/{kind}/{self.rows[stage]}/manifest.json"

    def manifest(self, stage: str) -> dict[str, Any]:
        return dict(json.loads(self.read(self.manifest_key(stage))))

    def key(self, stage: str, name: str) -> str:
        """Key of a file of a committed stage."""
        folder = self.manifest_key(stage).rpartition("/")[0]
        return f"{folder}/attempts/{self.manifest(stage)['token']}/{name}"

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def checksums(self) -> dict[str, dict[str, str]]:
        """crc32c by stage and file, each computed from the bytes that the server holds."""
        found: dict[str, dict[str, str]] = {}
        for stage in self.rows:
            found[stage] = {}
            for entry in self.manifest(stage)["files"]:
                data = self.read(self.key(stage, entry["name"]))
                crc = f"{google_crc32c.value(data):08x}"
                assert (len(data), crc) == (entry["size"], entry["crc32c"]), (stage, entry)
                found[stage][entry["name"]] = crc
        return found

    def unfinished(self) -> list[str]:
        """Keys of multipart uploads under way."""
        answer = self.client.list_multipart_uploads(Bucket=BUCKET, Prefix=self.prefix)
        return [upload["Key"] for upload in answer.get("Uploads", [])]


def storage(endpoint: str, prefix: str) -> dict[str, Any]:
    return {
        "uri": f"s3://{BUCKET}/{prefix}", "endpoint": endpoint, "region": "us-east-1",
        "pathStyle": True,
    }  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The demo's inputs, made once."""
    return Workspace.with_inputs(tmp_path_factory.mktemp("inputs") / "w")


@pytest.fixture(scope="module")
def outside(inputs: Workspace, s3_endpoint: str) -> str:
    """The same inputs in the bucket; returns their prefix."""
    prefix = f"inputs-{uuid.uuid4().hex}"
    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1")
    for folder in FILES:
        for path in (inputs.folder / folder).rglob("*"):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(inputs.folder)}"
                client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
    return prefix


def with_inputs_there(workspace: Workspace, prefix: str, **changes: Any) -> str:
    """A manifest whose seed and sources are s3://, trained on one thread each."""
    name = workspace.manifest(
        execution={kind: {"threads": 1} for kind in ("train", "finetune", "evaluate")},
        finetune__data__0__domains={"code": 1, "math": 1},
        evaluate__domains=[{"name": "code"}, {"name": "math"}],
        **changes,
    )
    path = workspace.folder / name
    run = yaml.safe_load(path.read_text().replace("file://build", f"s3://{BUCKET}/{prefix}/build"))
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return name


@pytest.fixture(scope="module")
def finished(
    inputs: Workspace, outside: str, s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OnS3]:
    """A run without faults."""
    workspace = inputs.copy(tmp_path_factory.mktemp("finished") / "w")
    prefix = f"plain-{uuid.uuid4().hex}"
    there = storage(s3_endpoint, prefix)
    workspace.btx("run", with_inputs_there(workspace, outside, storage=there))
    yield OnS3(workspace, s3_endpoint, prefix)


def test_a_run_through_every_fault_ends_in_the_same_bytes(
    inputs: Workspace, outside: str, finished: OnS3, s3_endpoint: str, tmp_path: Path
) -> None:
    """Same digests, same bytes; nothing corrupt was accepted; memory as without faults."""
    workspace = inputs.copy(tmp_path / "w")
    prefix = f"faulty-{uuid.uuid4().hex}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    script = Script(rates=ALL, seed=11)
    with faulty(s3_endpoint, script) as proxy:
        there = storage(proxy.endpoint, prefix)
        workspace.btx("run", with_inputs_there(workspace, outside, storage=there))
    run = OnS3(workspace, s3_endpoint, prefix)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss

    print(f"faults: {dict(script.counts)} in {script.seen.total()} requests")
    print(f"attempts: {workspace.attempts()}; max RSS {before >> 10} -> {peak >> 10} MiB")
    assert workspace.status().state == "Succeeded"
    assert run.rows == finished.rows
    ours, theirs = run.checksums(), finished.checksums()
    for stage in ours:
        for name in ours[stage]:
            if not name.startswith("report.") and name != "README.md":  # they tell times
                assert ours[stage][name] == theirs[stage][name], (stage, name)
    assert script.counts.keys() == set(Fault)
    assert run.unfinished() == []
    assert peak <= max(before, 1) * 1.25


def changed(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """How many attempts each stage has more."""
    return {name: after[name] - n for name, n in before.items() if after[name] != n}


def flip(run: OnS3) -> None:
    """As a disk does: the server tells nothing, only reading does."""
    key = run.key("train-code", "model.safetensors")
    data = bytearray(run.read(key))
    data[-7] ^= 0x40
    run.client.put_object(Bucket=BUCKET, Key=key, Body=bytes(data), ChecksumAlgorithm="SHA256")


def remove(run: OnS3) -> None:
    run.client.delete_object(Bucket=BUCKET, Key=run.key("train-code", "model.safetensors"))


def spoil_manifest(run: OnS3) -> None:
    run.client.put_object(Bucket=BUCKET, Key=run.manifest_key("train-code"), Body=b'{"digest": 1')


@pytest.mark.parametrize("damage", [flip, remove, spoil_manifest])
def test_what_is_broken_is_made_again_by_its_producer_alone(finished: OnS3, damage: Any) -> None:
    """Damaged expert: one more attempt of its training, the same bytes; no other stage trains."""
    run, workspace = finished, finished.workspace
    sums, before = run.checksums(), workspace.attempts()
    damage(run)
    arguments = ["--verify"] if damage is flip else []

    workspace.btx("run", "tiny.yaml", *arguments)

    assert changed(before, workspace.attempts()) == {"train-code": 1}
    assert run.checksums() == sums


def test_no_credential_is_written_down(
    inputs: Workspace, outside: str, finished: OnS3, s3_endpoint: str, tmp_path: Path
) -> None:
    """Not in what is printed, logs, status, manifests, reports, artifacts; nor of a refused one."""
    token, wrong = "planted-hub-token", "planted-wrong-secret"
    refused = inputs.copy(tmp_path / "w")
    refused.environment |= {"AWS_SECRET_ACCESS_KEY": wrong, "HF_TOKEN": token}
    there = storage(s3_endpoint, f"refused-{uuid.uuid4().hex}")
    said = refused.btx("run", with_inputs_there(refused, outside, storage=there), code=78)
    # The URI is long, and the line has its field and its reason.
    [line] = [line for line in said.splitlines() if "storage.uri: " in line]
    assert line.endswith("SignatureDoesNotMatch"), said

    here = finished.workspace
    said += here.btx("report", "tiny") + here.btx("status", "tiny") + here.btx("status")
    paths = [p for w in (here, refused) for p in w.folder.rglob("*") if p.is_file()]
    pages = finished.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
    mine = [key for key in keys if key.startswith(finished.prefix)]
    texts = [said, *(path.read_bytes() for path in paths), *map(finished.read, mine)]
    names = [path.name for path in paths] + mine

    assert written_down(*texts, *names, secrets=[SECRET_KEY, token, wrong]) == []
    # What was searched holds what it should: logs, a status, a report, every manifest.
    assert any(path.suffix == ".log" for path in paths)
    assert {"status.json", "report.html", "report.json"} <= {path.name for path in paths}
    assert sum(key.endswith("/manifest.json") for key in mine) >= len(finished.rows)
    assert written_down(f"x {SECRET_KEY}", secrets=[SECRET_KEY])
