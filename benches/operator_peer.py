"""The operator bench's peers: a bare create loop, and the least controller of a chain of Jobs.

operator_peer.py create KUBECONFIG NAMESPACE '{"job": FILE, "count": 1000, "concurrency": 32}'
operator_peer.py chain KUBECONFIG NAMESPACE '{"job": FILE, "chains": 9, "length": 4, "pause": 1}'
"""

import asyncio
import copy
import json
import sys
from pathlib import Path
from typing import Any

from kubernetes.aio import client, config, watch

RUNS = ("btx.dev", "v1alpha1")
PLURAL = "btxruns"


def blank(job: dict[str, Any], name: str, namespace: str, *, plays: bool) -> dict[str, Any]:
    """A Job as large as the operator's, of another name; `plays`: its pod runs for 0.2 s."""
    body = copy.deepcopy(job)
    body.pop("status", None)
    meta = body["metadata"]
    body["metadata"] = {
        "name": name, "namespace": namespace, "labels": {"bench": name.rpartition("-")[0]},
        "annotations": meta["annotations"],
    }  # fmt: skip
    spec = body["spec"]
    spec.pop("selector", None)
    template = spec["template"]["metadata"]
    for label in ("controller-uid", "job-name"):
        template["labels"].pop(label, None)
        template["labels"].pop(f"batch.kubernetes.io/{label}", None)
    if plays:
        template["annotations"] = {}
        for container in spec["template"]["spec"]["containers"]:
            container["env"] = []
    return body


async def create(api: client.ApiClient, namespace: str, options: dict[str, Any]) -> None:
    """`count` Jobs, `concurrency` at a time."""
    batch, job = client.BatchV1Api(api), json.loads(Path(options["job"]).read_text())
    names = iter(range(options["count"]))

    async def work() -> None:
        for number in names:
            body = blank(job, f"bare-{number}", namespace, plays=False)
            await batch.create_namespaced_job(namespace, body)

    await asyncio.gather(*(work() for _ in range(options["concurrency"])))


async def chain(api: client.ApiClient, namespace: str, options: dict[str, Any]) -> None:
    """Each Job that ends is followed by a status write and the next one of its chain."""
    batch, custom = client.BatchV1Api(api), client.CustomObjectsApi(api)
    job = json.loads(Path(options["job"]).read_text())
    left, steps, tasks = options["chains"], dict[str, int](), set[asyncio.Task[None]]()

    async def begin() -> None:
        for number in range(options["chains"]):
            run = {
                "apiVersion": "/".join(RUNS), "kind": "BTXRun",
                "metadata": {"name": f"chain-{number}"},
                "spec": {
                    "suspend": True, "storage": {"uri": "s3://bench/floor"},
                    "seed": {"uri": "s3://bench/seed"},
                    "experts": [{"name": "a", "tokens": 1, "data": [{"uri": "s3://bench/a"}]}],
                },
            }  # fmt: skip
            await custom.create_namespaced_custom_object(*RUNS, namespace, PLURAL, run)
            body = blank(job, f"chain-{number}-0", namespace, plays=True)
            await batch.create_namespaced_job(namespace, body)
            await asyncio.sleep(options["pause"])

    async def go_on(name: str, step: int) -> None:
        run = await custom.get_namespaced_custom_object(*RUNS, namespace, PLURAL, name)
        run["status"] = {"state": f"step {step}"}
        await custom.replace_namespaced_custom_object_status(*RUNS, namespace, PLURAL, name, run)
        body = blank(job, f"{name}-{step}", namespace, plays=True)
        await batch.create_namespaced_job(namespace, body)

    beginning = asyncio.create_task(begin())
    async for event in watch.Watch().stream(batch.list_namespaced_job, namespace):
        item = event["raw_object"]
        conditions = item.get("status", {}).get("conditions") or []
        if not any(c["type"] == "Complete" for c in conditions):
            continue
        name, _, number = item["metadata"]["name"].rpartition("-")
        step = int(number) + 1
        if step <= steps.get(name, 0):
            continue
        steps[name] = step
        if step < options["length"]:
            task = asyncio.create_task(go_on(name, step))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            continue
        left -= 1
        if not left:
            break
    await beginning


async def main(what: str, kubeconfig: str, namespace: str, options: str) -> None:
    """One of the two."""
    await config.load_kube_config(kubeconfig)
    async with client.ApiClient() as api:
        await {"create": create, "chain": chain}[what](api, namespace, json.loads(options))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
