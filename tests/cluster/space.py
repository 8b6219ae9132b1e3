"""One namespace of a test's cluster: what its user does there, and what is to be seen there.

Everything is raw JSON as the API server has it. Waiting is by watches that begin with what is there.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from btx_api.names import (
    API_VERSION,
    ATTEMPT_ANNOTATION,
    GROUP,
    KIND,
    PLURAL,
    RUN_LABEL,
    STAGE_LABEL,
    TASK_ENV,
    VERSION,
)
from btx_api.stage import Task
from btx_api.status import PREFLIGHT
from builders import a_spec
from cluster.control_plane import Cluster
from cluster.hollow_node import EXIT, SCRIPT
from cluster.played_trainer import commits
from kubernetes import client, watch

Object = dict[str, Any]
ROOT = Path(__file__).parent.parent.parent
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
PATIENCE = 100
"""Seconds that anything may take on a busy machine."""
TOLD = {"end": "told"}
"""Script of a pod that ends when `Space.tell` says so."""


def scripted(**blocks: Any) -> Object:
    """`spec.execution` in which the pods of each kind follow a script."""
    return {kind: {"annotations": {SCRIPT: json.dumps(script)}} for kind, script in blocks.items()}


def install(cluster: Cluster) -> None:
    """The CRD, established."""
    extensions = client.ApiextensionsV1Api(cluster.client())
    body = yaml.safe_load((ROOT / "crds/btxruns.btx.dev.yaml").read_text())
    extensions.create_custom_resource_definition(body)
    runs = client.CustomObjectsApi(cluster.client())

    def served() -> bool:
        try:
            runs.list_cluster_custom_object(GROUP, VERSION, PLURAL)
        except client.ApiException:
            return False
        return True

    cluster.wait_for("the CRD", served)


class Space:
    """A new namespace under the restricted Pod Security Standard, with a storage of its own."""

    def __init__(self, cluster: Cluster, api: client.ApiClient, name: str) -> None:
        self.cluster, self.name, self.patience = cluster, name, PATIENCE
        self.core, self.batch = client.CoreV1Api(api), client.BatchV1Api(api)
        self.custom = client.CustomObjectsApi(api)
        self.core.create_namespace({"metadata": {"name": name, "labels": RESTRICTED}})
        cluster.wait_for("a service account", lambda: bool(self._accounts()))

    def _accounts(self) -> list[Any]:
        return list(self.core.list_namespaced_service_account(self.name).items)

    def close(self) -> None:
        """The namespace goes, without waiting; it may be gone."""
        with contextlib.suppress(client.ApiException):
            self.core.delete_namespace(self.name)

    # What a user does ---------------------------------------------------------------------------

    def spec(self, **changes: Any) -> Object:
        """A spec of two experts over this namespace's storage; back-off of a second."""
        policy = {"backoffSeconds": 1} | changes.pop("policy", {})
        storage = {"uri": f"file://{self.name}"} | changes.pop("storage", {})
        return a_spec(storage=storage, policy=policy, **changes)

    def run(self, name: str = "run", **changes: Any) -> Object:
        """Creates a run."""
        meta = {"name": name, "annotations": changes.pop("annotations", {})}
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": meta}
        body["spec"] = self.spec(**changes)
        created: Object = self.custom.create_namespaced_custom_object(
            GROUP, VERSION, self.name, PLURAL, body
        )
        return created

    def edit(self, name: str = "run", **spec: Any) -> Object:
        """Merge-patches the spec."""
        return self.patch({"spec": spec}, name)

    def patch(self, body: Object, name: str = "run", subresource: str = "") -> Object:
        """Merge-patches the object, or its status."""
        patch = self.custom.patch_namespaced_custom_object
        if subresource:
            patch = self.custom.patch_namespaced_custom_object_status
        found: Object = patch(
            GROUP, VERSION, self.name, PLURAL, name, body, _content_type="application/merge-patch+json"
        )  # fmt: skip
        return found

    def note(self, name: str = "run", **annotations: str) -> None:
        """Sets annotations of our group: `refresh`, `retry`."""
        notes = {f"{GROUP}/{key}": value for key, value in annotations.items()}
        self.patch({"metadata": {"annotations": notes}}, name)

    def remove(self, name: str = "run") -> None:
        """Deletes a run."""
        self.custom.delete_namespaced_custom_object(GROUP, VERSION, self.name, PLURAL, name)

    def tell(self, pod: Object, code: int = 0) -> None:
        """A pod whose script waits for it ends with this code."""
        body = {"metadata": {"annotations": {EXIT: str(code)}}}
        self.core.patch_namespaced_pod(pod["metadata"]["name"], self.name, body)

    def release(self, stage: str, code: int = 0, name: str = "run") -> Object:
        """Waits until a stage's pod runs and tells it to end."""
        pod = self.pod(stage, running, name)
        self.tell(pod, code)
        return pod

    def delete_job(self, job: Object, policy: str = "Background") -> None:
        """By hand."""
        self.batch.delete_namespaced_job(
            job["metadata"]["name"], self.name, propagation_policy=policy
        )

    # What is there ------------------------------------------------------------------------------

    def get(self, name: str = "run") -> Object:
        """The run."""
        found: Object = self.custom.get_namespaced_custom_object(
            GROUP, VERSION, self.name, PLURAL, name
        )
        return found

    def row(self, stage: str, name: str = "run") -> Object:
        """A row of the run's status; empty while there is none."""
        return row_of(self.get(name), stage)

    def jobs(self, stage: str = "", name: str = "run") -> list[Object]:
        """Jobs of a run, first attempt first."""
        items = _listed(self.batch.list_namespaced_job, self.name, _labels(name, stage))
        return sorted(items, key=lambda job: (job["metadata"]["creationTimestamp"], attempt(job)))

    def pods(self, stage: str = "", name: str = "run") -> list[Object]:
        """Pods of a run."""
        return _listed(self.core.list_namespaced_pod, self.name, _labels(name, stage))

    def events(self, name: str = "run") -> list[tuple[str, str]]:
        """(reason, message) of every event about a run, oldest first by what its name has."""
        items = _listed(self.core.list_namespaced_event, self.name, "")
        mine = [e for e in items if about(e, name)]
        mine.sort(key=lambda e: int(e["metadata"]["resourceVersion"]))
        return [(e["reason"], e["message"]) for e in mine]

    def commits(self, stage: str = "") -> list[str]:
        """Stages whose artifact a pod of this namespace made, one entry for each time."""
        lines = [c for c in commits(self.cluster.ledger) if c["namespace"] == self.name]
        return [c["stage"] for c in lines if stage in ("", c["stage"])]

    def audit(self, **wanted: str) -> list[Object]:
        """Entries of the API server's audit log about this namespace's objects, oldest first."""
        with self.cluster.audit_log.open() as file:
            lines = [json.loads(line) for line in file if self.name in line]
        refs = [(line, line.get("objectRef", {}) | {"verb": line["verb"]}) for line in lines]
        found = [
            line
            for line, ref in refs
            if ref.get("namespace") == self.name
            and all(ref.get(key) == value for key, value in wanted.items())
        ]
        return sorted(found, key=lambda line: str(line["stageTimestamp"]))

    # Waiting ------------------------------------------------------------------------------------

    def until(self, wanted: Callable[[Object], Any], name: str = "run") -> Object:
        """The run, as soon as it is as wanted."""
        for item in self.history(name):
            if wanted(item):
                return item
        raise AssertionError(f"{name} is not as wanted: {json.dumps(self.get(name)['status'])}")

    def history(self, name: str = "run") -> Iterator[Object]:
        """Every version of the run from now on."""
        listing = self.custom.list_namespaced_custom_object
        stream = watch.Watch().stream(
            listing, GROUP, VERSION, self.name, PLURAL, field_selector=f"metadata.name={name}",
            timeout_seconds=self.patience, deserialize=False,
        )  # fmt: skip
        yield from (event["object"] for event in stream if event["type"] != "DELETED")

    def mark(self) -> str:
        """A moment of the store, for `replay`."""
        answer = self.batch.list_namespaced_job(self.name, _preload_content=False)
        return str(json.loads(answer.data)["metadata"]["resourceVersion"])

    def replay(self, since: str) -> tuple[list[Object], list[Object]]:
        """Every version of every run, and every Job as it was created, since a mark."""
        runs = watch.Watch().stream(
            self.custom.list_namespaced_custom_object, GROUP, VERSION, self.name, PLURAL,
            resource_version=since, timeout_seconds=1, deserialize=False,
        )  # fmt: skip
        jobs = watch.Watch().stream(
            self.batch.list_namespaced_job, self.name, resource_version=since, timeout_seconds=1,
            deserialize=False,
        )  # fmt: skip
        return (
            [event["object"] for event in runs if event["type"] != "DELETED"],
            [event["object"] for event in jobs if event["type"] == "ADDED"],
        )

    def until_row(self, stage: str, name: str = "run", **fields: Any) -> Object:
        """A row of the status, as soon as its fields have these values (a set: one of them)."""

        def wanted(run: Object) -> bool:
            row = row_of(run, stage)
            return bool(row) and all(_is(row.get(key), value) for key, value in fields.items())

        return row_of(self.until(wanted, name), stage)

    def until_condition(self, kind: str, status: str, reason: str, name: str = "run") -> str:
        """The message of a condition, as soon as it is so."""
        run = self.until(lambda run: condition(run, kind)[:2] == (status, reason), name)
        return condition(run, kind)[2]

    def succeeded(self, name: str = "run") -> Object:
        """The run, once it has succeeded."""
        return self.until(lambda run: run.get("status", {}).get("state") == "Succeeded", name)

    def pod(self, stage: str, wanted: Callable[[Object], Any], name: str = "run") -> Object:
        """The first pod of a stage that is as wanted."""
        return self._seen(self.core.list_namespaced_pod, _labels(name, stage), wanted)

    def job(
        self, stage: str, wanted: Callable[[Object], Any] = lambda job: True, name: str = "run"
    ) -> Object:
        """The first Job of a stage that is as wanted."""
        return self._seen(self.batch.list_namespaced_job, _labels(name, stage), wanted)

    def event(self, reason: str, text: str = "", name: str = "run") -> str:
        """The message of the first event with this reason and text."""
        found = self._seen(
            self.core.list_namespaced_event, "",
            lambda e: about(e, name) and e["reason"] == reason and text in e["message"],
        )  # fmt: skip
        return str(found["message"])

    def none_left(self, stage: str = "", name: str = "run") -> None:
        """Until no Job and no pod is left."""
        self.cluster.wait_for(
            f"the end of {stage or name}",
            lambda: not self.jobs(stage, name) and not self.pods(stage, name),
            self.patience,
        )

    def _seen(self, listing: Any, labels: str, wanted: Callable[[Object], Any]) -> Object:
        stream = watch.Watch().stream(
            listing,
            self.name,
            label_selector=labels,
            timeout_seconds=self.patience,
            deserialize=False,
        )
        for event in stream:
            if event["type"] != "DELETED" and wanted(event["object"]):
                return dict(event["object"])
        raise AssertionError(f"nothing came to be as wanted; run: {self.custom_states()}")

    def custom_states(self) -> str:
        """Of every run, for a failed test."""
        found = self.custom.list_namespaced_custom_object(GROUP, VERSION, self.name, PLURAL)
        return json.dumps([item.get("status") for item in found["items"]])


