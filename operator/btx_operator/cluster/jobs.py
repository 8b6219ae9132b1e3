"""Start -> Job: the one object that an attempt is; and the Service of several nodes; pure.

A Job is POSTed once and never changed. Called by backend.py.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from btx_api.names import (
    API_VERSION,
    ATTEMPT_ANNOTATION,
    CONTAINER,
    DIGEST_ANNOTATION,
    EXECUTION_ANNOTATION,
    EXPERT_LABEL,
    GROUP,
    KIND,
    MASTER_ADDR_ENV,
    MASTER_PORT_ENV,
    NODE_RANK_ENV,
    NODES_ENV,
    QUEUE_LABEL,
    RUN_LABEL,
    STAGE_LABEL,
    TASK_ENV,
    UID_LABEL,
    job_name,
)
from btx_api.spec import BTXRunSpec, Scheduling
from btx_api.stage import Exit, Kind
from btx_api.status import PREFLIGHT

from btx_operator.attempts import scheduling_of
from btx_operator.cluster.objects import Key
from btx_operator.cluster.settings import Settings
from btx_operator.observed import Start

Object = dict[str, Any]
TASK_BYTES = 120_000
"""Linux takes 128 KiB for one variable of the environment."""
MASTER_PORT = 29_400
SCRATCH, AUTHORITIES, RESULT = "/scratch", "/etc/btx/authorities", "/dev/termination-log"
USER = 65_532
"""No name, no home, no rights; the images' own user."""
VOLUMES = ("emptyDir", "persistentVolumeClaim", "configMap")
MOUNT = ("mountPath", "subPath", "readOnly")
GPU = "nvidia.com/gpu"
RANKED = (Kind.TRAIN, Kind.FINETUNE, Kind.STITCH)
"""Kinds whose work is shared by ranks; all others run on one node."""


class JobError(Exception):
    """The spec asks for a Job that we do not make; `field` is what to mend."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message = field, message


def block_of(spec: BTXRunSpec, name: str, *, check: bool = False) -> Scheduling:
    """How a stage's pods run; preflight's are those of prepare, on one node without GPUs.

    `check`: of the attempt that only looks for a Result, which needs no more.
    """
    plain = {"gpus": 0, "nodes": 1, "processes": None}
    if name == PREFLIGHT:
        return spec.execution.prepare.model_copy(update=plain)
    scheduling = scheduling_of(spec, name)
    if check:
        return scheduling.model_copy(update=plain)
    ranked = name.partition("-")[0] in RANKED
    return scheduling if ranked else scheduling.model_copy(update={"nodes": 1})


def execution_hash(image: str, spec: BTXRunSpec, scheduling: Scheduling) -> str:
    """Of what an edit may change for the next attempt."""
    parts = (scheduling, spec.storage, spec.seed)
    plain = [part.model_dump(mode="json", exclude_defaults=True) for part in parts]
    text = json.dumps([image, *plain], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class Order:
    """One attempt of one run, to be made here."""

    key: Key
    uid: str
    """Of the run."""
    start: Start
    spec: BTXRunSpec
    settings: Settings

    @property
    def name(self) -> str:
        """The same for the same attempt, another for any other; at most 52 characters."""
        text = "\0".join([self.uid, self.start.name, self.start.digest, str(self.start.attempt)])
        tag = hashlib.sha256(text.encode()).hexdigest()[:8]
        return job_name(self.key[1], self.start.name, tag)

    @property
    def scheduling(self) -> Scheduling:
        """How its pods run."""
        return block_of(self.spec, self.start.name, check=self.start.task.execution.must_exist)

    @property
    def path(self) -> str:
        """Of that block in the manifest."""
        return block_path(self.start.name)


def block_path(stage: str) -> str:
    """Path of the scheduling block that a stage's pods come from."""
    kind = stage.partition("-")[0]
    return f"spec.execution.{'prepare' if kind == PREFLIGHT else kind}"


def service_name(run: str, uid: str) -> str:
    """Of the headless Service by which the nodes of a run's attempts find each other."""
    return f"{run[:54]}-{hashlib.sha256(uid.encode()).hexdigest()[:8]}"


def owner(run: str, uid: str) -> Object:
    """The run as the controlling owner: what it owns goes with it. It blocks no deletion."""
    return {
        "apiVersion": API_VERSION, "kind": KIND, "name": run, "uid": uid,
        "controller": True, "blockOwnerDeletion": False,
    }  # fmt: skip


