"""The story of tests/operator/test_trajectory.py on a real control plane: the same Decisions.

The test is kubelet and operator: it steps the engine over the cluster's backend with its own clock,
and writes what becomes of each pod.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from btx_api.names import API_VERSION, CONTAINER, GROUP, KIND, PLURAL, VERSION
from btx_api.spec import BTXRunSpec
from btx_api.stage import TASK_SCHEMA, VERSIONS, Exit, Result
from btx_api.status import Release, Row, Status
from btx_operator.cluster.backend import ClusterBackend
from btx_operator.cluster.cache import Cache
from btx_operator.cluster.events import Poster
from btx_operator.cluster.kube import Kube
from btx_operator.cluster.meters import Meters
from btx_operator.cluster.progress import ProgressBook
from btx_operator.cluster.resync import Resync
from btx_operator.cluster.settings import Settings
from btx_operator.observed import Attempt, Event, Phase, Start
from btx_operator.reconcile import reconcile
from cluster.control_plane import Cluster
from cluster.space import PATIENCE, Object, Space
from kubernetes import aio, client
from simulator import Carried, Simulator, Storage
from trajectory import decisions, story

BEGUN = 1_700_000_000.0
"""As the simulator's clock."""


@dataclass
class Stage:
    """The cluster as the story needs it: one run, whose pods do what the story says."""

    space: Space
    loop: asyncio.AbstractEventLoop
    now: float = BEGUN
    storage: Storage = field(default_factory=Storage)
    began: dict[str, str] = field(default_factory=dict)
    """When each pod began, by name."""

    def __post_init__(self) -> None:
        settings = Settings(trainer_image="trainer:test", namespaces=(self.space.name,))
        kube, meters = self._do(self._connect()), Meters()
        self._kube, self._cache = kube, Cache(lambda key: None)
        self._resync = Resync(kube, self._cache, settings, meters)
        self.backend = Recorder(
            kube, self._cache, settings, clock=lambda: self.now, meters=meters,
            book=ProgressBook(self._cache, settings, meters), poster=Poster(kube, self._cache),
        )  # fmt: skip
        self.backend.running = self.begin

    @property
    def decisions(self) -> list[Carried]:
        """All so far."""
        return self.backend.decisions

    def close(self) -> None:
        """Of the connections."""
        self._do(self._kube.close())

    def _do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    async def _connect(self) -> Kube:
        found = aio.client.Configuration()
        path = str(self.space.cluster.kubeconfig)
        await aio.config.load_kube_config(config_file=path, client_configuration=found)
        return Kube(found)

    # What the story asks for --------------------------------------------------------------------

    def submit(self, name: str, spec: BTXRunSpec) -> None:
        """Creates the run, or changes its spec."""
        plain = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        place = (GROUP, VERSION, self.space.name, PLURAL)
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": plain}
        if name in self.runs():
            body["metadata"]["resourceVersion"] = self.space.get(name)["metadata"][
                "resourceVersion"
            ]
            self.space.custom.replace_namespaced_custom_object(*place, name, body)
        else:
            self.space.custom.create_namespaced_custom_object(*place, body)

    def runs(self) -> list[str]:
        """Names."""
        found = self.space.custom.list_namespaced_custom_object(
            GROUP, VERSION, self.space.name, PLURAL
        )
        return [item["metadata"]["name"] for item in found["items"]]

    def settle(self) -> None:
        """Steps until nothing changes; whatever was asked to stop is gone."""
        for _ in range(100):
            self._do(self._resync.all())
            before = self._picture()
            self._do(self._step())
            self._until("stopped attempts", lambda: not self._stopping())
            if self._picture() == before:
                return
        raise AssertionError("the engine does not come to rest")

    def end(
        self,
        stage: str,
        code: int = Exit.OK,
        *,
        result: Result | None = None,
        readable: bool = True,
    ) -> None:
        """The stage's pod ends; with OK it has done its task. Returns when its Job has ended too."""
        attempt = self.live()[stage]
        if code == Exit.OK and result is None:
            tasks = [s.task for d in self.decisions for s in d.starts if s.name == stage]
            result = self.storage.run(tasks[-1])
        pod = self._pod(attempt.handle)
        state = {
            "exitCode": int(code), "message": result.line() if result and readable else "",
            "startedAt": self.began[pod["metadata"]["name"]], "finishedAt": self._time(),
        }  # fmt: skip
        self._report(pod, "Failed" if code else "Succeeded", {"terminated": state})
        name = self._cache.records[attempt.handle].job.name  # type: ignore[union-attr]

        def ended() -> bool:
            job = self.space.batch.read_namespaced_job(name, self.space.name)
            return any(c.type in ("Complete", "Failed") for c in job.status.conditions or ())

        self._until(f"{name} to end", ended)

    def vanish(self, stage: str) -> None:
        """Somebody deletes its Job, and the pod goes with it."""
        job = self._cache.records[self.live()[stage].handle].job
        assert job is not None
        self.space.batch.delete_namespaced_job(
            job.name, self.space.name, propagation_policy="Foreground"
        )
        self._until(f"{stage} to be gone", lambda: not self._pods(job.uid) and self._gone(job.name))

    def advance(self, seconds: float) -> None:
        """Time passes; nothing else happens."""
        self.now += seconds

    def live(self, run: str = "run") -> dict[str, Attempt]:
        """Attempts that have not ended, by stage."""
        seen = self.backend.observe(f"{self.space.name}/{run}")
        assert seen is not None
        return {a.stage: a for a in seen.attempts if a.phase is not Phase.ENDED}

    def status(self, run: str = "run") -> Status:
        """As it is stored."""
        return self._cache.runs[self.space.name, run].status

    def row(self, stage: str) -> Row:
        """A stage's row."""
        found = self.status().row(stage)
        assert found is not None
        return found

    # Inside -------------------------------------------------------------------------------------

    async def _step(self) -> None:
        key = (self.space.name, "run")
        await self.backend.prepare(key)
        await reconcile(self.backend, "/".join(key), lambda: self.now)
        self.backend.rest(key)
        self._cache.tidy(key)

    async def begin(self, job: str) -> None:
        """A Job's pod runs, as soon as its controller has made it."""
        deadline = time.monotonic() + PATIENCE
        while not (pods := self._pods(job)):
            assert time.monotonic() < deadline, job
            await asyncio.sleep(0.02)
        began = self.began[pods[0]["metadata"]["name"]] = self._time()
        self._report(pods[0], "Running", {"running": {"startedAt": began}})
        self._cache.put_pod(self._pods(job)[0])

    def _report(self, pod: Object, phase: str, state: Object) -> None:
        container = {
            "name": CONTAINER, "ready": "running" in state, "restartCount": 0, "image": "trainer:test",
            "imageID": "", "state": state,
        }  # fmt: skip
        self.space.core.patch_namespaced_pod_status(
            pod["metadata"]["name"], self.space.name,
            {"status": {"phase": phase, "containerStatuses": [container]}},
        )  # fmt: skip

    def _pods(self, job: str) -> list[Object]:
        label = f"batch.kubernetes.io/controller-uid={job}"
        answer = self.space.core.list_namespaced_pod(
            self.space.name, label_selector=label, _preload_content=False
        )
        return list(json.loads(answer.data)["items"])

    def _pod(self, job: str) -> Object:
        (pod,) = self._pods(job)
        return pod

    def _gone(self, job: str) -> bool:
        names = [
            j.metadata.name for j in self.space.batch.list_namespaced_job(self.space.name).items
        ]
        return job not in names

    def _stopping(self) -> list[str]:
        self._do(self._resync.all())
        return [stage for stage, attempt in self.live().items() if attempt.stopping]

    def _picture(self) -> Any:
        return self.status() if self._cache.runs else None, sorted(self._cache.records)

    def _time(self) -> str:
        return datetime.fromtimestamp(self.now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def _until(self, what: str, done: Callable[[], bool]) -> None:
        self.space.cluster.wait_for(what, done, PATIENCE)


class Recorder(ClusterBackend):
    """Keeps every Decision, and lets each pod run before the next look."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.decisions: list[Carried] = []
        self.running: Callable[[str], Any]

    def patience(self, run: str) -> float:
        """None: the others have none."""
        return 0.0

    def reserve(self, run: str, status: Status) -> None:
        self.decisions.append(Carried(run=run, status=status))
        super().reserve(run, status)

    async def stop(self, run: str, attempt: Attempt) -> None:
        self.decisions[-1].stops.append(attempt)
        await super().stop(run, attempt)

    async def start(self, run: str, start: Start) -> None:
        self.decisions[-1].starts.append(start)
        before = set(self.cache.records)
        await super().start(run, start)
        mine = (start.name, start.attempt)
        for uid in set(self.cache.records) - before:
            origin = self.cache.records[uid].origin
            if (origin.stage, origin.number) == mine:
                await self.running(uid)

    async def emit(self, run: str, events: Sequence[Event]) -> None:
        self.decisions[-1].events += events


@pytest.fixture
def stage(cluster: Cluster, crd: None, api: client.ApiClient) -> Iterator[Stage]:
    """A namespace without an operator and without a node."""
    with asyncio.Runner() as runner:
        found = Stage(Space(cluster, api, "trajectory"), runner.get_loop())
        yield found
        found.close()


def test_simulator_and_cluster_decide_alike(stage: Stage) -> None:
    """Whatever a backend is, the policy is the engine's."""
    simulator = Simulator(instant=True)
    release = Release(image="trainer:test", task=TASK_SCHEMA, kinds=VERSIONS)
    simulator.release_of_engine = stage.backend.release = release

    story(simulator, preempted=False)
    story(stage, preempted=False)

    ours, theirs = decisions(simulator), decisions(stage)
    assert [d["starts"] for d in ours] == [d["starts"] for d in theirs]
    assert ours == theirs
    assert len(ours) > 40
