"""The cluster backend of reconcile.py: observes in the cache, writes through the API server.

Order of writes: status with the version that was read, then deletes and creates, then events. What
it holds beside the cache is only how the API server refused an attempt.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from btx_api.names import API_VERSION, KIND, UID_LABEL
from btx_api.spec import BTXRunSpec
from btx_api.stage import TASK_SCHEMA, VERSIONS, Exit, Problem, Result
from btx_api.status import ACTIVE, Release, State, Status

from btx_operator.cluster.cache import Cache
from btx_operator.cluster.events import Poster
from btx_operator.cluster.jobs import JobError, Order, block_of, execution_hash, job, service
from btx_operator.cluster.kube import JOBS, PODS, RUNS, SERVICES, ApiError, Kube
from btx_operator.cluster.meters import Meters
from btx_operator.cluster.objects import Key, Origin, Record, RunObject
from btx_operator.cluster.outcome import STUCK_SECONDS, attempt_of
from btx_operator.cluster.progress import ProgressBook
from btx_operator.cluster.settings import Settings
from btx_operator.errors import Conflict
from btx_operator.observed import Attempt, Event, Observed, Phase, Start

log = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds that a write may wait which only shows how attempts get on: each costs the server more
than a Job, and the next thing that happens to a run must not wait for it."""
Number = tuple[str, int, str]
"""Row, number, digest of an attempt."""


