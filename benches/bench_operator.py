"""The operator on a real control plane with scripted pods: creates, hand-offs, memory, idleness.

Peers of the same run: a bare loop that creates the same Jobs, and the least controller of the same
graphs: it watches, writes a status with its version checked, and creates what is due
(operator_peer.py).
"""

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import common
import urllib3
import yaml
from kubernetes import client, watch

sys.path.insert(0, str(common.ROOT / "tests"))
from cluster.control_plane import Cluster, control_plane
from cluster.hollow_node import SCRIPT, hollow_node
from cluster.operator_process import Operator, grant

CRD = common.ROOT / "crds/btxruns.btx.dev.yaml"
RUNS = ("btx.dev", "v1alpha1")
NEVER = {SCRIPT: json.dumps({"begin": "never"})}
WORKERS = 32
"""Creates at the same time, of the operator and of the bare loop."""
EXPERTS = ("e00", "e01")
GRAPH: dict[str, list[str]] = {
    "preflight": [],
    **{f"prepare-{name}": ["preflight"] for name in EXPERTS},
    **{f"train-{name}": [f"prepare-{name}"] for name in EXPERTS},
    "mix": [f"train-{name}" for name in EXPERTS],
    "average": [f"train-{name}" for name in EXPERTS],
    "finetune": ["mix"],
    "evaluate": ["finetune", "average"],
}
"""What the stages of a run with two experts wait for last: the operator's and its peer's."""
PAUSE = 2.0
"""Seconds between two runs of a chain: two cores that are full would measure the queue for them."""


