"""What the operator keeps of a run, a Job and a pod: a small part of each; pure.

Written by cache.py from what the API server sends; everything else of an object is dropped, since
thousands are held in memory.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from btx_api.names import (
    ATTEMPT_ANNOTATION,
    CONTAINER,
    DIGEST_ANNOTATION,
    EXECUTION_ANNOTATION,
    REFRESH_ANNOTATION,
    RETRY_ANNOTATION,
    RUN_LABEL,
    STAGE_LABEL,
    UID_LABEL,
)
from btx_api.spec import BTXRunSpec, explain
from btx_api.status import ConditionType, Status
from pydantic import ValidationError

from btx_operator.observed import place_of

Object = Mapping[str, Any]
Key = tuple[str, str]
"""Namespace and name of a run."""


def unix(text: str | None) -> float | None:
    """RFC 3339 -> unix seconds."""
    return datetime.fromisoformat(text).timestamp() if text else None


def version_of(item: Object) -> int:
    """Of one resource they only grow (KEP-5504)."""
    return int(item["metadata"]["resourceVersion"])


@dataclass(slots=True)
class RunObject:
    """A BTXRun. Its spec and status are kept as packed JSON and read when they are asked for."""

    key: Key
    uid: str
    version: int
    generation: int
    created: float
    deleting: bool
    refresh: str
    retry: str
    packed_spec: bytes
    packed_status: bytes
    state: str
    """Of its status, for display."""
    ended: bool
    """Succeeded or failed, by its status."""
    storage: tuple[str, str] | None
    """storage_key of its spec."""
    states: dict[str, str]
    """State of each stage, by digest."""
    _spec: BTXRunSpec | None = None
    _problems: tuple[str, ...] = ()
    _status: Status | None = None

    @classmethod
    def of(cls, item: Object) -> "RunObject":
        """From the API's object."""
        meta = item["metadata"]
        notes = meta.get("annotations") or {}
        status = item.get("status") or {}
        storage = (item.get("spec") or {}).get("storage") or {}
        uri, rows = storage.get("uri"), status.get("stages") or []
        return cls(
            key=(meta["namespace"], meta["name"]),
            uid=meta["uid"],
            version=version_of(item),
            generation=meta.get("generation", 1),
            created=unix(meta["creationTimestamp"]) or 0.0,
            deleting="deletionTimestamp" in meta,
            refresh=notes.get(REFRESH_ANNOTATION, ""),
            retry=notes.get(RETRY_ANNOTATION, ""),
            packed_spec=_packed(item.get("spec")),
            packed_status=_packed(status),
            state=status.get("state", ""),
            ended=any(
                c["type"] == ConditionType.SUCCEEDED and c["status"] != "Unknown"
                for c in status.get("conditions") or []
            ),
            # Read here: of a thousand runs that ended, spec and status are never asked for.
            storage=place_of(storage.get("endpoint"), uri) if uri else None,
            states={row.get("digest", ""): row.get("state", "") for row in rows},
        )

    @property
    def stored_spec(self) -> Any:
        """As the API server has it."""
        return json.loads(zlib.decompress(self.packed_spec))

    @property
    def spec(self) -> BTXRunSpec | None:
        """None when it cannot be read; then `problems` says why."""
        if self._spec is None and not self._problems:
            try:
                self._spec = BTXRunSpec.parse(self.stored_spec)
            except ValidationError as error:
                self._problems = tuple(explain(error))
        return self._spec

    @property
    def problems(self) -> tuple[str, ...]:
        """Why there is no spec, a line for each problem."""
        return self._problems if self.spec is None else ()

    @property
    def status(self) -> Status:
        """As it is stored. One of a release that we cannot read counts as none."""
        if self._status is None:
            try:
                self._status = Status.parse(json.loads(zlib.decompress(self.packed_status)))
            except ValidationError:
                self._status = Status()
        return self._status

    def adopt(self, older: "RunObject") -> None:
        """Takes over what was read of the same spec."""
        self._spec, self._problems = older._spec, older._problems

    def forget(self) -> None:
        """Drops what can be read again: of a run that ended nobody asks."""
        self._spec, self._problems, self._status = None, (), None


def _packed(value: Any) -> bytes:
    return zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 1)


