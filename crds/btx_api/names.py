"""Every name that two processes share: group and kind, labels, environment, file names, limits.

A test forbids these literals anywhere else.
"""

GROUP = "btx.dev"
VERSION = "v1alpha1"
KIND = "BTXRun"
API_VERSION = f"{GROUP}/{VERSION}"
PLURAL = "btxruns"

TASK_ENV = "BTX_TASK"
"""Written by the backend, read by the trainer: the Task as JSON, or `@path` of a file with it."""
SETTINGS_ENV = "BTX_SETTINGS"
"""Written by the chart, read by the operator."""
RANK_ENV = "BTX_RANK"
"""Written by a trainer that starts several ranks, read by each of them (launch.py)."""
NODES_ENV, NODE_RANK_ENV = "NNODES", "NODE_RANK"
"""Written by the backend for an attempt on several nodes: how many, and which one from 0."""
MASTER_ADDR_ENV, MASTER_PORT_ENV = "MASTER_ADDR", "MASTER_PORT"
"""Likewise: where node 0 can be reached by the others, on a port that is free there."""

REFRESH_ANNOTATION = f"{GROUP}/refresh"
"""Written by `btx refresh`: any new value asks for one more preflight."""
RETRY_ANNOTATION = f"{GROUP}/retry"
"""Written by `btx retry`: any new value forgives the failures so far."""
RUN_LABEL = f"{GROUP}/run"
STAGE_LABEL = f"{GROUP}/stage"
EXPERT_LABEL = f"{GROUP}/expert"
UID_LABEL = f"{GROUP}/run-uid"
"""On Jobs, pods and the Service of a run; the last three tell a run from a later namesake's."""
ATTEMPT_ANNOTATION, DIGEST_ANNOTATION = f"{GROUP}/attempt", f"{GROUP}/digest"
"""On Jobs and pods: number of the attempt and digest of its row."""
EXECUTION_ANNOTATION = f"{GROUP}/execution"
"""On Jobs: hash of image and scheduling, so that an edit can replace pods that never started."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
"""Kueue's own name for the queue that admits a Job."""
CONTAINER = "trainer"
"""The container whose exit code and termination message are an attempt's."""

MANIFEST = "manifest.json"
"""The commit of an artifact or a checkpoint: written last, never over another."""

RESULT_BYTES = 4096
"""A Result as JSON never exceeds the termination message of a container."""


STAGES_FOLDER, RUNS_FOLDER = "stages/", "runs/"
"""Below the storage prefix."""


def stage_folder(kind: str, digest: str) -> str:
    """Folder of a stage's artifact, below the storage prefix."""
    return f"{STAGES_FOLDER}{kind}/{digest}"


def run_record(uid: str) -> str:
    """The digests of a run's graph: the root that gc keeps."""
    return f"{RUNS_FOLDER}{uid}.json"


JOB_NAME_LENGTH = 52
"""Kubernetes adds the pod's own suffix within the 63 characters of a label."""


def job_name(run: str, stage: str, tag: str) -> str:
    """Of one attempt; `tag`: 8 hexadecimal digits that tell it from every other."""
    return f"{run}-{stage}-{tag}"


def run_name_length(stage: str) -> int:
    """The longest name of a run that has such a stage."""
    return JOB_NAME_LENGTH - len(job_name("", stage, "0" * 8))