class JobWatch:
    """When each Job of a namespace was seen to appear and to end, by the bench's own clock."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self.added: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.labels: dict[str, dict[str, str]] = {}
        self._batch, self._namespace = client.BatchV1Api(api), namespace
        self._stopped = False
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._stopped:
            # Each begins with all there is; the API server ends those of a slow reader.
            with suppress(urllib3.exceptions.HTTPError):
                self._read()

    def _read(self) -> None:
        stream = watch.Watch().stream(
            self._batch.list_namespaced_job, self._namespace, timeout_seconds=3600,
            deserialize=False,
        )  # fmt: skip
        for event in stream:
            now, item = time.perf_counter(), event["object"]
            name = item["metadata"]["name"]
            self.labels.setdefault(name, item["metadata"].get("labels") or {})
            self.added.setdefault(name, now)
            for condition in item.get("status", {}).get("conditions") or []:
                if condition["type"] in ("Complete", "Failed"):
                    self.ended.setdefault(name, now)
            if self._stopped:
                break

    def stages(self, prefix: str) -> list[str]:
        """Names of the Jobs whose stage begins so."""
        return [
            n for n, found in list(self.labels.items()) if found.get(STAGE, "").startswith(prefix)
        ]

    def stop(self) -> None:
        """Ends the watch at its next event."""
        self._stopped = True


STAGE = "btx.dev/stage"


def a_run(name: str, storage: str, experts: int, **execution: Any) -> dict[str, Any]:
    """A manifest whose pods are played."""
    return {
        "apiVersion": "/".join(RUNS),
        "kind": "BTXRun",
        "metadata": {"name": name},
        "spec": {
            "storage": {"uri": f"s3://bench/{storage}"},
            "seed": {"uri": "s3://bench/seed"},
            "experts": [
                {
                    "name": f"e{i:02d}",
                    "tokens": 1_000_000,
                    "data": [{"uri": f"s3://bench/{name}/{i}/*.jsonl"}],
                }
                for i in range(experts)
            ],
            "execution": execution,
        },
    }


class Bench:
    """One cluster, its operator, and what the rows are made from."""

    def __init__(self, cluster: Cluster, *, tiny: bool) -> None:
        self.cluster, self.tiny = cluster, tiny
        self.api = cluster.client()
        self.core, self.custom = client.CoreV1Api(self.api), client.CustomObjectsApi(self.api)
        self.operator = Operator(cluster, grant(cluster), workers=WORKERS, requests=WORKERS)

    def namespace(self, name: str) -> str:
        """A new one."""
        self.core.create_namespace({"metadata": {"name": name}})
        return name

    def clear(self, *namespaces: str) -> None:
        """What a row has left behind would burden the next: runs, Jobs, pods."""
        batch = client.BatchV1Api(self.api)
        for name in namespaces:
            self.custom.delete_collection_namespaced_custom_object(*RUNS, name, "btxruns")
            batch.delete_collection_namespaced_job(name, propagation_policy="Background")
            self.core.delete_collection_namespaced_event(name)
        self.wait("nothing", lambda: not any(self._pods(name) for name in namespaces))

    def _pods(self, namespace: str) -> list[Any]:
        answer = self.core.list_namespaced_pod(namespace, limit=1, _preload_content=False)
        return list(json.loads(answer.data)["items"])

    def create(self, namespace: str, body: dict[str, Any]) -> None:
        """One run."""
        self.custom.create_namespaced_custom_object(*RUNS, namespace, "btxruns", body)

    def wait(self, what: str, done: Any, seconds: float = 900) -> None:
        """Polls."""
        self.cluster.wait_for(what, done, seconds)

    @contextmanager
    def watching(self, namespace: str) -> Iterator[JobWatch]:
        """The Jobs of a namespace."""
        found = JobWatch(self.api, namespace)
        try:
            yield found
        finally:
            found.stop()

    def peer(self, what: str, namespace: str, **options: Any) -> None:
        """Runs the peer to its end."""
        command = [sys.executable, str(Path(__file__).with_name("operator_peer.py")), what]
        command += [str(self.cluster.kubeconfig), namespace, json.dumps(options)]
        subprocess.run(command, check=True)

    # Creates ------------------------------------------------------------------------------------

    def creates(self, number: int, runs: int, experts: int) -> tuple[float, float]:
        """Train Jobs per second of the operator and of the bare loop, each in one burst.

        All inputs are prepared while the operator is down: at its start every expert is due.
        """
        space = self.namespace(f"creates-{number}")
        with self.watching(space) as seen:
            self.operator.start()
            self.operator.wait_ready()
            block = {"annotations": NEVER}
            for i in range(runs):
                body = a_run(f"r{i:03d}", f"creates-{number}-{i}", experts, train=block)
                # One expert at a time, and none before the burst: its turn comes after prepare.
                self.create(space, body)
            # Prepared by an operator that is stopped before the first answer is read.
            self.wait("preflights", lambda: len(seen.stages("preflight")) == runs)
            self.wait("inputs", lambda: len(seen.stages("prepare")) == runs * experts)
            self.operator.stop(kill=True)
            early = len(seen.stages("train"))
            prepared = seen.stages("prepare")
            self.wait("prepared inputs", lambda: all(n in seen.ended for n in prepared))
            before = set(seen.added)
            self.operator.start()
            wanted = runs * experts - early
            self.wait("experts", lambda: len(seen.stages("train")) == wanted + early)
            times = sorted(t for n, t in seen.added.items() if n not in before)
            sample = next(iter(seen.stages("train")))
            self.operator.stop()
        ours = (len(times) - 1) / (times[-1] - times[0])
        print(f"  creates, ours: {ours:.1f} Jobs/s", flush=True)
        bare = self.namespace(f"bare-{number}")
        body = client.BatchV1Api(self.api).read_namespaced_job(sample, space)
        plain = self.api.sanitize_for_serialization(body)
        with self.watching(bare) as seen:
            path = self.cluster.folder / "job.json"
            path.write_text(json.dumps(plain))
            self.peer("create", bare, job=str(path), count=wanted, concurrency=WORKERS)
            self.wait("bare Jobs", lambda: len(seen.added) == wanted)
            times = sorted(seen.added.values())
        peer = (len(times) - 1) / (times[-1] - times[0])
        print(f"  creates, bare: {peer:.1f} Jobs/s", flush=True)
        self.clear(space, bare)
        return ours, peer

    # Hand-offs ----------------------------------------------------------------------------------

    def handoffs(self, number: int, runs: int) -> tuple[list[float], list[float]]:
        """Seconds from a Job's end to the next Job of its chain, as one watch sees both."""
        space, bare = self.namespace(f"chain-{number}"), self.namespace(f"floor-{number}")
        with self.watching(space) as seen:
            self.operator.start()
            self.operator.wait_ready()
            for i in range(runs):
                self.create(space, a_run(f"r{i:03d}", f"chain-{number}-{i}", len(EXPERTS)))
                time.sleep(PAUSE)
            self.wait("chains", lambda: len(_ended(seen, "evaluate")) == runs)
            self.operator.stop()
            ours = [
                gap
                for run in {found["btx.dev/run"] for found in seen.labels.values()}
                for gap in _gaps(seen, _named(seen, run))
            ]
        with self.watching(bare) as seen:
            path = self.cluster.folder / "job.json"
            self.peer("runs", bare, job=str(path), runs=runs, graph=GRAPH, pause=PAUSE)
            floor = [
                gap
                for i in range(runs)
                for gap in _gaps(seen, {stage: f"run{i}-{stage}" for stage in GRAPH})
            ]
        for name, gaps in (("ours", ours), ("floor", floor)):
            middle, most = quantile(gaps, 0.5), quantile(gaps, 0.99)
            print(f"  hand-offs, {name}: p50 {middle:.3f} s, p99 {most:.3f} s", flush=True)
        self.clear(space, bare)
        return ours, floor

    # Memory and idleness ------------------------------------------------------------------------

    def standing(self, finished: int, active: int) -> tuple[float, float]:
        """Resident MiB with so many runs, and reconciles in 30 s in which nothing happens."""
        space = self.namespace("standing")
        self.operator.start()
        self.operator.wait_ready()
        self.create(space, a_run("first", "standing", 10))
        self.wait("the first run", lambda: self._state(space, "first") == "Succeeded")
        done = self.custom.get_namespaced_custom_object(*RUNS, space, "btxruns", "first")
        self.operator.stop()
        for i in range(finished):
            # Each of its own storage: as different as a thousand runs are.
            body = a_run(f"done-{i:04d}", f"standing-{i}", 10)
            self.create(space, body)
            stored = self.custom.get_namespaced_custom_object(
                *RUNS, space, "btxruns", body["metadata"]["name"]
            )
            stored["status"] = done["status"]
            self.custom.replace_namespaced_custom_object_status(
                *RUNS, space, "btxruns", body["metadata"]["name"], stored
            )
        hang = {"annotations": {SCRIPT: json.dumps({"end": "hang"})}}
        for i in range(active):
            self.create(space, a_run(f"live-{i:03d}", f"live-{i}", 10, train=hang))
        self.operator.start()
        self.operator.wait_ready()
        running = "Running"
        self.wait(
            "live runs",
            lambda: all(self._trains(space, f"live-{i:03d}", running, 10) for i in range(active)),
        )
        self._settle()
        before = self._reconciles()
        time.sleep(3 if self.tiny else 30)
        idle = self._reconciles() - before
        process = self.cluster.parts[self.operator.name].process
        assert process is not None
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident = next(x for x in status.splitlines() if x.startswith("VmRSS"))
        self.operator.stop()
        return int(resident.split()[1]) / 1024, idle

    def _settle(self) -> None:
        """Until nothing was worked on for five seconds: the last pods have begun, all is told."""
        seen = [-1.0]

        def still() -> bool:
            time.sleep(5)
            seen.append(self._reconciles())
            return seen[-1] == seen[-2]

        self.wait("the end of all work", still)

    def _state(self, namespace: str, name: str) -> str:
        found = self.custom.get_namespaced_custom_object(*RUNS, namespace, "btxruns", name)
        return str(found.get("status", {}).get("state", ""))

    def _trains(self, namespace: str, name: str, state: str, count: int) -> bool:
        found = self.custom.get_namespaced_custom_object(*RUNS, namespace, "btxruns", name)
        rows = found.get("status", {}).get("stages", [])
        return sum(r["name"][:6] == "train-" and r.get("state") == state for r in rows) == count

    def _reconciles(self) -> float:
        _, text = self.operator.get("/metrics")
        lines = text.splitlines()
        name = "btx_operator_reconciles_total{"
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def _ended(seen: JobWatch, stage: str) -> list[str]:
    return [name for name in seen.stages(stage) if name in seen.ended]


