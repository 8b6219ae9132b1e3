"""A node that plays its pods by script and is driven by the real scheduler and controllers.

    python -m cluster.hollow_node KUBECONFIG NAME LEDGER

It registers a Node, renews its Lease and reports pods as a kubelet would, but nothing runs. What a
pod does is in its annotation `hollow.test/script` (JSON of a script, see `script_of`). Without one
it runs for 0.2 s and exits 0. Restart policy Never only. A pod of the trainer that ends with 0
leaves the Result of its task (played_trainer.py).
"""

import asyncio
import contextlib
import datetime
import json
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import aiohttp
from btx_api.names import ATTEMPT_ANNOTATION, STAGE_LABEL
from cluster.control_plane import Cluster, ready
from cluster.played_trainer import PlayedTrainer, task_of
from kubernetes.aio import client, config, watch
from kubernetes.client import CoreV1Api
from s3_server import CREDENTIALS

SCRIPT, EXIT = "hollow.test/script", "hollow.test/exit"
LABEL = "hollow.test/node"
INDEX = "batch.kubernetes.io/job-completion-index"
RENEW = 5.0
"""Seconds between renewals of the Lease; the controller manager waits for 20."""


class End(StrEnum):
    """How a pod ends when nobody deletes it."""

    EXIT = "exit"
    EVICT = "evict"
    HANG = "hang"
    TOLD = "told"
    """Exits with the code in the annotation `hollow.test/exit`, once somebody writes it."""


class Begin(StrEnum):
    """What happens before a container runs."""

    RUN = "run"
    NEVER = "never"
    PULL_ERROR = "pull-error"
    CONFIG_ERROR = "config-error"
    """`message` is the kubelet's text."""


@dataclass(frozen=True)
class Act:
    """One pod's script: start, run for `seconds`, end."""

    begin: Begin = Begin.RUN
    seconds: float = 0.2
    end: End = End.EXIT
    exit: int = 0
    message: str = ""
    """Termination message, cut to 4096 bytes as a kubelet does."""
    reason: str = ""
    """Kubernetes' word for the end, such as OOMKilled; default: Completed or Error."""
    ip: str = ""
    """The pod's address; default: one of its own that nobody can reach."""
    on_term: int | None = None
    """Exit code after SIGTERM; default: 75 of a trainer (its checkpoint is written), else 143."""
    term_message: str = ""
    deaf: bool = False
    """Ignores SIGTERM: killed (137) when the grace period is over."""


def script_of(pod: dict[str, Any], number: int) -> Act:
    """The act of an owner's pod number `number` (from 0).

    A script is an act; a list of scripts, one for each pod of the owner, the last repeats; or
    scripts by a trainer's stage, attempt or rank: {"stages": {"train-code": ...}}, {"attempts":
    [...]}, {"ranks": [...]}, of which the last repeats.
    """
    notes, labels = pod["metadata"].get("annotations", {}), pod["metadata"].get("labels", {})
    script = json.loads(notes.get(SCRIPT, "{}"))
    while True:
        match script:
            case {"stages": by_stage}:
                script = by_stage.get(labels.get(STAGE_LABEL), {})
            case {"attempts": scripts}:
                script = _item(scripts, int(notes.get(ATTEMPT_ANNOTATION, 1)) - 1)
            case {"ranks": scripts}:
                script = _item(scripts, int(notes.get(INDEX, 0)))
            case list():
                script = _item(script, number)
            case _:
                break
    begin, end = Begin(script.pop("begin", Begin.RUN)), End(script.pop("end", End.EXIT))
    return Act(begin=begin, end=end, **script)


def _item(scripts: list[Any], place: int) -> Any:
    return scripts[min(place, len(scripts) - 1)]