class ClusterBackend:
    """Backend of reconcile.py for all runs of the cluster; a run is `namespace/name`."""

    def __init__(
        self,
        kube: Kube,
        cache: Cache,
        settings: Settings,
        *,
        clock: Callable[[], float],
        book: ProgressBook,
        meters: Meters,
        poster: Poster,
    ) -> None:
        self.kube, self.cache, self.settings, self.clock = kube, cache, settings, clock
        self.book, self.meters, self.poster = book, meters, poster
        self.release = Release(image=settings.trainer_image, task=TASK_SCHEMA, kinds=VERSIONS)
        self._written: set[Key] = set()
        self._put_off: dict[Key, float] = {}
        self._observed: dict[Key, tuple[str, BTXRunSpec | None]] = {}
        self._refused: dict[Key, dict[Number, Attempt]] = {}

    # Backend ------------------------------------------------------------------------------------

    def observe(self, run: str) -> Observed | None:
        """See reconcile.Backend."""
        key = key_of(run)
        found = self.cache.runs.get(key)
        if found is None or found.deleting:
            self._refused.pop(key, None)
            self._put_off.pop(key, None)
            return None
        self._observed[key] = found.uid, found.spec
        self.cache.release(key)
        progress, eta = self.book.shown(key)
        return Observed(
            name=key[1], uid=found.uid, created=found.created, generation=found.generation,
            spec=found.spec, status=found.status, release=self.release, problems=found.problems,
            attempts=tuple(self._attempts(found)), claims=self.cache.claims(key),
            refresh=found.refresh, retry=found.retry, progress=progress, eta=eta,
        )  # fmt: skip

    def _attempts(self, run: RunObject) -> Iterator[Attempt]:
        now, spec = self.clock(), run.spec

        def execution(stage: str) -> str:
            if spec is None:
                return ""
            image = spec.execution.image or (run.status.release or self.release).image
            row = run.status.row(stage)
            check = row is not None and row.check
            return execution_hash(image, spec, block_of(spec, stage, check=check))

        for record in self.cache.records_of(run.uid):
            progress = self.book.latest.get(record.uid)
            seen = attempt_of(record, now, progress=progress, spec=spec, execution=execution)
            if seen is not None:
                yield seen
        yield from self._refused.get(run.key, {}).values()

    def reserve(self, run: str, status: Status) -> None:
        """See reconcile.Backend."""
        key = key_of(run)
        if status != self.cache.runs[key].status:
            self.cache.reserve(key, status)

    def patience(self, run: str) -> float:
        """See reconcile.Backend; what was put off once has no patience left in a second."""
        now = self.clock()
        return max(0.0, self._put_off.setdefault(key_of(run), now) + PATIENCE - now)

    async def write_status(self, run: str, status: Status) -> None:
        """See reconcile.Backend; the version that was observed must be the stored one."""
        key = key_of(run)
        self._put_off.pop(key, None)
        found = self.cache.runs[key]
        before = found.status
        meta = {
            "namespace": key[0], "name": key[1], "uid": found.uid,
            "resourceVersion": str(found.version),
        }  # fmt: skip
        line = status.line()
        body = {
            "apiVersion": API_VERSION, "kind": KIND, "metadata": meta,
            "spec": found.stored_spec, "status": json.loads(line),
        }  # fmt: skip
        try:
            stored = await self.kube.replace_status(RUNS, key[0], body)
        except ApiError as error:
            if error.status in (404, 409):
                await self._look_again(key)
                raise Conflict(str(error)) from error
            raise
        self.cache.put_run(stored)
        self._written.add(key)
        self.meters.told(before, status, found.spec, size=len(line))
        active = (row for row in status.rows if row.state in ACTIVE)
        starting = {(row.name, row.attempt, row.digest) for row in active}
        refused = self._refused.get(key, {})
        for number in refused.keys() - starting:
            del refused[number]

    async def stop(self, run: str, attempt: Attempt) -> None:
        """See reconcile.Backend; pods get SIGTERM from the garbage collector."""
        record = self.cache.records.get(attempt.handle)
        if record is None:
            number = (attempt.stage, attempt.number, attempt.digest)
            self._refused.get(key_of(run), {}).pop(number, None)
        elif record.job is not None:
            # The intent of a Job that we do not ask for may be another engine's.
            await self._confirm(key_of(run))
            await self.kube.delete(JOBS, record.origin.key[0], record.job.name, record.uid)
            record.stopping = True

    async def start(self, run: str, start: Start) -> None:
        """See reconcile.Backend."""
        key = key_of(run)
        # Those of the decision: the user may have changed the run since.
        uid, spec = self._observed[key]
        assert spec is not None
        await self._confirm(key)
        order = Order(key, uid, start, spec, self.settings)
        try:
            body = job(order)
            if order.scheduling.nodes > 1:
                await self._name_nodes(key, uid)
            stored = await self._create(order, body)
        except JobError as error:
            self._refuse(order, Problem(field=error.field, message=error.message))
        except ApiError as error:
            if error.final:
                self._refuse(order, Problem(field=order.path, message=error.message))
            else:
                self._hold(order, f"{order.path}: {error.message or error}")
                raise
        else:
            self._refused.get(key, {}).pop((start.name, start.attempt, start.digest), None)
            self.cache.put_job(stored)

    async def emit(self, run: str, events: Sequence[Event]) -> None:
        """See reconcile.Backend."""
        found = self.cache.runs.get(key_of(run))
        for event in events:
            log.info("%s: %s: %s", run, event.reason, event.message)
            if found is not None:
                self.poster.post(found, event)

    # Around a step ------------------------------------------------------------------------------

    async def prepare(self, key: Key) -> None:
        """Before a step: what no event has told of the status's Jobs and of their pods' ends."""
        run = self.cache.runs.get(key)
        if run is None:
            return
        active = [row for row in run.status.rows if row.state in (*ACTIVE, State.STOPPING)]
        if any(row.handle and row.handle not in self.cache.records for row in active):
            # Gone without a word, or another engine's Job of which the watch has not told yet.
            for item in await self.kube.list(JOBS, key[0], f"{UID_LABEL}={run.uid}"):
                self.cache.put_job(item)
        asked = {(row.name, row.attempt, row.digest) for row in active}
        for record in self.cache.records_of(run.uid):
            origin, done = record.origin, record.job is not None and record.job.finished
            told = any(pod.exit is not None for pod in record.pods.values())
            open_ends = not told or bool(record.live_pods)
            mine = (origin.stage, origin.number, origin.digest) in asked
            if mine and done and open_ends and not record.complete_pods:
                await self._list_pods(record)

    async def _list_pods(self, record: Record) -> None:
        selector = f"batch.kubernetes.io/controller-uid={record.uid}"
        items = await self.kube.list(PODS, record.origin.key[0], selector)
        for item in items:
            self.cache.put_pod(item)
        there = {item["metadata"]["uid"] for item in items}
        for pod in [pod for pod in record.live_pods if pod.uid not in there]:
            meta = {"uid": pod.uid, "namespace": record.origin.key[0], "name": pod.name}
            self.cache.drop_pod({"metadata": meta | {"resourceVersion": str(pod.version)}})
        record.complete_pods = True

    def rest(self, key: Key) -> None:
        """After a step: what was kept for its writes alone."""
        self._observed.pop(key, None)
        self._written.discard(key)

    def due(self, key: Key) -> float | None:
        """Seconds until a pod that should be gone is given up."""
        run = self.cache.runs.get(key)
        records = self.cache.records_of(run.uid) if run else []
        ends = [pod.deleted for record in records for pod in record.live_pods if pod.deleted]
        lefts = [end + STUCK_SECONDS - self.clock() for end in ends]
        return min((left for left in lefts if left > 0), default=None)

    # Parts of a write ---------------------------------------------------------------------------

    async def _look_again(self, key: Key) -> None:
        """Puts the stored object into the cache."""
        try:
            self.cache.put_run(await self.kube.get(RUNS, *key))
        except ApiError as error:
            if error.status != 404:
                raise
            if run := self.cache.runs.get(key):
                meta = {"namespace": key[0], "name": key[1], "uid": run.uid}
                self.cache.drop_run({"metadata": meta})

    async def _confirm(self, key: Key) -> None:
        """If no status was written in this step another engine may have gone on meanwhile."""
        if key in self._written:
            return
        found = self.cache.runs.get(key)
        await self._look_again(key)
        if found is None or self.cache.runs.get(key) is not found:
            raise Conflict(f"{key}: is not as it was")
        self._written.add(key)

    async def _name_nodes(self, key: Key, uid: str) -> None:
        try:
            await self.kube.create(SERVICES, key[0], service(key, uid))
        except ApiError as error:
            if error.status != 409:
                raise

    async def _create(self, order: Order, body: dict[str, Any]) -> dict[str, Any]:
        """The stored Job: made now, or by a step whose end we do not know."""
        try:
            return await self.kube.create(JOBS, order.key[0], body)
        except ApiError as error:
            if error.status != 409:
                raise
        there = await self.kube.get(JOBS, order.key[0], order.name)
        meta = there["metadata"]
        if Origin.of(meta) != Origin.of(body["metadata"]):
            raise JobError("metadata.name", f"Job {order.name} exists and is not this run's")
        if "deletionTimestamp" in meta:
            raise ApiError(409, "Terminating", f"Job {order.name} is being deleted")
        return there

    def _refuse(self, order: Order, problem: Problem) -> None:
        """The attempt ends before it began: what it asks for cannot be made."""
        self._note(order, Phase.ENDED, exit=Exit.CONFIGURATION, result=Result(problem=problem))

    def _hold(self, order: Order, trouble: str) -> None:
        """The attempt is not there yet; the step is repeated."""
        self._note(order, Phase.PENDING, trouble=trouble[:200])

    def _note(self, order: Order, phase: Phase, **more: Any) -> None:
        start = order.start
        seen = Attempt(
            stage=start.name, number=start.attempt, digest=start.digest, handle="", phase=phase,
            **more,
        )  # fmt: skip
        self._refused.setdefault(order.key, {})[start.name, start.attempt, start.digest] = seen


def key_of(run: str) -> Key:
    """`namespace/name` -> key of the cache."""
    namespace, _, name = run.partition("/")
    return namespace, name
