"""One attempt is one Job: how it is made, when, and how it is found again."""

import pytest
from btx_api.names import (
    ATTEMPT_ANNOTATION,
    DIGEST_ANNOTATION,
    EXPERT_LABEL,
    RUN_LABEL,
    STAGE_LABEL,
    UID_LABEL,
)
from cluster.operator_process import USER, Operator
from cluster.space import (
    TOLD,
    Space,
    container,
    job_name,
    row_of,
    running,
    scripted,
    task_of,
    version,
)

LONG = "r" * 27
"""The longest name of a run that has prepare-general."""


@pytest.mark.shows("job-name", "job-shape", "task")
def test_the_job_of_an_attempt(engine: Operator, space: Space) -> None:
    """Name, labels, owner, policy, TTL; the Task in its environment is complete."""
    run = space.run(LONG, execution=scripted(prepare={"stages": {"prepare-general": TOLD}}))
    job = space.job("prepare-general", name=LONG)
    uid, meta, spec = run["metadata"]["uid"], job["metadata"], job["spec"]

    digest = space.row("prepare-general", LONG)["digest"]
    assert meta["name"] == job_name(LONG, uid, "prepare-general", digest, 1)
    assert len(meta["name"]) == 52
    labels = {RUN_LABEL: LONG, UID_LABEL: uid, STAGE_LABEL: "prepare-general"}
    notes = {ATTEMPT_ANNOTATION: "1", DIGEST_ANNOTATION: digest}
    for part in (meta, spec["template"]["metadata"]):
        assert labels.items() <= part["labels"].items()
        assert notes.items() <= part["annotations"].items()
    [owner] = meta["ownerReferences"]
    assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (uid, True, False)
    assert (spec["backoffLimit"], spec["completions"], spec["parallelism"]) == (0, 1, 1)
    assert (spec["suspend"], spec["ttlSecondsAfterFinished"]) == (False, 86_400)
    assert spec["podReplacementPolicy"] == "Failed"
    assert EXPERT_LABEL not in meta["labels"]
    task = task_of(job)
    assert task.stage is not None
    assert task.stage.digest == digest
    assert (task.execution.run, task.execution.uid, task.execution.attempt) == (LONG, uid, 1)
    assert task.execution.listen == f"0.0.0.0:{engine.settings['trainerPort']}"
    assert task.execution.image == container(job)["image"] == "trainer:test"
    assert task.execution.scratch == "/scratch"


@pytest.mark.shows("restricted-pod", "pull-secrets", "scratch", "service-account")
def test_the_pod_of_an_attempt_has_the_least_power(engine: Operator, space: Space) -> None:
    """Admitted under the restricted standard; nothing of it can be written but scratch volumes."""
    space.run(execution=scripted(prepare=TOLD))
    pod = space.pod("preflight", running)
    spec, own = pod["spec"], container(pod)

    assert spec["serviceAccountName"] == "default"
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert spec["restartPolicy"] == "Never"
    assert spec["terminationGracePeriodSeconds"] == 300
    assert spec["imagePullSecrets"] == [{"name": "pull"}]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    mounts = {mount["mountPath"]: mount["name"] for mount in own["volumeMounts"]}
    volumes = {volume["name"]: volume["emptyDir"] for volume in spec["volumes"]}
    assert mounts.keys() == {"/scratch", "/dev/shm"}
    assert volumes[mounts["/scratch"]]["sizeLimit"] == "50Gi"
    assert volumes[mounts["/dev/shm"]] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert own["terminationMessagePolicy"] == "File"


@pytest.mark.shows("order-of-writes", "one-post", "graph")
def test_every_create_is_preceded_by_its_intent(engine: Operator, space: Space) -> None:
    """By the revisions of the store: a status told of each attempt before its Job was there.

    By the audit log: the operator wrote a status before, never changed a Job, and wrote nothing
    but statuses, Jobs and events.
    """
    begin = space.mark()
    space.run()
    space.succeeded()
    runs, born = space.replay(begin)
    entries = [line for line in space.audit() if line["user"]["username"] == USER]

    stages = [job["metadata"]["labels"][STAGE_LABEL] for job in born]
    final = [row["name"] for row in runs[-1]["status"]["stages"]]
    assert sorted(stages) == sorted(["preflight", *final])
    for job, stage in zip(born, stages, strict=True):
        told = [run for run in runs if version(run) < version(job)]
        row = row_of(told[-1], stage)
        assert (row["state"], row["attempt"], row.get("handle")) == ("Starting", 1, None)
    creates = [line for line in entries if line["objectRef"]["resource"] == "jobs"]
    assert {(line["verb"], line["responseStatus"]["code"]) for line in creates} == {("create", 201)}
    assert len(creates) == len(born)
    statuses = [line for line in entries if line["objectRef"].get("subresource") == "status"]
    for create in creates:
        begun = create["requestReceivedTimestamp"]
        assert any(line["stageTimestamp"] < begun for line in statuses)
    reads = {"get", "list", "watch"}
    assert {
        (line["verb"], line["objectRef"]["resource"], line["objectRef"].get("subresource", ""))
        for line in entries
        if line["verb"] not in reads
    } == {("update", "btxruns", "status"), ("create", "jobs", ""), ("create", "events", "")}
    assert sorted(space.commits()) == sorted(final)
