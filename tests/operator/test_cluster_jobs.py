"""Start -> Job: what an attempt looks like to Kubernetes, and what is refused before it is made."""

import json
from typing import Any

import pytest
from btx_api.names import JOB_NAME_LENGTH, TASK_ENV
from btx_api.spec import BTXRunSpec
from btx_api.stage import Kind, Preflight, Stage, Task, TaskExecution
from btx_operator.cluster.jobs import TASK_BYTES, JobError, Order, job, service, service_name
from btx_operator.cluster.settings import Settings
from btx_operator.observed import Start
from builders import spec_of

SETTINGS = Settings(
    trainer_image="trainer:1",
    service_accounts=("btx-trainer", "team"),
    image_pull_secrets=("pull",),
)
UID = "0f5f9d6e-0000-4000-8000-000000000001"


def an_order(
    spec: BTXRunSpec, stage: str = "train-code", attempt: int = 1, run: str = "run", uid: str = UID
) -> Order:
    execution = TaskExecution(storage=spec.storage, name=stage, run=run, image="trainer:1")
    work: dict[str, Any] = {"preflight": Preflight(spec=spec, uid=uid)}
    if stage != "preflight":
        kind = Kind(stage.partition("-")[0])
        work = {"stage": Stage(kind=kind, version=1, recipe={}, inputs=())}
    task = Task(execution=execution, **work)
    start = Start(name=stage, attempt=attempt, digest="d" * 32, task=task)
    return Order(("ns", run), uid, start, spec, SETTINGS)


def made(stage: str = "train-code", **execution: Any) -> dict[str, Any]:
    kind = "prepare" if stage == "preflight" else stage.partition("-")[0]
    return job(an_order(spec_of(execution={kind: execution}), stage))