def labels_of(run: str, uid: str, stage: str) -> dict[str, str]:
    """On the Job and its pods."""
    kind, _, rest = stage.partition("-")
    expert = {EXPERT_LABEL: rest} if kind == Kind.TRAIN and rest else {}
    return {
        RUN_LABEL: run, UID_LABEL: uid, STAGE_LABEL: stage, **expert,
        "app.kubernetes.io/name": "btx-trainer", "app.kubernetes.io/part-of": "btx",
        "app.kubernetes.io/managed-by": "btx-operator",
    }  # fmt: skip


def service(key: Key, uid: str) -> Object:
    """Gives every pod of a run's multi-node attempts a name, from before it is ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": service_name(key[1], uid),
            "namespace": key[0],
            "labels": {RUN_LABEL: key[1], UID_LABEL: uid},
            "ownerReferences": [owner(key[1], uid)],
        },
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {UID_LABEL: uid},
            "ports": [{"name": "ranks", "port": MASTER_PORT}],
        },
    }


def job(order: Order) -> Object:
    """The Job of an attempt; JobError when the spec asks for what we do not make."""
    start, scheduling, path = order.start, order.scheduling, order.path
    nodes = scheduling.nodes
    labels = labels_of(order.key[1], order.uid, start.name)
    notes = {ATTEMPT_ANNOTATION: str(start.attempt), DIGEST_ANNOTATION: start.digest}
    queue = {QUEUE_LABEL: scheduling.queue_name} if scheduling.queue_name else {}
    execution = execution_hash(start.task.execution.image, order.spec, scheduling)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": order.name,
            "namespace": order.key[0],
            "labels": labels | queue,
            "annotations": notes | {EXECUTION_ANNOTATION: execution},
            "ownerReferences": [owner(order.key[1], order.uid)],
        },
        "spec": {
            "backoffLimit": 0,
            "completions": nodes,
            "parallelism": nodes,
            "completionMode": "Indexed" if nodes > 1 else "NonIndexed",
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": list(_rules(nodes))},
            # Whoever admits Jobs unsuspends it: there is no moment in which it could start before.
            "suspend": bool(queue),
            "ttlSecondsAfterFinished": order.settings.job_ttl_seconds,
            "template": {
                "metadata": {
                    "labels": _outside(scheduling.labels, f"{path}.labels") | labels,
                    "annotations": _outside(scheduling.annotations, f"{path}.annotations") | notes,
                },
                "spec": _pod(order),
            },
        },
    }


def _rules(nodes: int) -> Iterator[Object]:
    """What Kubernetes does by itself, with the operator down as well (KEP-3329).

    A preempted pod of one node is replaced. Of several nodes all ranks stop, since one cannot come
    back alone; the next attempt resumes. outcome.py reads the index of the rule that matched.
    """

    def exits(code: Exit, action: str) -> Object:
        codes = {"containerName": CONTAINER, "operator": "In", "values": [int(code)]}
        return {"action": action, "onExitCodes": codes}

    replaced = "FailJob" if nodes > 1 else "Ignore"
    yield exits(Exit.CONFIGURATION, "FailJob")
    conditions = [{"type": "DisruptionTarget", "status": "True"}]
    yield {"action": replaced, "onPodConditions": conditions}
    yield exits(Exit.PREEMPTED, replaced)


def _pod(order: Order) -> Object:
    scheduling, settings = order.scheduling, order.settings
    volumes, mounts = _volumes(order)
    found = {
        "serviceAccountName": _service_account(order),
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "imagePullSecrets": [{"name": secret} for secret in settings.image_pull_secrets],
        "nodeSelector": scheduling.node_selector,
        "tolerations": list(scheduling.tolerations),
        "affinity": scheduling.affinity,
        "priorityClassName": scheduling.priority_class_name,
        "runtimeClassName": scheduling.runtime_class_name,
        "subdomain": service_name(order.key[1], order.uid) if scheduling.nodes > 1 else None,
        "containers": [_container(order, mounts)],
        "volumes": volumes,
    }  # fmt: skip
    return {key: value for key, value in found.items() if value} | {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": scheduling.termination_grace_period_seconds,
    }


def _container(order: Order, mounts: list[Object]) -> Object:
    settings = order.settings
    return {
        "name": CONTAINER,
        "image": order.start.task.execution.image,
        "imagePullPolicy": settings.image_pull_policy,
        "env": list(_env(order)),
        "envFrom": [{"secretRef": {"name": secret}} for secret in _secrets(order.spec)],
        "ports": [{"name": "metrics", "containerPort": settings.trainer_port}],
        "resources": _resources(order),
        "volumeMounts": mounts,
        "terminationMessagePath": RESULT,
        "terminationMessagePolicy": "File",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _secrets(spec: BTXRunSpec) -> list[str]:
    refs = (spec.storage.credentials_secret_ref, spec.seed.token_secret_ref)
    return list(dict.fromkeys(ref.name for ref in refs if ref is not None))


def _env(order: Order) -> Iterator[Object]:
    """The user's variables first: of two with one name the later one counts."""
    scheduling = order.scheduling
    yield from scheduling.env
    if scheduling.nodes > 1:
        rank = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        first = f"{order.name}-0.{service_name(order.key[1], order.uid)}"
        yield {"name": NODES_ENV, "value": str(scheduling.nodes)}
        yield {"name": NODE_RANK_ENV, "valueFrom": {"fieldRef": {"fieldPath": rank}}}
        yield {"name": MASTER_ADDR_ENV, "value": first}
        yield {"name": MASTER_PORT_ENV, "value": str(MASTER_PORT)}
    yield {"name": TASK_ENV, "value": _task(order)}


