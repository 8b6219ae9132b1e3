"""Settings of the operator: one JSON in BTX_SETTINGS, rendered from the chart's values.

Read by cluster/__main__.py once, at start. `make generate` writes values.schema.json from it.
"""

import os
from typing import Annotated

from btx_api.names import SETTINGS_ENV
from btx_api.spec import Flag, Integer, Model, Text, explain
from pydantic import Field, ValidationError

from btx_operator.errors import UserError


class Settings(Model):
    """How one installation of the operator works."""

    namespaces: Annotated[tuple[Text, ...], Field(max_length=64)] = ()
    """Namespaces whose runs are served; empty: every namespace (needs a ClusterRole)."""
    trainer_image: Text
    """Image of every attempt, unless a run's spec.execution.image names one."""
    image_pull_policy: Annotated[str, Field(pattern="^(Always|IfNotPresent|Never)$")] = (
        "IfNotPresent"
    )
    """Of the trainer's containers."""
    image_pull_secrets: Annotated[tuple[Text, ...], Field(max_length=16)] = ()
    """Secrets of the run's namespace with which the trainer image is pulled."""
    service_accounts: Annotated[tuple[Text, ...], Field(min_length=1, max_length=64)] = ("default",)
    """Service accounts that runs may name; the first is the default. They need no rights here."""
    scratch_size: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti)$")] = "50Gi"
    """Limit of the scratch volume: temporary files and compiler caches of one pod."""
    shared_memory_size: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti)$")] = "1Gi"
    """Limit of /dev/shm of one pod; counts as its memory."""
    job_ttl_seconds: Annotated[Integer, Field(ge=0, le=31_536_000)] = 86_400
    """After which Kubernetes removes finished Jobs; their results are in the run's status."""
    workers: Annotated[Integer, Field(ge=1, le=256)] = 16
    """Runs that are worked on at the same time."""
    requests: Annotated[Integer, Field(ge=1, le=256)] = 32
    """Requests to the API server at the same time."""
    resync_seconds: Annotated[Integer, Field(ge=5, le=3600)] = 300
    """Time between two full lists that are compared with the cache."""
    progress_seconds: Annotated[Integer, Field(ge=1, le=3600)] = 30
    """Least time between two writes of a run's progress."""
    port: Annotated[Integer, Field(ge=1, le=65_535)] = 8080
    """Of /healthz, /readyz and /metrics."""
    trainer_port: Annotated[Integer, Field(ge=1024, le=65_535)] = 9464
    """Of a trainer's /metrics and /progress."""
    log_level: Annotated[str, Field(pattern="^(DEBUG|INFO|WARNING|ERROR)$")] = "INFO"
    """Least severe message that is logged."""
    log_json: Flag = True
    """Log lines as JSON objects."""


def read() -> Settings:
    """The settings of this process; UserError naming the field when they cannot be used."""
    text = os.environ.get(SETTINGS_ENV)
    if not text:
        raise UserError(f"{SETTINGS_ENV}: is not set; the chart sets it")
    try:
        return Settings.model_validate_json(text, by_name=False, by_alias=True)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, SETTINGS_ENV))) from None