def _is(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, set) else value == wanted


def _labels(name: str, stage: str) -> str:
    return f"{RUN_LABEL}={name}" + (f",{STAGE_LABEL}={stage}" if stage else "")


def _listed(listing: Any, namespace: str, labels: str) -> list[Object]:
    answer = listing(namespace, label_selector=labels, _preload_content=False)
    items: list[Object] = json.loads(answer.data)["items"]
    return items


def about(event: Object, name: str) -> bool:
    """Whether an event tells of a run."""
    who = event["involvedObject"]
    return bool(who["kind"] == KIND and who["name"] == name)


def row_of(run: Object, stage: str) -> Object:
    """A row of a status; empty: there is none."""
    status = run.get("status", {})
    rows = [*status.get("stages", []), *([status[PREFLIGHT]] if PREFLIGHT in status else [])]
    return next(({"state": "Pending", **row} for row in rows if row["name"] == stage), {})


def condition(run: Object, kind: str) -> tuple[str, str, str]:
    """Status, reason and message."""
    found = [c for c in run.get("status", {}).get("conditions", []) if c["type"] == kind]
    return (
        (found[0]["status"], found[0]["reason"], found[0].get("message", ""))
        if found
        else ("",) * 3
    )


def version(item: Object) -> int:
    """The store's revision at which this version was written; grows over all kinds."""
    return int(item["metadata"]["resourceVersion"])