def _task(order: Order) -> str:
    """The Task, completed with what only the backend knows."""
    task, storage = order.start.task, order.spec.storage
    if storage.ca_bundle:
        storage = storage.model_copy(update={"ca_bundle": f"{AUTHORITIES}/ca.crt"})
    execution = task.execution.model_copy(
        update={
            "storage": storage,
            "listen": f"0.0.0.0:{order.settings.trainer_port}",
            "scratch": SCRATCH,
            "result": RESULT,
            "scheduling": order.scheduling,
        }
    )
    preflight = task.preflight
    if preflight is not None:
        asked = preflight.spec.model_copy(update={"storage": storage})
        preflight = preflight.model_copy(update={"spec": asked})
    task = task.model_copy(update={"execution": execution, "preflight": preflight})
    text = task.model_dump_json(exclude_defaults=True)
    if len(text.encode()) > TASK_BYTES:
        raise JobError("spec", f"is too large for a task: {len(text.encode())} of {TASK_BYTES} B")
    return text


def _resources(order: Order) -> Object:
    resources: Object = order.scheduling.resources or {}
    unknown = set(resources) - {"requests", "limits", "claims"}
    if unknown:
        raise JobError(f"{order.path}.resources", f"unknown: {', '.join(sorted(unknown))}")
    if not order.scheduling.gpus:
        return resources
    limits = {GPU: str(order.scheduling.gpus)} | (resources.get("limits") or {})
    return resources | {"limits": limits}


def _service_account(order: Order) -> str:
    known = order.settings.service_accounts
    wish = order.scheduling.service_account_name or known[0]
    if wish not in known:
        where = f"{order.path}.serviceAccountName"
        raise JobError(where, f"{wish!r} is none of the chart's: {', '.join(known)}")
    return wish


def _volumes(order: Order) -> tuple[list[Object], list[Object]]:
    """Volumes and their mounts: ours, then the user's."""
    settings, bundle = order.settings, order.spec.storage.ca_bundle
    shared = {"medium": "Memory", "sizeLimit": settings.shared_memory_size}
    volumes: list[Object] = [
        {"name": "scratch", "emptyDir": {"sizeLimit": settings.scratch_size}},
        {"name": "memory", "emptyDir": shared},
    ]
    mounts: list[Object] = [
        {"name": "scratch", "mountPath": SCRATCH},
        {"name": "memory", "mountPath": "/dev/shm"},
    ]
    if bundle:
        # Optional: the trainer says which field names a bundle that is not there.
        volumes.append({"name": "authorities", "configMap": {"name": bundle, "optional": True}})
        mounts.append({"name": "authorities", "mountPath": AUTHORITIES, "readOnly": True})
    for i, entry in enumerate(order.scheduling.volumes):
        name, where = f"own-{i}", f"{order.path}.volumes[{i}]"
        volumes.append({"name": name, **_kind_of_volume(entry, where)})
        mount: Object = {key: entry[key] for key in MOUNT if key in entry}
        mounts.append({"name": name, **mount})
    return volumes, mounts


def _kind_of_volume(entry: Object, where: str) -> Object:
    """An entry is one allowed kind of volume, with a mountPath beside it."""
    kind = {key: value for key, value in entry.items() if key in VOLUMES}
    extra = set(entry) - set(VOLUMES) - {"name", *MOUNT}
    if extra:
        raise JobError(where, f"{', '.join(sorted(extra))}: allowed are {', '.join(VOLUMES)}")
    if len(kind) != 1:
        raise JobError(where, f"needs exactly one of {', '.join(VOLUMES)}")
    if not isinstance(entry.get("mountPath"), str):
        raise JobError(f"{where}.mountPath", "is required")
    return kind


def _outside(given: dict[str, str] | None, path: str) -> dict[str, str]:
    """Labels or annotations of the user, none of which may be ours."""
    ours = [key for key in given or {} if key.partition("/")[0].endswith(GROUP)]
    if ours:
        raise JobError(path, f"{', '.join(ours)}: names below {GROUP} are the operator's")
    return dict(given or {})
