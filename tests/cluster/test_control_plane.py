"""The real control plane and the hollow node do what later tests rely on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.control_plane import Cluster
from cluster.hollow_node import SCRIPT
from kubernetes import client, watch
from kubernetes.dynamic import DynamicClient

ROOT = Path(__file__).parent.parent.parent
FAIL_ON_42 = {
    "rules": [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "main", "operator": "In", "values": [42]},
        },
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
}


def job(script: Any, **spec: Any) -> dict[str, Any]:
    """A Job of one pod that follows a script."""
    pod = {"restartPolicy": "Never", "containers": [{"name": "main", "image": "hollow"}]}
    template = {"metadata": {"annotations": {SCRIPT: json.dumps(script)}}, "spec": pod}
    policy = {"backoffLimit": 0, "podFailurePolicy": FAIL_ON_42}
    return {"metadata": {"name": "job"}, "spec": {**policy, "template": template, **spec}}


def until(
    listing: Callable[..., Any], namespace: str, wanted: Callable[[Any], bool], since: Any = None
) -> Any:
    """The first object (of a watch) that is as wanted; fails after a minute.

    `since`: an object; what was and is gone again by now is seen too, from its version on.
    """
    start = {"resource_version": since.metadata.resource_version} if since else {}
    stream = watch.Watch().stream(listing, namespace, timeout_seconds=60, **start)
    for event in stream:
        if event["type"] != "DELETED" and wanted(event["object"]):
            return event["object"]
    raise AssertionError("nothing came to be as wanted")


def ended(job: client.V1Job) -> bool:
    """Whether the Job controller has the last word on it."""
    return any(c.type in ("Complete", "Failed") for c in job.status.conditions or ())


def run(api: client.ApiClient, namespace: str, body: dict[str, Any]) -> client.V1Job:
    """The Job when it has ended."""
    batch = client.BatchV1Api(api)
    batch.create_namespaced_job(namespace, body)
    return until(batch.list_namespaced_job, namespace, ended)


def last(job: client.V1Job) -> tuple[str, str]:
    """Type and reason of the Job's final condition."""
    found = [c for c in job.status.conditions if c.type in ("Complete", "Failed")]
    return found[0].type, found[0].reason


def test_a_job_that_exits_with_zero_completes(
    api: client.ApiClient, namespace: str, hollow: str
) -> None:
    """Scheduled by the real scheduler, counted by the real Job controller, message readable."""
    done = run(api, namespace, job({"message": "all well"}))

    [pod] = client.CoreV1Api(api).list_namespaced_pod(namespace).items
    assert last(done) == ("Complete", "CompletionsReached")
    assert done.status.succeeded == 1
    assert pod.spec.node_name == hollow
    assert pod.status.container_statuses[0].state.terminated.message == "all well"
    assert pod.status.pod_ip


def test_a_configuration_code_fails_the_job_by_its_policy(
    api: client.ApiClient, namespace: str, hollow: str
) -> None:
    """podFailurePolicy reads the exit code that the node reports, with retries left."""
    done = run(api, namespace, job({"exit": 42}, backoffLimit=3))

    assert last(done) == ("Failed", "PodFailurePolicy")
    assert done.status.failed == 1


def test_an_evicted_pod_is_replaced_and_not_counted(
    api: client.ApiClient, namespace: str, hollow: str
) -> None:
    """The policy ignores DisruptionTarget: the Job's second pod ends it, with no retry allowed."""
    done = run(api, namespace, job([{"end": "evict"}, {"exit": 0}]))

    assert last(done) == ("Complete", "CompletionsReached")
    assert not done.status.failed


@pytest.mark.parametrize(
    ("script", "reason"),
    [({"begin": "never"}, "ContainerCreating"), ({"begin": "pull-error"}, "ImagePullBackOff")],
)
def test_a_pod_that_cannot_start_waits_with_its_reason(
    api: client.ApiClient, namespace: str, hollow: str, script: dict[str, str], reason: str
) -> None:
    """It stays Pending, and goes when its Job goes."""
    core, batch = client.CoreV1Api(api), client.BatchV1Api(api)
    batch.create_namespaced_job(namespace, job(script))
    pod = until(
        core.list_namespaced_pod, namespace, lambda pod: bool(pod.status.container_statuses)
    )

    batch.delete_namespaced_job("job", namespace, propagation_policy="Background")
    gone(core.list_namespaced_pod, namespace)
    assert pod.status.phase == "Pending"
    assert pod.status.container_statuses[0].state.waiting.reason == reason


def gone(listing: Callable[..., Any], namespace: str) -> None:
    """Until the one object that is left, if any, is not there either."""
    left = listing(namespace)
    if left.items:
        stream = watch.Watch().stream(
            listing, namespace, timeout_seconds=60, resource_version=left.metadata.resource_version
        )
        assert any(event["type"] == "DELETED" for event in stream)


