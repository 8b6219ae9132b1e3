"""The operator bench's peers: a bare create loop, and the least controller of graphs of Jobs.

operator_peer.py create KUBECONFIG NAMESPACE '{"job": FILE, "count": 1000, "concurrency": 32}'
operator_peer.py runs KUBECONFIG NAMESPACE '{"job": FILE, "runs": 9, "graph": {}, "pause": 1}'
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
        "name": name, "namespace": namespace, "labels": {"bench": name.partition("-")[0]},
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


async def runs(api: client.ApiClient, namespace: str, options: dict[str, Any]) -> None:
    """Each run's graph; what has ended is written to its status, then what is due is created."""
    batch, custom = client.BatchV1Api(api), client.CustomObjectsApi(api)
    job = json.loads(Path(options["job"]).read_text())
    graph: dict[str, list[str]] = options["graph"]
    stored, ended, begun = dict[str, Any](), dict[str, set[str]](), dict[str, set[str]]()
    busy, left = set[str](), options["runs"]

    async def begin_stage(name: str, stage: str) -> None:
        body = blank(job, f"{name}-{stage}", namespace, plays=True)
        await batch.create_namespaced_job(namespace, body)

    async def begin() -> None:
        for number in range(options["runs"]):
            name = f"run{number}"
            run = {
                "apiVersion": "/".join(RUNS), "kind": "BTXRun", "metadata": {"name": name},
                "spec": {
                    "suspend": True, "storage": {"uri": "s3://bench/floor"},
                    "seed": {"uri": "s3://bench/seed"},
                    "experts": [{"name": "a", "tokens": 1, "data": [{"uri": "s3://bench/a"}]}],
                },
            }  # fmt: skip
            ended[name], begun[name] = set(), set()
            stored[name] = await custom.create_namespaced_custom_object(
                *RUNS, namespace, PLURAL, run
            )
            await go_on(name)
            await asyncio.sleep(options["pause"])

    async def go_on(name: str) -> None:
        if name in busy:
            return
        busy.add(name)
        while due := [s for s in graph if s not in begun[name] and ended[name] >= {*graph[s]}]:
            begun[name].update(due)
            run = stored[name] | {"status": {"state": f"{len(begun[name])} stages"}}
            stored[name] = await custom.replace_namespaced_custom_object_status(
                *RUNS, namespace, PLURAL, name, run
            )
            await asyncio.gather(*(begin_stage(name, stage) for stage in due))
        busy.discard(name)

    async with asyncio.TaskGroup() as group:
        group.create_task(begin())
        async for event in watch.Watch().stream(batch.list_namespaced_job, namespace):
            item = event["raw_object"]
            conditions = item.get("status", {}).get("conditions") or []
            if not any(c["type"] == "Complete" for c in conditions):
                continue
            name, _, stage = item["metadata"]["name"].partition("-")
            if stage in ended[name]:
                continue
            ended[name].add(stage)
            group.create_task(go_on(name))
            left -= len(ended[name]) == len(graph)
            if not left:
                break


async def main(what: str, kubeconfig: str, namespace: str, options: str) -> None:
    """One of the two."""
    await config.load_kube_config(kubeconfig)
    async with client.ApiClient() as api:
        await {"create": create, "runs": runs}[what](api, namespace, json.loads(options))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
