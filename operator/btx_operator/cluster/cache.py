"""The operator's picture of the cluster, in memory: runs, Jobs, pods, and who claims which digest.

Fed by watch events (handlers.py), by full lists (resync.py) and by the answers to our own writes
(backend.py); an older version of an object never replaces a newer one. No I/O, no policy.
"""

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from btx_api.status import ACTIVE, Status

from btx_operator.cluster.objects import (
    JobObject,
    Key,
    Origin,
    PodObject,
    Record,
    RunObject,
    version_of,
)
from btx_operator.observed import Claim

Object = Mapping[str, Any]
Group = tuple[str, str, str]
"""Namespace and storage_key: runs of one group share artifacts."""
TOMBSTONES = 2_000
"""Uids of what was deleted last; what a late event brings back beyond them the next list drops."""


class Cache:
    """Every method is synchronous; `changed` is called with each run that may have work to do."""

    def __init__(self, changed: Callable[[Key], None]) -> None:
        self.runs: dict[Key, RunObject] = {}
        self.records: dict[str, Record] = {}
        """By the Job's uid."""
        self._changed = changed
        self._of_run: dict[str, set[str]] = {}
        self._pods: dict[str, str] = {}
        self._tombs: OrderedDict[str, None] = OrderedDict()
        self._reserved: dict[Key, Status] = {}
        self._claims: dict[tuple[Group, str], set[Key]] = {}
        self._digests: dict[Key, tuple[Group, Mapping[str, str]]] = {}

    # Runs ---------------------------------------------------------------------------------------

    def put_run(self, item: Object) -> bool:
        """Whether it was news."""
        key, uid = _key(item), item["metadata"]["uid"]
        old = self.runs.get(key)
        if uid in self._tombs or (old and old.version >= version_of(item)):
            return False
        run = RunObject.of(item)
        if old and old.uid != uid:
            self.drop_run({"metadata": {**item["metadata"], "uid": old.uid}})
        elif old and old.packed_spec == run.packed_spec:
            # Reading a spec costs more than all the rest.
            run.adopt(old)
        self.runs[key] = run
        self._reserved.pop(key, None)
        self._index(run, run.states)
        self._changed(key)
        return True

    def drop_run(self, item: Object) -> None:
        """It was deleted; its Jobs follow by garbage collection."""
        key, uid = _key(item), item["metadata"]["uid"]
        self._bury(uid)
        run = self.runs.get(key)
        if run is not None and run.uid == uid:
            del self.runs[key]
            self._reserved.pop(key, None)
            self._unindex(key)
        for handle in tuple(self._of_run.get(uid, ())):
            self._forget(handle)

    def reserve(self, key: Key, status: Status) -> None:
        """From now on others see these rows as claims; until `release`, or a newer object."""
        self._reserved[key] = status
        self._index(self.runs[key], {row.digest: row.state for row in status.stages})

    def release(self, key: Key) -> None:
        """Claims are those of the stored status again."""
        if self._reserved.pop(key, None) is not None:
            self._index(self.runs[key], self.runs[key].states)

    def _index(self, run: RunObject, states: Mapping[str, str]) -> None:
        """Who claims which digest; wakes those who share one that is in another state now."""
        before = self._digests.get(run.key)
        group = (run.key[0], *run.storage) if run.storage else before and before[0]
        if not group:
            return
        old = before[1] if before and before[0] == group else {}
        if before and before[0] != group:
            self._unindex(run.key)
        for digest in old.keys() - states.keys():
            self._discard(group, digest, run.key)
        self._digests[run.key] = (group, states)
        for digest, state in states.items():
            sharers = self._claims.setdefault((group, digest), set())
            sharers.add(run.key)
            if old.get(digest) != state:
                for other in sharers - {run.key}:
                    self._changed(other)

    def _unindex(self, key: Key) -> None:
        group, states = self._digests.pop(key, (None, {}))
        for digest in states:
            if group is not None:
                for other in self._discard(group, digest, key):
                    self._changed(other)

    def _discard(self, group: Group, digest: str, key: Key) -> set[Key]:
        sharers = self._claims.get((group, digest), set())
        sharers.discard(key)
        if not sharers:
            self._claims.pop((group, digest), None)
        return sharers

    def claims(self, key: Key) -> "Claims":
        """Rows of other runs over the same storage, by digest."""
        group = self._digests[key][0] if key in self._digests else None
        return Claims(self, key, group)

    def sharers(self, group: Group, digest: str, key: Key) -> Iterator[Claim]:
        """Claims of other runs on one digest."""
        for other in sorted(self._claims.get((group, digest), set()) - {key}):
            run = self.runs[other]
            status = self._reserved.get(other) or run.status
            row = next((row for row in status.stages if row.digest == digest), None)
            if row is not None and not run.deleting:
                yield Claim(run=other[1], uid=run.uid, created=run.created, row=row)

    # Jobs and pods ------------------------------------------------------------------------------

    def put_job(self, item: Object) -> bool:
        """Whether it was news."""
        job = JobObject.of(item)
        if job is None or job.uid in self._tombs:
            return False
        record = self._record(job.uid, job.origin)
        if record.job is not None and record.job.version >= job.version:
            return False
        record.job = job
        self._changed(job.origin.key)
        return True

    def drop_job(self, item: Object) -> None:
        """The object is gone; its pods may still be ending."""
        uid = item["metadata"]["uid"]
        self._bury(uid)
        record = self.records.get(uid)
        if record is not None:
            record.job = None
            self._changed(record.origin.key)

    def put_pod(self, item: Object) -> bool:
        """Whether it was news."""
        pod = PodObject.of(item)
        if pod is None or pod.uid in self._tombs or pod.origin.run_uid in self._tombs:
            return False
        record = self._record(pod.job_uid, pod.origin)
        old = record.pods.get(pod.uid)
        if old is not None and old.version >= pod.version:
            return False
        record.pods[pod.uid] = pod
        self._pods[pod.uid] = pod.job_uid
        self._changed(pod.origin.key)
        return True

    def drop_pod(self, item: Object) -> None:
        """The object is gone; what was last seen of it stays with its attempt."""
        self.put_pod(item)
        uid = item["metadata"]["uid"]
        self._bury(uid)
        record = self.records.get(self._pods.pop(uid, ""))
        if record is not None and uid in record.pods:
            record.pods[uid] = replace(record.pods[uid], gone=True)
            self._changed(record.origin.key)

    def records_of(self, run_uid: str) -> list[Record]:
        """Every attempt of a run of which anything is left."""
        return [self.records[uid] for uid in self._of_run.get(run_uid, ())]

    def tidy(self, key: Key) -> None:
        """After a status was stored: what it tells of need not be kept here."""
        run = self.runs.get(key)
        if run is None:
            return
        rows = run.status.rows
        handles = {row.handle for row in rows if row.handle}
        for record in self.records_of(run.uid):
            if record.job is None and not record.live_pods and record.uid not in handles:
                self._forget(record.uid)
        if run.ended and not any(row.state in ACTIVE for row in rows):
            run.forget()

    def _record(self, uid: str, origin: Origin) -> Record:
        record = self.records.get(uid)
        if record is None:
            record = self.records[uid] = Record(origin=origin, uid=uid)
            self._of_run.setdefault(origin.run_uid, set()).add(uid)
        return record

    def _forget(self, uid: str) -> None:
        record = self.records.pop(uid)
        for pod in record.pods:
            self._pods.pop(pod, None)
        mine = self._of_run[record.origin.run_uid]
        mine.discard(uid)
        if not mine:
            del self._of_run[record.origin.run_uid]

    def _bury(self, uid: str) -> None:
        """A late event or an old list must not bring it back."""
        self._tombs[uid] = None
        while len(self._tombs) > TOMBSTONES:
            self._tombs.popitem(last=False)

    def uids(self) -> set[str]:
        """Of all objects that are there, as far as is known."""
        found = {run.uid for run in self.runs.values()}
        for record in self.records.values():
            found |= {record.uid} if record.job else set()
            found |= {pod.uid for pod in record.pods.values() if not pod.gone}
        return found

    # Lists --------------------------------------------------------------------------------------

    def take(self, kind: str, items: Iterable[Object]) -> dict[str, int]:
        """Part of a full list of one kind; what was news, by uid with its version."""
        put = {"runs": self.put_run, "jobs": self.put_job, "pods": self.put_pod}[kind]
        return {item["metadata"]["uid"]: version_of(item) for item in items if put(item)}

    def prune(
        self, kind: str, there: Container[str], version: int, namespaces: tuple[str, ...]
    ) -> int:
        """Removes what a full list made at `version` lacks and is not newer; returns how much.

        `there` has the uids of the list, `namespaces` are those that were listed (none: all).
        """
        drop = {"runs": self.drop_run, "jobs": self.drop_job, "pods": self.drop_pod}[kind]
        removed = 0
        for item in self._stored(kind):
            meta = item["metadata"]
            inside = not namespaces or meta["namespace"] in namespaces
            if inside and meta["uid"] not in there and int(meta["resourceVersion"]) <= version:
                drop(item)
                removed += 1
        return removed

    def _stored(self, kind: str) -> list[Object]:
        """As much of each object as its removal needs."""

        def meta(key: Key, uid: str, version: int) -> Object:
            names = {"namespace": key[0], "name": key[1], "uid": uid}
            return {"metadata": names | {"resourceVersion": str(version)}}

        if kind == "runs":
            return [meta(run.key, run.uid, run.version) for run in self.runs.values()]
        records = self.records.values()
        if kind == "jobs":
            return [meta(r.origin.key, r.uid, r.job.version) for r in records if r.job]
        pods = [pod for r in records for pod in r.pods.values() if not pod.gone]
        return [meta(pod.origin.key, pod.uid, pod.version) for pod in pods]


def _key(item: Object) -> Key:
    return item["metadata"]["namespace"], item["metadata"]["name"]


class Claims(Mapping[str, tuple[Claim, ...]]):
    """Looked up when asked: a run asks for the digests of its own stages only."""

    def __init__(self, cache: Cache, key: Key, group: Group | None) -> None:
        self._cache, self._key, self._group = cache, key, group

    def __getitem__(self, digest: str) -> tuple[Claim, ...]:
        found = self._found(digest)
        if not found:
            raise KeyError(digest)
        return found

    def _found(self, digest: str) -> tuple[Claim, ...]:
        if self._group is None:
            return ()
        return tuple(self._cache.sharers(self._group, digest, self._key))

    def __iter__(self) -> Iterator[str]:
        digests = {d for group, d in self._cache._claims if group == self._group}
        return iter(sorted(d for d in digests if self._found(d)))

    def __len__(self) -> int:
        return sum(1 for _ in self)