def pod_of(body: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = body["spec"]["template"]["spec"]
    return pod


def task_of(body: dict[str, Any]) -> Task:
    env = {e["name"]: e.get("value") for e in pod_of(body)["containers"][0]["env"]}
    return Task.model_validate_json(env[TASK_ENV])


def test_the_name_is_a_function_of_the_attempt() -> None:
    """The same attempt posted twice is one object; any other has another name; both fit."""
    spec = spec_of()
    orders = [
        an_order(spec), an_order(spec, attempt=2), an_order(spec, "train-math"),
        an_order(spec, uid=UID[:-1] + "2"), an_order(spec, "preflight"),
    ]  # fmt: skip

    assert an_order(spec).name == orders[0].name
    assert len({order.name for order in orders}) == len(orders)
    assert all(order.name.startswith(f"run-{order.start.name}-") for order in orders)
    assert all(len(order.name) <= JOB_NAME_LENGTH for order in orders)


def test_a_pod_has_no_power() -> None:
    """The restricted Pod Security Standard, a read-only root, no token, our own scratch."""
    pod = pod_of(made())
    container = pod["containers"][0]
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    volumes = {v["name"]: v for v in pod["volumes"]}

    assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
    assert pod["serviceAccountName"] == "btx-trainer"
    assert pod["imagePullSecrets"] == [{"name": "pull"}]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert volumes[mounts["/scratch"]]["emptyDir"] == {"sizeLimit": "50Gi"}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_a_job_is_made_once_and_goes_with_its_run() -> None:
    """No retries of its own; owned without blocking; results are kept before it may vanish."""
    body = made()
    owner, spec = body["metadata"]["ownerReferences"][0], body["spec"]
    actions = [rule["action"] for rule in spec["podFailurePolicy"]["rules"]]

    assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (UID, True, False)
    assert (spec["backoffLimit"], spec["suspend"], spec["completions"]) == (0, False, 1)
    assert spec["ttlSecondsAfterFinished"] == 86_400
    assert actions == ["FailJob", "Ignore", "Ignore"]
    assert body["metadata"]["labels"]["btx.dev/expert"] == "code"
    assert "btx.dev/expert" not in made("mix")["metadata"]["labels"]
    labels = body["spec"]["template"]["metadata"]["labels"]
    assert labels == {k: v for k, v in body["metadata"]["labels"].items() if k in labels}


def test_a_queue_gets_a_suspended_job() -> None:
    """Kueue admits it; without a queue nobody would unsuspend it."""
    body = made(queueName="team")

    assert body["spec"]["suspend"] is True
    assert body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"


def test_several_nodes_find_each_other_and_stop_together() -> None:
    """An Indexed Job, a name for node 0, one failed rank ends the Job; mix runs on one node."""
    body = made(nodes=4, gpus=8)
    pod = pod_of(body)
    env = {e["name"]: e for e in pod["containers"][0]["env"]}
    name = body["metadata"]["name"]

    assert (body["spec"]["completions"], body["spec"]["parallelism"]) == (4, 4)
    assert body["spec"]["completionMode"] == "Indexed"
    assert [rule["action"] for rule in body["spec"]["podFailurePolicy"]["rules"]] == ["FailJob"] * 3
    assert pod["subdomain"] == service_name("run", UID)
    assert env["NNODES"]["value"] == "4"
    assert "job-completion-index" in env["NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert env["MASTER_ADDR"]["value"] == f"{name}-0.{service_name('run', UID)}"
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    found = service(("ns", "run"), UID)
    assert found["metadata"]["name"] == service_name("run", UID)
    assert found["spec"]["clusterIP"] == "None" and found["spec"]["publishNotReadyAddresses"]
    assert made("mix", nodes=4)["spec"]["completions"] == 1


def test_preflight_runs_as_prepare_does() -> None:
    """On one node without GPUs: what reaches the data for the one reaches it for the other."""
    spec = spec_of(execution={"prepare": {"nodeSelector": {"zone": "a"}, "gpus": 1}})
    pod = pod_of(job(an_order(spec, "preflight")))

    assert pod["nodeSelector"] == {"zone": "a"}
    assert "limits" not in pod["containers"][0]["resources"]


def test_credentials_and_authorities_reach_the_trainer() -> None:
    """Secrets as environment; the bundle as a file, under whose path the task knows it."""
    storage = {
        "uri": "s3://b/p", "credentialsSecretRef": {"name": "keys"}, "caBundle": "authorities",
    }  # fmt: skip
    seed = {"uri": "hf://org/model@" + "a" * 40, "tokenSecretRef": {"name": "token"}}
    spec = spec_of(storage=storage, seed=seed)
    for stage in ("train-code", "preflight"):
        body = job(an_order(spec, stage))
        pod, task = pod_of(body), task_of(body)
        secrets = [s["secretRef"]["name"] for s in pod["containers"][0]["envFrom"]]
        mounted = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
        bundle = next(v for v in pod["volumes"] if "configMap" in v)

        assert secrets == ["keys", "token"]
        assert bundle["configMap"]["name"] == "authorities"
        path = f"{mounted[bundle['name']]}/ca.crt"
        assert task.execution.storage.ca_bundle == path
        if task.preflight:
            assert task.preflight.spec.storage.ca_bundle == path


def test_the_task_is_completed() -> None:
    """What only the backend knows: where to listen, to write, and how the process is run."""
    task = task_of(made(threads=3))

    assert task.execution.listen == "0.0.0.0:9464"
    assert (task.execution.scratch, task.execution.result) == ("/scratch", "/dev/termination-log")
    assert task.execution.scheduling.threads == 3


def test_own_volumes_variables_and_labels() -> None:
    """The allow-list, as Kubernetes wants it; our variables win."""
    body = made(
        volumes=[
            {"mountPath": "/data", "persistentVolumeClaim": {"claimName": "data"}},
            {"mountPath": "/conf", "configMap": {"name": "conf"}, "readOnly": True},
        ],
        env=[{"name": "PROXY", "value": "p"}, {"name": TASK_ENV, "value": "mine"}],
        labels={"team": "a"}, annotations={"note": "b"},
        tolerations=[{"key": "gpu", "operator": "Exists"}], priorityClassName="high",
    )  # fmt: skip
    pod, template = pod_of(body), body["spec"]["template"]["metadata"]
    container = pod["containers"][0]
    mounts = {m["mountPath"]: m for m in container["volumeMounts"]}

    assert mounts["/conf"]["readOnly"] is True and "/data" in mounts
    assert container["env"][0] == {"name": "PROXY", "value": "p"}
    assert [e["name"] for e in container["env"]][-1] == TASK_ENV
    assert task_of(body).execution.name == "train-code"
    assert (template["labels"]["team"], template["annotations"]["note"]) == ("a", "b")
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert pod["priorityClassName"] == "high"


@pytest.mark.parametrize(
    ("execution", "field"),
    [
        ({"volumes": [{"mountPath": "/x", "hostPath": {"path": "/"}}]}, "volumes[0]"),
        ({"volumes": [{"mountPath": "/x"}]}, "volumes[0]"),
        ({"volumes": [{"emptyDir": {}}]}, "volumes[0].mountPath"),
        ({"serviceAccountName": "admin"}, "serviceAccountName"),
        ({"labels": {"btx.dev/run": "other"}}, "labels"),
        ({"annotations": {"sub.btx.dev/x": "y"}}, "annotations"),
        ({"resources": {"limit": {"cpu": 1}}}, "resources"),
    ],
)
def test_what_is_refused_names_its_field(execution: dict[str, Any], field: str) -> None:
    """Before anything is sent to the API server."""
    with pytest.raises(JobError) as error:
        made(**execution)

    assert error.value.field == f"spec.execution.train.{field}"


def test_a_task_that_no_environment_holds_is_refused() -> None:
    """Linux has a limit per variable; the pod would not start, and nobody would know why."""
    data = [{"uri": f"s3://bucket/{i:04d}/{'x' * 900}"} for i in range(140)]
    experts = [{"name": "code", "tokens": 100, "data": data}]
    with pytest.raises(JobError, match=f"too large for a task: [0-9]+ of {TASK_BYTES} B"):
        job(an_order(spec_of(experts=experts), "preflight"))


def test_bodies_are_json() -> None:
    """Nothing in them is a value of ours."""
    for stage in ("preflight", "train-code", "mix"):
        assert json.loads(json.dumps(made(stage))) == made(stage)