@dataclass(frozen=True, slots=True)
class Origin:
    """Which attempt of which run an object belongs to."""

    key: Key
    run_uid: str
    stage: str
    number: int
    digest: str

    @classmethod
    def of(cls, meta: Object) -> "Origin | None":
        """None when it is not ours."""
        labels, notes = meta.get("labels") or {}, meta.get("annotations") or {}
        try:
            return cls(
                key=(meta["namespace"], labels[RUN_LABEL]),
                run_uid=labels[UID_LABEL],
                stage=labels[STAGE_LABEL],
                number=int(notes[ATTEMPT_ANNOTATION]),
                digest=notes[DIGEST_ANNOTATION],
            )
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class JobObject:
    """A Job of ours."""

    origin: Origin
    name: str
    uid: str
    version: int
    execution: str
    """Hash of image and scheduling."""
    started: float | None
    """Since when it is not suspended."""
    suspended: bool
    deleting: bool
    finished: str
    """Complete, Failed or nothing."""
    message: str

    @classmethod
    def of(cls, item: Object) -> "JobObject | None":
        """From the API's object; None when it is not ours."""
        meta, status = item["metadata"], item.get("status") or {}
        origin = Origin.of(meta)
        if origin is None:
            return None
        ends = [
            c
            for c in status.get("conditions") or []
            if c["type"] in ("Complete", "Failed") and c["status"] == "True"
        ]
        end = ends[0] if ends else {"type": ""}
        return cls(
            origin=origin,
            name=meta["name"],
            uid=meta["uid"],
            version=version_of(item),
            execution=(meta.get("annotations") or {}).get(EXECUTION_ANNOTATION, ""),
            started=unix(status.get("startTime")),
            suspended=bool(item["spec"].get("suspend")),
            deleting="deletionTimestamp" in meta,
            finished=end["type"],
            message=end.get("message", ""),
        )


@dataclass(frozen=True, slots=True)
class PodObject:
    """A pod of a Job of ours."""

    origin: Origin
    name: str
    uid: str
    version: int
    job_uid: str
    rank: int
    """Node of the attempt, from 0."""
    created: float
    ip: str
    phase: str
    deleted: float | None
    """When its grace period ends, once it is to be deleted."""
    disrupted: bool
    """Evicted, preempted, drained: the condition DisruptionTarget."""
    started: float | None
    """Since when its container runs, or ran."""
    finished: float | None
    exit: int | None
    """Exit code of its container once it ended."""
    reason: str
    """Kubernetes' word for how it ended, or for why it does not begin."""
    message: str
    """What the container left (terminationMessagePath), or why it does not begin."""
    image: str
    gone: bool = False
    """The object is gone; what is said here is the last that was seen."""

    @classmethod
    def of(cls, item: Object) -> "PodObject | None":
        """From the API's object; None when it is not ours."""
        meta, status = item["metadata"], item.get("status") or {}
        origin, owner = Origin.of(meta), _controller(meta)
        if origin is None or not owner:
            return None
        container = _named(status.get("containerStatuses"))
        state = container.get("state") or {}
        ended, runs = state.get("terminated") or {}, state.get("running") or {}
        waits = state.get("waiting") or _unscheduled(status)
        index = (meta.get("annotations") or {}).get("batch.kubernetes.io/job-completion-index", 0)
        return cls(
            origin=origin,
            name=meta["name"],
            uid=meta["uid"],
            version=version_of(item),
            job_uid=owner,
            rank=int(index),
            created=unix(meta["creationTimestamp"]) or 0.0,
            ip=status.get("podIP", ""),
            phase=status.get("phase", "Pending"),
            deleted=unix(meta.get("deletionTimestamp")),
            disrupted=any(
                c["type"] == "DisruptionTarget" and c["status"] == "True"
                for c in status.get("conditions") or []
            ),
            started=unix(ended.get("startedAt") or runs.get("startedAt")),
            finished=unix(ended.get("finishedAt")),
            exit=ended.get("exitCode"),
            reason=(ended or waits).get("reason", "") or status.get("reason", ""),
            message=(ended or waits).get("message", "") or status.get("message", ""),
            image=_named(item["spec"].get("containers")).get("image", ""),
        )

    @property
    def ended(self) -> bool:
        """Nothing of it runs any more."""
        return self.gone or self.phase in ("Succeeded", "Failed")


def _controller(meta: Object) -> str:
    owners = meta.get("ownerReferences") or []
    return next((o["uid"] for o in owners if o.get("controller") and o["kind"] == "Job"), "")


def _named(containers: list[Object] | None) -> Object:
    return next((c for c in containers or [] if c["name"] == CONTAINER), {})


def _unscheduled(status: Object) -> Object:
    """The reason for which no node was found."""
    return next(
        (
            c
            for c in status.get("conditions") or []
            if c["type"] == "PodScheduled" and c["status"] == "False"
        ),
        {},
    )


@dataclass(slots=True)
class Record:
    """One attempt: its Job, and the pods that it made."""

    origin: Origin
    uid: str
    """Of the Job: the attempt's handle."""
    job: JobObject | None = None
    pods: dict[str, PodObject] = field(default_factory=dict)
    stopping: bool = False
    """We asked for its deletion."""
    complete_pods: bool = False
    """The pods were listed after the Job had ended: there are no others."""

    @property
    def live_pods(self) -> list[PodObject]:
        """Those that may still run."""
        return [pod for pod in self.pods.values() if not pod.ended]