@pytest.mark.parametrize(("deaf", "code"), [(False, 143), (True, 137)])
def test_a_deleted_pod_ends_by_its_signal(
    api: client.ApiClient, namespace: str, hollow: str, deaf: bool, code: int
) -> None:
    """SIGTERM ends a hanging pod (143); one that ignores it is killed after its grace (137)."""
    core = client.CoreV1Api(api)
    annotations = {SCRIPT: json.dumps({"end": "hang", "deaf": deaf})}
    spec = {
        "restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "main", "image": "hollow"}],
    }  # fmt: skip
    body = {"metadata": {"name": "pod", "annotations": annotations}, "spec": spec}
    core.create_namespaced_pod(namespace, body)
    pods = core.list_namespaced_pod
    began = until(pods, namespace, lambda pod: pod.status.phase == "Running")
    core.delete_namespaced_pod("pod", namespace)

    pod = until(pods, namespace, lambda pod: pod.status.phase == "Failed", began)
    assert pod.status.container_statuses[0].state.terminated.exit_code == code


def test_a_finished_job_goes_by_its_ttl(api: client.ApiClient, namespace: str, hollow: str) -> None:
    """The TTL controller deletes the Job, the garbage collector its pod."""
    batch = client.BatchV1Api(api)
    run(api, namespace, job({}, ttlSecondsAfterFinished=1))

    gone(client.CoreV1Api(api).list_namespaced_pod, namespace)
    # The Job is deleted in the foreground: it is the last to go.
    gone(batch.list_namespaced_job, namespace)


def test_a_job_ends_although_the_api_server_was_killed(
    cluster: Cluster, api: client.ApiClient, namespace: str, hollow: str
) -> None:
    """Killed while the pod runs and started again: same port, same data."""
    batch, core = client.BatchV1Api(api), client.CoreV1Api(api)
    batch.create_namespaced_job(namespace, job({"seconds": 3}))
    until(core.list_namespaced_pod, namespace, lambda pod: pod.status.phase == "Running")
    cluster.stop("kube-apiserver")
    cluster.start("kube-apiserver")

    done = until(batch.list_namespaced_job, namespace, ended)
    assert last(done) == ("Complete", "CompletionsReached")
    assert len(core.list_namespaced_pod(namespace).items) == 1


def allowed(batch: client.BatchV1Api, namespace: str) -> bool:
    """Whether this client may list Jobs; a binding takes effect a moment after it was written."""
    try:
        batch.list_namespaced_job(namespace)
    except client.ApiException as error:
        assert error.status == 403, error
        return False
    return True


def test_rbac_refuses_a_service_account_without_rights(
    cluster: Cluster, api: client.ApiClient, namespace: str
) -> None:
    """Its own token gets 403; with a role binding it gets the list; both stand in the audit log."""
    request = {"spec": {"expirationSeconds": 600}}
    token = client.CoreV1Api(api).create_namespaced_service_account_token(
        "default", namespace, request
    )
    configuration = client.Configuration(host=cluster.address)
    configuration.ssl_ca_cert = str(cluster.authority.certificate)
    configuration.api_key = {"authorization": f"Bearer {token.status.token}"}
    with client.ApiClient(configuration) as powerless:
        batch = client.BatchV1Api(powerless)
        with pytest.raises(client.ApiException) as refused:
            batch.list_namespaced_job(namespace)
        binding = {
            "metadata": {"name": "read"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"},
            "subjects": [{"kind": "ServiceAccount", "name": "default", "namespace": namespace}],
        }  # fmt: skip
        client.RbacAuthorizationV1Api(api).create_namespaced_role_binding(namespace, binding)
        cluster.wait_for("the role binding", lambda: allowed(batch, namespace))

    entries = [json.loads(line) for line in cluster.audit_log.read_text().splitlines()]
    user = f"system:serviceaccount:{namespace}:default"
    codes = [e["responseStatus"]["code"] for e in entries if e["user"]["username"] == user]
    assert refused.value.status == 403
    assert codes[0] == 403
    assert codes[-1] == 200


def test_the_restricted_standard_refuses_a_privileged_pod(
    api: client.ApiClient, namespace: str
) -> None:
    """PodSecurity admission is on."""
    core = client.CoreV1Api(api)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    core.patch_namespace(namespace, {"metadata": {"labels": labels}})
    container = {"name": "main", "image": "hollow", "securityContext": {"privileged": True}}
    body = {"metadata": {"name": "pod"}, "spec": {"containers": [container]}}

    with pytest.raises(client.ApiException, match="violates PodSecurity"):
        core.create_namespaced_pod(namespace, body)


def test_our_resource_is_established_and_takes_the_quickstart(
    api: client.ApiClient, namespace: str
) -> None:
    """The generated CRD is structural for the real API server; defaults arrive by server-side apply."""
    extensions = client.ApiextensionsV1Api(api)
    body = yaml.safe_load((ROOT / "crds/btxruns.btx.dev.yaml").read_text())
    extensions.create_custom_resource_definition(body)
    stream = watch.Watch().stream(extensions.list_custom_resource_definition, timeout_seconds=60)
    conditions = next(
        found
        for event in stream
        if (found := {c.type: c.status for c in event["object"].status.conditions or ()}).get(
            "Established"
        )
        == "True"
    )

    dynamic = DynamicClient(api)
    runs = dynamic.resources.get(api_version=body["spec"]["group"] + "/v1alpha1", kind="BTXRun")
    manifest = yaml.safe_load((ROOT / "examples/quickstart.yaml").read_text())
    applied = dynamic.server_side_apply(
        runs, body=manifest, namespace=namespace, field_manager="test"
    ).to_dict()
    assert conditions.get("NonStructuralSchema", "False") == "False"
    assert applied["metadata"]["generation"] == 1
    assert applied["spec"]["method"] == "BTX"
