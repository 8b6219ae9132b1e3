"""The operator as a user installs it: images by our Dockerfile, `helm install`, a real node.

Pods reach an S3 server on the host as http://s3:8333, a Service of their namespace.
"""

import contextlib
import json
import re
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import yaml
from btx_api.names import GROUP, PLURAL, VERSION
from cluster import binaries, images
from cluster.node import Node, real_node
from cluster.oci import Image
from kubernetes import client, watch
from s3_server import BUCKET, CREDENTIALS, serving

CHART = images.ROOT / "charts/btx-operator"
SYSTEM, RELEASE = "btx-system", "btx-operator"
SECRET = "s3-credentials"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
PATIENCE = 900
"""Seconds that a run of the tests' size is given on a busy machine."""


@dataclass
class Installation:
    """A cluster with the operator and an S3 server."""

    node: Node
    endpoint: str
    """Of the S3 server, from the host."""
    images: Mapping[str, Image]

    def kubectl(self, *words: str | Path, text: str = "", code: int = 0) -> str:
        """A command of the administrator's with this standard input; what it prints."""
        program, kubeconfig = binaries.kubectl(), self.node.cluster.kubeconfig
        return run(program, f"--kubeconfig={kubeconfig}", *words, text=text, code=code)

    def apply(self, namespace: str, *objects: Mapping[str, Any]) -> None:
        """Server-side apply."""
        text = yaml.safe_dump_all(objects)
        self.kubectl("apply", "--server-side", f"--namespace={namespace}", "-f", "-", text=text)

    def helm(self, *words: str | Path, code: int = 0) -> str:
        """The same for helm."""
        return run(
            binaries.helm(), *words, f"--kubeconfig={self.node.cluster.kubeconfig}", code=code
        )

    def install(self, found: Mapping[str, Image], **values: Any) -> None:
        """Hands images over and installs, or upgrades to, a release with them; waits until ready."""
        for image in found.values():
            self.node.hand_over(image)
        operator, trainer = (
            {"repository": image.repository, "tag": image.tag, "pullPolicy": "Never"}
            for image in (found["operator"], found["trainer"])
        )
        given = {"image": operator, "trainer": {"image": trainer}, **values}
        self.helm(
            "upgrade", "--install", RELEASE, CHART, f"--namespace={SYSTEM}", "--wait",
            "--timeout=3m", *(f"--set-json={key}={json.dumps(value)}" for key, value in given.items()),
        )  # fmt: skip

    def namespace(self) -> str:
        """A new restricted namespace with the Service s3 and the Secret with its credentials."""
        name = f"team-{uuid.uuid4().hex[:8]}"
        self.kubectl("create", "namespace", name)
        self.kubectl("label", "namespace", name, *(f"{k}={v}" for k, v in RESTRICTED.items()))
        host, port = urlsplit(self.endpoint).hostname, urlsplit(self.endpoint).port
        self.apply(
            name,
            {
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": "s3"},
                "spec": {"ports": [{"name": "s3", "port": 8333, "targetPort": port}]},
            },
            {
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {"name": "s3", "labels": {"kubernetes.io/service-name": "s3"}},
                "ports": [{"name": "s3", "port": port}], "endpoints": [{"addresses": [host]}],
            },
            {
                "apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET},
                "stringData": CREDENTIALS,
            },
        )  # fmt: skip
        return name

    def s3(self) -> Any:
        """A client of the bucket's server."""
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1")

    def upload(self, folder: Path, prefix: str) -> None:
        """Every file below a folder."""
        store = self.s3()
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            key = f"{prefix}/{path.relative_to(folder)}"
            store.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())

    def download(self, uri: str, folder: Path) -> Path:
        """Every object below `s3://bucket/prefix`."""
        store, prefix = self.s3(), urlsplit(uri).path.strip("/") + "/"
        pages = store.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        for entry in (entry for page in pages for entry in page.get("Contents", ())):
            target = folder / entry["Key"].removeprefix(prefix)
            target.parent.mkdir(parents=True, exist_ok=True)
            store.download_file(BUCKET, entry["Key"], str(target))
        return folder

    def ended(self, namespace: str, name: str, seconds: int = PATIENCE) -> dict[str, Any]:
        """The run once its condition Succeeded is True or False; fails with its story."""

        def over(item: Mapping[str, Any]) -> bool:
            return condition(item, "Succeeded").get("status", "Unknown") != "Unknown"

        return self.until(namespace, name, over, seconds)

    def until(
        self, namespace: str, name: str, wanted: Callable[[Mapping[str, Any]], bool],
        seconds: int = PATIENCE,
    ) -> dict[str, Any]:  # fmt: skip
        """The run as soon as it is as wanted; fails with its story."""
        api = client.CustomObjectsApi(self.node.cluster.client())
        stream = watch.Watch().stream(
            api.list_namespaced_custom_object, GROUP, VERSION, namespace, PLURAL,
            field_selector=f"metadata.name={name}", timeout_seconds=seconds,
        )  # fmt: skip
        for event in stream:
            if wanted(event["object"]):
                return dict(event["object"])
        raise AssertionError(f"{namespace}/{name} after {seconds} s:\n{self.story(namespace)}")

    def story(self, namespace: str) -> str:
        """What a person would look at: runs, pods, events, the ends of the logs."""
        here = f"--namespace={namespace}"
        # Without the spec, which is long and known.
        described = re.sub(
            r"\nSpec:\n.*?(?=\nStatus:|\nEvents:)",
            "",
            self.kubectl("describe", "btx", here),
            flags=re.DOTALL,
        )
        parts = [described, self.kubectl("get", "jobs,pods", here)]
        parts.append(self.kubectl("get", "events", here, "--sort-by=.lastTimestamp"))
        for pod in self.kubectl("get", "pods", "-o", "name", here).split():
            with contextlib.suppress(AssertionError):
                parts += [pod, self.kubectl("logs", "--tail=20", pod, here)]
        with contextlib.suppress(AssertionError):
            parts.append(self.kubectl("logs", "--tail=60", f"deploy/{RELEASE}", f"-n={SYSTEM}"))
        return "\n".join(parts)


def condition(item: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A condition of an object; empty before there is one."""
    found = item.get("status", {}).get("conditions", ())
    return next((dict(c) for c in found if c["type"] == kind), {})


def run(*words: str | Path, text: str = "", code: int = 0) -> str:
    """A command's output; fails with what it says when it exits otherwise."""
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    said = f"{' '.join(map(str, words))}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    assert done.returncode == code, said
    return done.stdout


@contextlib.contextmanager
def installation(folder: Path) -> Iterator[Installation]:
    """Images, node, S3 server and release; data and logs below `folder`."""
    found = images.build()
    with (
        real_node(folder) as node,
        serving(_made(folder / "s3"), volumes=200, host=node.net.gateway) as endpoint,
    ):
        here = Installation(node, endpoint, found)
        here.kubectl("create", "namespace", SYSTEM)
        here.kubectl("label", "namespace", SYSTEM, *(f"{k}={v}" for k, v in RESTRICTED.items()))
        here.install(found)
        yield here


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