def running(pod: Object) -> bool:
    """Whether its container runs, and nobody asked it to end."""
    return bool(pod["status"]["phase"] == "Running" and not deleting(pod))


def deleting(item: Object) -> bool:
    """Whether it is to go."""
    return "deletionTimestamp" in item["metadata"]


def attempt(item: Object) -> int:
    """Number of the attempt that a Job or pod belongs to."""
    return int(item["metadata"]["annotations"][ATTEMPT_ANNOTATION])


def number(wanted: int) -> Callable[[Object], bool]:
    """Whether a Job or pod belongs to the attempt with this number."""
    return lambda item: attempt(item) == wanted


def container(item: Object) -> Object:
    """The container of a Job or pod."""
    spec = item["spec"].get("template", item)["spec"]
    [found] = spec["containers"]
    return dict(found)


def environment(item: Object) -> dict[str, Any]:
    """Its variables: text, or where the text comes from."""
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container(item)["env"]}


def task_of(item: Object) -> Task:
    """The task that a Job or pod was given."""
    return Task.model_validate_json(environment(item)[TASK_ENV])


def job_name(run: str, uid: str, stage: str, digest: str, number: int) -> str:
    """Of one attempt: run, stage, and 8 digits of what tells it from any other."""
    text = "\0".join([uid, stage, digest, str(number)])
    return f"{run}-{stage}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def ended(job: Object) -> str:
    """Complete, Failed, or nothing yet."""
    ends = [c for c in job["status"].get("conditions", []) if c["status"] == "True"]
    return next((c["type"] for c in ends if c["type"] in ("Complete", "Failed")), "")
