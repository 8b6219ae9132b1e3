"""Operators that are killed and begun again, each in a namespace of its own; and what a run did.

What a run did is told by the API server's audit log, by the Jobs and by what is in S3, never by the
operator.
"""

import contextlib
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btx_api.names import GROUP, MANIFEST, PLURAL, RUN_LABEL, STAGE_LABEL, VERSION
from btx_api.spec import Storage
from btx_trainer.storage import open_store
from builders import trials
from cluster.api_proxy import ApiProxy
from cluster.control_plane import Cluster
from cluster.operator_process import USER, Operator, grant
from cluster.parts import Part
from cluster.space import Object, Space, attempt
from kubernetes import client
from s3_server import BUCKET
from urllib3.exceptions import HTTPError

RECOVERY_SECONDS = 90
"""Goal; asserted at three times as much."""
RUN_SECONDS = 360
"""A run with faults may take so long on a busy machine."""
RESTART_SECONDS = 1.0
"""After an end of the operator's own; a kubelet begins at once, too, and waits only later."""


class Kept(Operator):
    """An operator that is begun again whenever it ends, as a kubelet does."""

    def __init__(self, cluster: Cluster, kubeconfig: Path, *, name: str, **settings: Any) -> None:
        super().__init__(cluster, kubeconfig, name=name, **settings)
        self.kills = self.exits = 0
        self.down = False
        """Not begun again for now."""
        self._part: Part | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep)

    def start(self) -> None:
        """Begins to keep it; does not wait."""
        super().start()
        # A part of the cluster must live: this one need not.
        self._part = self.cluster.parts.pop(self.name)
        self._thread.start()

    def kill(self) -> None:
        """SIGKILL; returns when it is dead."""
        assert self._part is not None
        self.kills += 1
        process = self._part.process
        if process is not None:
            process.kill()
            process.wait()

    def stop(self, *, kill: bool = True) -> None:
        """For good."""
        self._ending.set()
        self._thread.join()
        if self._part is not None:
            self._part.stop(kill=kill)

    def log(self) -> str:
        """All that it printed."""
        return (self.cluster.folder / f"logs/{self.name}.log").read_text(errors="replace")

    def _keep(self) -> None:
        part, kills = self._part, 0
        assert part is not None
        while not self._ending.is_set():
            dead = part.process is None or part.process.poll() is not None
            if not dead or self.down:
                time.sleep(0.02)
                continue
            if self.kills == kills:
                self.exits += 1
                time.sleep(RESTART_SECONDS)
            kills = self.kills
            part.process = None
            part.start()


@dataclass
class Lane:
    """A namespace, its operator and, unless it is left out, the proxy between that and the API."""

    space: Space
    operator: Kept
    proxy: ApiProxy
    settings: dict[str, Any]
    """Of the operator, but for the namespace."""

    @property
    def name(self) -> str:
        """Of the namespace."""
        return self.space.name

    def run(self, name: str, **changes: Any) -> None:
        """Creates a run with a storage of its own."""
        self.space.run(name, storage=storage_of(self.space.cluster, self.name, name), **changes)


def storage_of(cluster: Cluster, namespace: str, run: str) -> Object:
    """The storage of a run of a lane: a prefix of its own in S3."""
    assert cluster.s3_endpoint, "the module does not use the fixture `storage`"
    uri = f"s3://{BUCKET}/{namespace}/{run}"
    return {"uri": uri, "endpoint": cluster.s3_endpoint, "pathStyle": True}


