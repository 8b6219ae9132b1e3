"""What users may ask of pods, and what they are told when it cannot be had; attempts on several nodes."""

from typing import Any

import pytest
from btx_api.names import GROUP, RUN_LABEL, UID_LABEL
from cluster.operator_process import Operator
from cluster.space import (
    TOLD,
    Object,
    Space,
    attempt,
    condition,
    container,
    deleting,
    ended,
    environment,
    row_of,
    running,
    scripted,
    task_of,
)

TWO_NODES = {"train": {"nodes": 2, "gpus": 1}}


def on_two_nodes(script: Any) -> Object:
    """`spec.execution`: train on two nodes, by a script."""
    block = scripted(train=script)["train"]
    return {"train": block | TWO_NODES["train"]}


@pytest.mark.shows("credentials-secret", "token-secret", "ca-bundle")
def test_secrets_and_authorities(engine: Operator, space: Space) -> None:
    """By reference only: envFrom of every pod, and a mounted ConfigMap whose path the task has."""
    space.run(
        storage={"credentialsSecretRef": {"name": "s3"}, "caBundle": "authorities"},
        seed={"uri": "file://seed", "tokenSecretRef": {"name": "hf"}},
    )  # fmt: skip
    space.succeeded()
    for stage in ("preflight", "prepare-code", "train-code", "mix", "evaluate"):
        [job] = space.jobs(stage)
        own, task = container(job), task_of(job)
        assert own["envFrom"] == [{"secretRef": {"name": "s3"}}, {"secretRef": {"name": "hf"}}]
        [mount] = [m for m in own["volumeMounts"] if m["name"] == "authorities"]
        assert mount == {
            "name": "authorities",
            "mountPath": "/etc/btx/authorities",
            "readOnly": True,
        }
        volumes = {v["name"]: v for v in job["spec"]["template"]["spec"]["volumes"]}
        assert volumes["authorities"]["configMap"]["name"] == "authorities"
        assert task.execution.storage.ca_bundle == "/etc/btx/authorities/ca.crt"
        if task.preflight is not None:
            assert task.preflight.spec.storage.ca_bundle == "/etc/btx/authorities/ca.crt"