def now() -> str:
    """As the API writes times of pods."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class HollowNode:
    """One node and the pods bound to it."""

    def __init__(self, api: client.ApiClient, name: str, ledger: Path) -> None:
        self.name = name
        self.trainer = PlayedTrainer(ledger)
        self.core = client.CoreV1Api(api)
        self.leases = client.CoordinationV1Api(api)
        self.pods: dict[str, dict[str, Any]] = {}
        self.deleted: dict[str, asyncio.Event] = {}
        self.told: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.begun: Counter[str] = Counter()
        self.addresses = 0

    async def run(self) -> None:
        """Until cancelled."""
        await self._patiently(self._register)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._renew())
            group.create_task(self._follow())

    async def _register(self) -> None:
        capacity = {
            "cpu": "100k", "memory": "100Ti", "pods": "100k", "ephemeral-storage": "100Ti",
            "nvidia.com/gpu": "100k",
        }  # fmt: skip
        labels = {"kubernetes.io/hostname": self.name, "kubernetes.io/os": "linux", LABEL: "true"}
        node = {"metadata": {"name": self.name, "labels": labels}}
        with contextlib.suppress(client.ApiException):  # it is there already
            await self.core.create_node(node)
        ready = {
            "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "hollow",
            "lastHeartbeatTime": now(), "lastTransitionTime": now(),
        }  # fmt: skip
        status = {
            "capacity": capacity, "allocatable": capacity, "conditions": [ready],
            "addresses": [{"type": "Hostname", "address": self.name}],
        }  # fmt: skip
        await self.core.patch_node_status(
            self.name, {"status": status}, _content_type="application/strategic-merge-patch+json"
        )

    async def _renew(self) -> None:
        """The Lease, every 5 s; the node is registered anew if somebody deleted it."""
        space = "kube-node-lease"
        while True:
            moment = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            spec = {"holderIdentity": self.name, "leaseDurationSeconds": 20, "renewTime": moment}
            lease = {"metadata": {"name": self.name}, "spec": spec}

            async def renew(lease: dict[str, Any] = lease) -> None:
                try:
                    await self.leases.patch_namespaced_lease(
                        self.name, space, lease, _content_type="application/merge-patch+json"
                    )
                except client.ApiException as error:
                    if error.status != 404:
                        raise
                    await self.leases.create_namespaced_lease(space, lease)

            await self._patiently(renew)
            await asyncio.sleep(RENEW)

    async def _follow(self) -> None:
        """Lists, then watches, and lists again when the watch breaks."""
        mine = f"spec.nodeName={self.name}"
        while True:
            with contextlib.suppress(client.ApiException, aiohttp.ClientError, OSError):
                listed = await self.core.list_pod_for_all_namespaces(field_selector=mine)
                pods = self.core.api_client.sanitize_for_serialization(listed.items)
                present = {pod["metadata"]["uid"] for pod in pods}
                for uid in set(self.tasks) - present:
                    self._forget(uid)
                for pod in pods:
                    self._see(pod)
                stream = watch.Watch().stream(
                    self.core.list_pod_for_all_namespaces, field_selector=mine,
                    resource_version=listed.metadata.resource_version, timeout_seconds=300,
                )  # fmt: skip
                async for event in stream:
                    pod = event["raw_object"]
                    if event["type"] == "DELETED":
                        self._forget(pod["metadata"]["uid"])
                    elif event["type"] in ("ADDED", "MODIFIED"):
                        self._see(pod)
            await asyncio.sleep(0.2)

    def _see(self, pod: dict[str, Any]) -> None:
        uid = pod["metadata"]["uid"]
        self.pods[uid] = pod
        if uid not in self.tasks:
            self.deleted[uid], self.told[uid] = asyncio.Event(), asyncio.Event()
            self.tasks[uid] = asyncio.create_task(self._play(uid))
        if pod["metadata"].get("deletionTimestamp"):
            self.deleted[uid].set()
        if EXIT in pod["metadata"].get("annotations", {}):
            self.told[uid].set()

    def _forget(self, uid: str) -> None:
        if uid in self.tasks:
            self.tasks.pop(uid).cancel()
            del self.pods[uid], self.deleted[uid], self.told[uid]

    async def _play(self, uid: str) -> None:
        """One pod from its binding to its end; a finished one only waits for its deletion."""
        pod = self.pods[uid]
        if pod.get("status", {}).get("phase") not in ("Succeeded", "Failed"):
            owners = pod["metadata"].get("ownerReferences") or [{"uid": uid}]
            number = self.begun[owners[0]["uid"]]
            self.begun[owners[0]["uid"]] += 1
            await self._act(uid, script_of(pod, number))
        await self.deleted[uid].wait()
        meta = self.pods[uid]["metadata"]
        body = client.V1DeleteOptions(grace_period_seconds=0, preconditions={"uid": uid})

        async def delete() -> None:
            await self.core.delete_namespaced_pod(meta["name"], meta["namespace"], body=body)

        await self._patiently(delete)

    async def _act(self, uid: str, act: Act) -> None:
        started = now()
        waiting = {
            Begin.NEVER: ("ContainerCreating", ""),
            Begin.PULL_ERROR: ("ImagePullBackOff", "Back-off pulling image: not found"),
            Begin.CONFIG_ERROR: ("CreateContainerConfigError", act.message),
        }  # fmt: skip
        if act.begin is not Begin.RUN:
            reason, message = waiting[act.begin]
            await self._report(uid, "Pending", {"waiting": {"reason": reason, "message": message}})
            await self.deleted[uid].wait()
            await self._ended(uid, started, 137, "")
            return
        self.addresses += 1
        address = act.ip or f"10.254.{self.addresses // 250 % 250}.{self.addresses % 250 + 1}"
        more = {"podIP": address, "podIPs": [{"ip": address}]}
        await self._report(uid, "Running", {"running": {"startedAt": started}}, more)
        if await self._over(uid, act):
            if act.end is End.EVICT:
                await self._evicted(uid, started)
            else:
                # It may talk to a storage, and other pods go on meanwhile.
                code, message = await asyncio.to_thread(self._left, uid, act)
                await self._ended(uid, started, code, message, reason=act.reason)
            return
        if act.deaf:
            await asyncio.sleep(self.pods[uid]["metadata"].get("deletionGracePeriodSeconds", 30))
        polite = act.on_term
        if polite is None:
            polite = 143 if task_of(self.pods[uid]) is None else 75
        await self._ended(uid, started, 137 if act.deaf else polite, act.term_message)

    async def _over(self, uid: str, act: Act) -> bool:
        """Waits as long as the act takes; False: the pod is to be deleted before its end."""
        seconds = act.seconds if act.end in (End.EXIT, End.EVICT) else None
        events = [self.deleted[uid], *([self.told[uid]] if act.end is End.TOLD else [])]
        waits = [asyncio.create_task(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return not self.deleted[uid].is_set()

    def _left(self, uid: str, act: Act) -> tuple[int, str]:
        """Exit code and message of a pod that nobody stopped."""
        task, code = task_of(self.pods[uid]), act.exit
        if act.end is End.TOLD:
            code = int(self.pods[uid]["metadata"]["annotations"][EXIT])
        if task is None or code or act.message:
            return code, act.message
        return self.trainer.end(self.pods[uid], task)

    async def _evicted(self, uid: str, started: str) -> None:
        """As under pressure: the kubelet kills the pod and says so in a condition."""
        text = "The node was low on resource: memory."
        target = {
            "type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet",
            "message": text, "lastTransitionTime": now(),
        }  # fmt: skip
        more = {"reason": "Evicted", "message": text}
        await self._ended(uid, started, 137, "", more, target)

    async def _ended(
        self, uid: str, started: str, code: int, message: str,
        more: dict[str, Any] | None = None, *conditions: dict[str, Any], reason: str = "",
    ) -> None:  # fmt: skip
        text = message.encode()[:4096].decode(errors="ignore")
        state = {
            "exitCode": code, "reason": reason or ("Error" if code else "Completed"), "message": text,
            "startedAt": started, "finishedAt": now(),
        }  # fmt: skip
        phase = "Failed" if code else "Succeeded"
        await self._report(uid, phase, {"terminated": state}, more, *conditions)

    async def _report(
        self, uid: str, phase: str, state: dict[str, Any], more: dict[str, Any] | None = None,
        *conditions: dict[str, Any],
    ) -> None:  # fmt: skip
        """Writes the pod's status: phase, conditions and one state for each container."""
        pod = self.pods[uid]
        running = "running" in state
        containers = [
            {
                "name": container["name"],
                "image": container["image"],
                "imageID": "hollow",
                "restartCount": 0,
                "ready": running,
                "started": running,
                "state": state,
            }
            for container in pod["spec"]["containers"]
        ]
        flags = {"Initialized": True, "Ready": running, "ContainersReady": running}
        ours = [
            {"type": name, "status": str(flag), "lastTransitionTime": now()}
            for name, flag in flags.items()
        ]
        status: dict[str, Any] = {
            "phase": phase, "containerStatuses": containers, "conditions": [*ours, *conditions],
            "hostIP": "127.0.0.1", "startTime": pod["status"].get("startTime", now()), **(more or {}),
        }  # fmt: skip
        meta = pod["metadata"]

        async def write() -> None:
            await self.core.patch_namespaced_pod_status(
                meta["name"], meta["namespace"], {"metadata": {"uid": uid}, "status": status},
                _content_type="application/strategic-merge-patch+json",
            )  # fmt: skip

        await self._patiently(write)

    async def _patiently(self, call: Callable[[], Awaitable[object]]) -> None:
        """Repeats a call until the API server answers; what is gone or changed needs no answer."""
        while True:
            try:
                await call()
                return
            except client.ApiException as error:
                if error.status in (404, 409):
                    return
                print(f"{self.name}: {error.status} {error.reason}", flush=True)
            except (aiohttp.ClientError, OSError) as error:
                print(f"{self.name}: {error!r}", flush=True)
            await asyncio.sleep(0.2)


@contextlib.contextmanager
def hollow_node(cluster: Cluster, name: str = "hollow-1") -> Iterator[str]:
    """A hollow node as a part of the cluster; its name, once it is ready for pods."""
    module = (sys.executable, "-m", "cluster.hollow_node", cluster.kubeconfig, name, cluster.ledger)
    cluster.add(name, *module, PYTHONPATH=":".join(sys.path), **CREDENTIALS)
    core = CoreV1Api(cluster.client())
    try:
        cluster.wait_for(f"node {name}", lambda: ready(core, name))
        yield name
    finally:
        cluster.parts[name].stop()


async def main(kubeconfig: str, name: str, ledger: str) -> None:
    """Plays one node."""
    await config.load_kube_config(kubeconfig)
    async with client.ApiClient() as api:
        await HollowNode(api, name, Path(ledger)).run()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(*sys.argv[1:]))