@contextlib.contextmanager
def lane(
    cluster: Cluster, api: client.ApiClient, name: str, *, proxied: bool = True, user: str = USER,
    **settings: Any,
) -> Iterator[Lane]:  # fmt: skip
    """A lane whose operator is being started; all of it ends with the block.

    `user` has a certificate and rights already, unless it is the usual one.
    """
    direct = grant_once(cluster)
    space = Space(cluster, api, name)
    settings = {"workers": 4, **settings}
    operator = Kept(cluster, direct, name=name, namespaces=[name], **settings)
    proxy = ApiProxy(cluster, user, operator.kill)
    with proxy.running():
        if proxied:
            operator.kubeconfig = proxy.kubeconfig(cluster.folder / f"{name}.kubeconfig")
        operator.start()
        try:
            yield Lane(space, operator, proxy, settings)
        finally:
            operator.stop()
            with contextlib.suppress(client.ApiException):  # the test deleted it
                space.close()


@contextlib.contextmanager
def lanes(
    cluster: Cluster, api: client.ApiClient, names: Sequence[str], **settings: Any
) -> Iterator[list[Lane]]:
    """Several, ready."""
    grant_once(cluster)
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(lane(cluster, api, name, **settings)) for name in names]
        for one in found:
            one.operator.wait_ready(120)
        yield found


def grant_once(cluster: Cluster) -> Path:
    """The operator's own rights; changing them while others work would disturb these."""
    path = cluster.folder / f"certificates/{USER}.kubeconfig"
    return path if path.exists() else grant(cluster)


def scaled(every: int, few: int) -> int:
    """`every` with TRIALS=all, else `few`."""
    return every if trials(10**6) == 10**6 else few


# What a run did ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deeds:
    """What is to be seen of a run that ended; equal for equal runs, whatever befell the operator."""

    ending: str
    """State, conditions and rows of its status, without times, names and numbers of objects."""
    jobs: tuple[str, ...]
    """`stage attempt` of every Job that the operator created, by the audit log."""
    left: tuple[str, ...]
    """The same of the Jobs that are there."""
    pods: int
    committed: tuple[str, ...]
    """Digests of the artifacts in S3, once for each pod that wrote one."""


FIELDS = ("name", "digest", "state", "attempt", "failures", "preemptions", "lost", "check", "gain")


def ending(run: Object) -> str:
    """State, conditions and rows: what must not depend on faults."""
    status = run.get("status", {})
    # The digest of preflight is of the spec, which names the storage.
    rows = [{**(status.get("preflight") or {}), "digest": ""}, *status.get("stages", [])]
    found = {
        "state": status.get("state"),
        "conditions": [(c["type"], c["status"], c["reason"]) for c in status["conditions"]],
        "rows": [{k: row[k] for k in FIELDS if k in row} for row in rows],
        "model": bool(status.get("model")),
    }
    return json.dumps(found, indent=0, sort_keys=True)


def deeds(cluster: Cluster, api: client.ApiClient, namespace: str) -> dict[str, Deeds]:
    """Of every run of a namespace."""
    runs = client.CustomObjectsApi(api).list_namespaced_custom_object(
        GROUP, VERSION, namespace, PLURAL
    )["items"]
    made = created(cluster, namespace)
    jobs = _listed(client.BatchV1Api(api).list_namespaced_job, namespace)
    pods = _listed(client.CoreV1Api(api).list_namespaced_pod, namespace)
    found = {}
    for run in runs:
        name = run["metadata"]["name"]
        mine = [job for job in jobs if job["metadata"]["labels"][RUN_LABEL] == name]
        stages = {
            job["metadata"]["name"]: f"{job['metadata']['labels'][STAGE_LABEL]} {attempt(job)}"
            for job in mine
        }
        found[name] = Deeds(
            ending=ending(run),
            jobs=tuple(sorted(stages.get(job, job) for job in made if job.startswith(f"{name}-"))),
            left=tuple(sorted(stages.values())),
            pods=sum(pod["metadata"]["labels"][RUN_LABEL] == name for pod in pods),
            committed=_committed(cluster, namespace, name),
        )
    return found