@pytest.mark.shows("service-account", "pod-fields", "volumes", "gpus")
def test_what_the_user_may_say_of_pods(engine: Operator, space: Space) -> None:
    """Every allowed field arrives, an expert's own block overlays its kind's, ours stay ours."""
    space.core.create_namespaced_service_account(space.name, {"metadata": {"name": "gpu"}})
    block = {
        "gpus": 2, "resources": {"requests": {"cpu": "1"}, "limits": {"memory": "2Gi"}},
        "nodeSelector": {"hollow.test/node": "true"}, "serviceAccountName": "gpu",
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": 1, "preference": {"matchExpressions": [
                {"key": "zone", "operator": "In", "values": ["a"]}]}}]}},
        "priorityClassName": "system-cluster-critical",
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "BTX_TASK", "value": "mine"}],
        "volumes": [
            {"mountPath": "/data", "persistentVolumeClaim": {"claimName": "data"}, "readOnly": True},
            {"mountPath": "/etc/more", "configMap": {"name": "more"}},
            {"mountPath": "/big", "emptyDir": {"sizeLimit": "1Gi"}},
        ],
        "labels": {"team": "blue"}, "annotations": {"note": "hello"},
        "terminationGracePeriodSeconds": 60,
    }  # fmt: skip
    own = {"labels": {"team": "red"}, "gpus": 4}
    experts: list[Object] = space.spec()["experts"]
    experts[1] = experts[1] | {"execution": own}
    space.run(execution={"train": block}, experts=experts)
    job, math = space.job("train-code"), space.job("train-math")
    template = job["spec"]["template"]
    spec, found = template["spec"], container(job)

    assert found["resources"] == {
        "requests": {"cpu": "1"}, "limits": {"memory": "2Gi", "nvidia.com/gpu": "2"},
    }  # fmt: skip
    for field in ("nodeSelector", "tolerations", "priorityClassName", "serviceAccountName"):
        assert spec[field] == block[field]
    assert spec["affinity"] == block["affinity"]
    assert spec["terminationGracePeriodSeconds"] == 60
    assert template["metadata"]["labels"]["team"] == "blue"
    assert template["metadata"]["annotations"]["note"] == "hello"
    assert template["metadata"]["labels"][RUN_LABEL] == "run"
    env = environment(job)
    assert env["NCCL_DEBUG"] == "INFO"
    assert task_of(job).execution.name == "train-code"
    mounts = {m["mountPath"]: m for m in found["volumeMounts"]}
    volumes = {v["name"]: v for v in spec["volumes"]}
    assert mounts["/data"]["readOnly"] is True
    assert volumes[mounts["/data"]["name"]]["persistentVolumeClaim"]["claimName"] == "data"
    assert volumes[mounts["/etc/more"]["name"]]["configMap"]["name"] == "more"
    assert volumes[mounts["/big"]["name"]]["emptyDir"] == {"sizeLimit": "1Gi"}
    assert found["securityContext"]["readOnlyRootFilesystem"] is True
    assert container(math)["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert math["spec"]["template"]["metadata"]["labels"]["team"] == "red"
    assert math["spec"]["template"]["spec"]["serviceAccountName"] == "gpu"


REFUSED: dict[str, tuple[Object, str]] = {
    "account": (
        {"serviceAccountName": "admin"},
        "spec.execution.train.serviceAccountName: 'admin' is none of the chart's: default, gpu",
    ),
    "volume": (
        {"volumes": [{"mountPath": "/host", "hostPath": {"path": "/"}}]},
        "spec.execution.train.volumes[0]: hostPath",
    ),
    "label": ({"labels": {f"{GROUP}/run": "other"}}, "spec.execution.train.labels: btx.dev/run"),
    "annotation": (
        {"annotations": {f"{GROUP}/attempt": "9"}},
        "spec.execution.train.annotations: btx.dev/attempt",
    ),
    "resources": (
        {"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}}, "spec.execution.train: "
    ),
    "env": ({"env": [{"value": "nameless"}]}, "spec.execution.train: "),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.shows("refused-pod-fields", "api-refuses", "correction-heals", "least-power")
def test_what_cannot_be_asked_of_pods(engine: Operator, space: Space, case: str) -> None:
    """Nothing is created; the stage is given up with the field's name; an edit heals the run."""
    block, text = REFUSED[case]
    space.run(method="Dense", execution={"train": block})
    message = space.event("StageGivenUp", "train-dense")
    assert text in message
    assert text[:40] in space.until_condition("Succeeded", "False", "StageFailed")
    assert space.jobs("train-dense") == []
    assert space.row("train-dense")["attempt"] == 1
    space.edit(execution={"train": dict.fromkeys(block)})
    run = space.succeeded()
    assert (row_of(run, "train-dense")["attempt"], run["metadata"]["generation"]) == (2, 2)


@pytest.mark.shows("image-pull", "correction-heals", "message-names-field")
def test_a_wrong_image(engine: Operator, space: Space) -> None:
    """Said in a condition and an event; another image replaces the pod, and nothing is counted."""
    script = {"stages": {"preflight": {"attempts": [{"begin": "pull-error"}, {}]}}}
    space.run(execution=scripted(prepare=script) | {"image": "trainer:wrong"})
    message = space.until_condition("Running", "False", "Blocked")
    assert message == "preflight: spec.execution.image: cannot pull trainer:wrong"
    assert "cannot pull trainer:wrong" in condition(space.get(), "Accepted")[2]
    space.event("AttemptBlocked", "spec.execution.image: cannot pull trainer:wrong")
    space.edit(execution={"image": "trainer:right"})
    run = space.succeeded()
    row = row_of(run, "preflight")
    assert (row["attempt"], row.get("failures", 0)) == (2, 0)
    assert container(space.jobs("mix")[0])["image"] == "trainer:right"


@pytest.mark.parametrize("stage", ["preflight", "train-dense"])
@pytest.mark.shows("missing-secret", "correction-heals", "message-names-field")
def test_a_missing_secret(engine: Operator, space: Space, stage: str) -> None:
    """The field that names it is said; naming another one heals the attempt that could not begin."""
    lacks = {"begin": "config-error", "message": 'secret "nowhere" not found'}
    script = {"stages": {stage: {"attempts": [lacks, {}]}}}
    space.run(
        method="Dense", storage={"credentialsSecretRef": {"name": "nowhere"}},
        execution=scripted(prepare=script, train=script),
    )  # fmt: skip
    message = space.until_condition("Running", "False", "Blocked")
    expected = f"{stage}: spec.storage.credentialsSecretRef.name: secret 'nowhere' not found"
    assert message == expected
    space.event("AttemptBlocked", "credentialsSecretRef.name: secret 'nowhere' not found")
    space.edit(storage={"credentialsSecretRef": {"name": "s3"}})
    run = space.succeeded()
    row = row_of(run, stage)
    assert (row["attempt"], row.get("failures", 0)) == (2, 0)
    assert container(space.jobs(stage)[-1])["envFrom"] == [{"secretRef": {"name": "s3"}}]


@pytest.mark.shows("unschedulable")
def test_a_pod_for_which_there_is_no_node(engine: Operator, space: Space) -> None:
    """The scheduler's words, with the block to mend; correcting it heals."""
    space.run(method="Dense", execution={"train": {"nodeSelector": {"zone": "moon"}}})
    message = space.until_condition("Running", "False", "Blocked")
    assert message.startswith("train-dense: spec.execution.train: Unschedulable: 0/1 nodes")
    space.edit(execution={"train": {"nodeSelector": {"zone": None}}})
    run = space.succeeded()
    assert row_of(run, "train-dense")["attempt"] == 2


@pytest.mark.shows("problems-found", "preflight-again", "correction-heals")
def test_preflight_finds_problems(engine: Operator, space: Space) -> None:
    """They become a condition, and preflight looks again by itself until they are gone."""
    said = '{"resolved":{"problems":["spec.seed.uri: no such folder"]}}'
    script = {"stages": {"preflight": {"attempts": [{"message": said}, {}]}}}
    space.run(execution=scripted(prepare=script))
    message = space.until_condition("Accepted", "False", "ProblemsFound")
    assert message == "spec.seed.uri: no such folder"
    assert space.jobs("prepare-code") == []
    space.event("ProblemsFound", "spec.seed.uri: no such folder")
    run = space.succeeded()
    assert row_of(run, "preflight")["attempt"] == 2
    assert "problems" not in run["status"]


# Several nodes --------------------------------------------------------------------------------------


@pytest.mark.shows("multi-node", "headless-service")
def test_an_expert_on_two_nodes(engine: Operator, space: Space) -> None:
    """An Indexed Job; a headless Service by which rank 0 is found before it is ready."""
    run = space.run(execution=on_two_nodes(TOLD))
    job = space.job("train-code", lambda job: job["status"].get("active") == 2)
    space.pod("train-code", running)
    pods = sorted(space.pods("train-code"), key=lambda pod: str(pod["spec"]["hostname"]))
    [service] = space.core.list_namespaced_service(space.name).items
    spec, uid, name = job["spec"], run["metadata"]["uid"], job["metadata"]["name"]

    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    actions = [rule["action"] for rule in spec["podFailurePolicy"]["rules"]]
    assert actions == ["FailJob"] * 3
    assert service.spec.cluster_ip == "None"
    assert service.spec.publish_not_ready_addresses is True
    assert service.spec.selector == {UID_LABEL: uid}
    assert service.metadata.owner_references[0].uid == uid
    assert [pod["spec"]["hostname"] for pod in pods] == [f"{name}-0", f"{name}-1"]
    assert {pod["spec"]["subdomain"] for pod in pods} == {service.metadata.name}
    for pod in pods:
        env = environment(pod)
        assert (env["NNODES"], env["MASTER_ADDR"]) == ("2", f"{name}-0.{service.metadata.name}")
        assert env["MASTER_PORT"] == str(service.spec.ports[0].port)
        path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        assert env["NODE_RANK"]["fieldRef"]["fieldPath"] == path
    for stage in ("train-code", "train-math"):
        for pod in two(space, stage):
            space.tell(pod)
    space.succeeded()
    assert sorted(set(space.commits())) == sorted(space.commits())
    assert [job["spec"]["completions"] for job in space.jobs("mix")] == [1]


def two(space: Space, stage: str) -> list[Object]:
    """Both pods of a stage, once they run."""

    def both() -> bool:
        return len([pod for pod in space.pods(stage) if running(pod)]) == 2

    space.cluster.wait_for(f"two pods of {stage}", both)
    return space.pods(stage)


CODE, MATH = "train-code", "train-math"


@pytest.mark.shows("rank-fails", "rank-preempted")
def test_one_of_two_ranks_ends(engine: Operator, space: Space) -> None:
    """Killed with 1: all stop, counted as a failure. Evicted, or 75: as a preemption."""
    well: Object = {"seconds": 0.2}
    scripts = {
        CODE: {"attempts": [{"ranks": [{"end": "hang"}, {"exit": 1}]}, well]},
        MATH: {"attempts": [{"ranks": [{"end": "hang"}, {"end": "evict"}]},
                            {"ranks": [{"end": "hang"}, {"exit": 75}]}, well]},
    }  # fmt: skip
    space.run(execution=on_two_nodes({"stages": scripts}))
    run = space.succeeded()

    code, math = row_of(run, CODE), row_of(run, MATH)
    assert (code["attempt"], code["failures"], code.get("preemptions", 0)) == (2, 1, 0)
    assert (math["attempt"], math.get("failures", 0), math["preemptions"]) == (3, 0, 2)
    assert [ended(job) for job in space.jobs(CODE)] == ["Failed", "Complete"]
    assert [ended(job) for job in space.jobs(MATH)] == ["Failed", "Failed", "Complete"]
    assert [attempt(job) for job in space.jobs(MATH)] == [1, 2, 3]
    assert not any(deleting(job) for job in space.jobs(MATH))
    space.event("AttemptFailed", "train-code: attempt 1: exit 1")
    space.event("AttemptPreempted", "train-math: attempt 1")
    assert space.commits(CODE) == [CODE]
    assert len(space.core.list_namespaced_service(space.name).items) == 1