def _named(seen: JobWatch, run: str) -> dict[str, str]:
    """The Job of each stage."""
    pairs = list(seen.labels.items())
    names = {found[STAGE]: name for name, found in pairs if found.get("btx.dev/run") == run}
    assert names.keys() == GRAPH.keys(), names
    return names


def _gaps(seen: JobWatch, jobs: dict[str, str]) -> Iterator[float]:
    """From the end of the last stage that a stage waits for to its Job."""
    for stage, needs in GRAPH.items():
        if needs:
            yield seen.added[jobs[stage]] - max(seen.ended[jobs[need]] for need in needs)


def quantile(values: list[float], share: float) -> float:
    """The value that so many are below."""
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * share) - 1]


def main() -> None:
    """Starts a cluster, measures, writes build/bench/operator.json."""
    asked = common.options(__doc__ or "")
    runs, experts = (3, 2) if asked.tiny else (100, 10)
    rows, rounds = [], asked.rounds or (1 if asked.tiny else 3)
    folder = common.ROOT / "build/cluster/bench"
    with control_plane(folder) as cluster, hollow_node(cluster):
        bench = Bench(cluster, tiny=asked.tiny)
        definitions = client.ApiextensionsV1Api(bench.api)
        definitions.create_custom_resource_definition(yaml.safe_load(CRD.read_text()))
        time.sleep(2)
        # Creates scatter most.
        bursts = rounds if asked.tiny else rounds + 2
        pairs = [bench.creates(i, runs, experts) for i in range(bursts)]
        rows.append(
            common.row(
                f"creates: {runs} runs x {experts} experts", [a for a, _ in pairs],
                [b for _, b in pairs], peer_name="bare create loop", unit="Jobs/s", goal=">= 0.8",
            )
        )  # fmt: skip
        chains = [bench.handoffs(i, 3 if asked.tiny else 15) for i in range(rounds)]
        for share in (0.5, 0.99):
            rows.append(
                common.row(
                    f"hand-off, p{round(100 * share)}", [quantile(a, share) for a, _ in chains],
                    [quantile(b, share) for _, b in chains], goal="<= 1.5",
                    peer_name="watch, checked status write, create",
                )
            )  # fmt: skip
        finished, active = (5, 2) if asked.tiny else (1000, 100)
        memory, idle = bench.standing(finished, active)
        about = f"{finished} finished and {active} active runs"
        rows.append(common.row(f"memory, {about}", [memory], unit="MiB", limit="<= 160"))
        rows.append(common.row("reconciles in 30 idle seconds", [idle], unit="", limit="<= 0"))
    common.finish("operator", rows, tiny=asked.tiny, packages=("kopf", "kubernetes", "aiohttp"))


if __name__ == "__main__":
    main()