def _committed(cluster: Cluster, namespace: str, run: str) -> tuple[str, ...]:
    store = open_store(Storage.model_validate(storage_of(cluster, namespace, run)))
    keys = [head.key.split("/") for head in store.list("stages/")]
    manifests = [digest for _, _, digest, *rest in keys if rest == [MANIFEST]]
    written = [digest for _, _, digest, place, *_ in keys if place == "attempts"]
    assert sorted(manifests) == sorted(set(written)), keys
    return tuple(sorted(written))


def created(cluster: Cluster, namespace: str) -> list[str]:
    """Names of the Jobs that the operator created, by the audit log."""
    entries = audit(cluster, namespace)
    return [
        line["objectRef"]["name"]
        for line in entries
        if (line["verb"], line["objectRef"]["resource"]) == ("create", "jobs")
        and line["responseStatus"]["code"] == 201
    ]


def audit(cluster: Cluster, namespace: str, user: str = USER) -> list[Object]:
    """The operator's requests about a namespace."""
    with cluster.audit_log.open() as file:
        lines = [json.loads(line) for line in file if f'"{namespace}"' in line and user in line]
    return [line for line in lines if line["user"]["username"] == user]


def _listed(listing: Any, namespace: str) -> list[Object]:
    answer = listing(namespace, label_selector=RUN_LABEL, _preload_content=False)
    items: list[Object] = json.loads(answer.data)["items"]
    return items


def differences(found: Deeds, plain: Deeds) -> list[str]:
    """What is not as without faults, a line for each."""
    return [
        f"{key}: {ours} is not {theirs}"
        for key, theirs in vars(plain).items()
        if (ours := getattr(found, key)) != theirs
    ]


def states(api: client.ApiClient, namespace: str) -> dict[str, str]:
    """Run -> state; empty when the API server does not answer."""
    try:
        found = client.CustomObjectsApi(api).list_namespaced_custom_object(
            GROUP, VERSION, namespace, PLURAL
        )
    except (client.ApiException, HTTPError, OSError):
        return {}
    return {
        item["metadata"]["name"]: item.get("status", {}).get("state", "") for item in found["items"]
    }


def until(done: Callable[[], bool], seconds: float, what: Callable[[], Any] = str) -> float:
    """Polls; returns the seconds that it took."""
    begun = time.monotonic()
    while not done():
        if time.monotonic() - begun > seconds:
            raise AssertionError(f"not after {seconds:.0f} s: {what()}")
        time.sleep(0.1)
    return time.monotonic() - begun


def all_over(api: client.ApiClient, one: Lane, *names: str, seconds: float = RUN_SECONDS) -> float:
    """Until runs have succeeded (all of the lane, unless named); the seconds that it took."""

    def over() -> bool:
        found = states(api, one.name)
        wanted = names or tuple(found)
        return bool(found) and all(found.get(name) == "Succeeded" for name in wanted)

    def why() -> str:
        return f"{states(api, one.name)}\n{one.operator.log()[-3000:]}"

    return until(over, seconds, why)


def plain_run(cluster: Cluster, api: client.ApiClient) -> tuple[Deeds, Counter[str]]:
    """A run without faults: what it did, and its writes by `verb resource`."""
    with lanes(cluster, api, [f"plain-{uuid.uuid4().hex[:6]}"]) as [one]:
        one.run("run")
        all_over(api, one)
        quiet(one)
        wrote = Counter(str(request) for _, request in one.proxy.written)
        return deeds(cluster, api, one.name)["run"], wrote


def quiet(one: Lane, seconds: float = 1.0) -> None:
    """Until the operator has written nothing for a while: events come after the status."""
    while (before := one.proxy.writes) >= 0:
        time.sleep(seconds)
        if before == one.proxy.writes:
            return


def at_once(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs all of them in threads; raises the first error when all have ended."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def recovered(one: Lane, since: float, resource: str = "") -> float | None:
    """Seconds from a time of time.time to the first write that got through; None: none did."""
    return next(
        (
            time - since
            for time, request in list(one.proxy.written)
            if time > since and resource in ("", request.resource)
        ),
        None,
    )
