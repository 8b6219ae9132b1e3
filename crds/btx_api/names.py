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

REFRESH_ANNOTATION = f"{GROUP}/refresh"
"""Written by `btx refresh`: any new value asks for one more preflight."""
RETRY_ANNOTATION = f"{GROUP}/retry"
"""Written by `btx retry`: any new value forgives the failures so far."""
RUN_LABEL = f"{GROUP}/run"
STAGE_LABEL = f"{GROUP}/stage"
EXPERT_LABEL = f"{GROUP}/expert"

MANIFEST = "manifest.json"
"""The commit of an artifact or a checkpoint: written last, never over another."""

RESULT_BYTES = 4096
"""A Result as JSON never exceeds the termination message of a container."""


def stage_folder(kind: str, digest: str) -> str:
    """Folder of a stage's artifact, below the storage prefix."""
    return f"stages/{kind}/{digest}"


def run_record(uid: str) -> str:
    """The digests of a run's graph: the root that gc keeps."""
    return f"runs/{uid}.json"
