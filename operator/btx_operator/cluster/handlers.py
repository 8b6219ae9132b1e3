"""Watch events -> cache. The only place that knows kopf.

The handlers do no I/O and never raise: kopf would swallow the error. `None` as an event's type
means that kopf lists anew, at its start or after 410 Gone; it does not tell what vanished.
"""

import logging
from collections.abc import Callable
from typing import Any

import kopf
from btx_api.names import GROUP, PLURAL, RUN_LABEL, VERSION

from btx_operator.cluster.cache import Cache
from btx_operator.cluster.kube import Kube, credentials

log = logging.getLogger(__name__)


class Backoffs:
    """Delays between tries of a list or watch, without end: kopf gives up when they are through."""

    def __iter__(self) -> Any:
        yield from (0.5, 1.0, 2.0, 3.0)
        while True:
            yield 5.0


def registry(
    cache: Cache, kube: Kube, heard: Callable[[Any], None], listed: Callable[[], None]
) -> kopf.OperatorRegistry:
    """Handlers of the three kinds. `heard` gets every object; `listed` when kopf lists anew."""
    found = kopf.OperatorRegistry()
    feeds = {
        (GROUP, VERSION, PLURAL): (cache.put_run, cache.drop_run),
        ("batch", "v1", "jobs"): (cache.put_job, cache.drop_job),
        ("", "v1", "pods"): (cache.put_pod, cache.drop_pod),
    }

    @kopf.on.login(registry=found)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return kopf.ConnectionInfo(**credentials(kube.configuration))

    for resource, (put, drop) in feeds.items():

        def told(event: Any, put: Any = put, drop: Any = drop) -> None:
            heard(event["object"])
            (drop if event["type"] == "DELETED" else put)(event["object"])
            if event["type"] is None:
                listed()

        _feed(found, resource, told)
    return found


def _feed(
    found: kopf.OperatorRegistry,
    resource: tuple[str, str, str],
    told: Callable[[Any], None],
) -> None:
    async def handle(event: Any, **_: Any) -> None:
        try:
            told(event)
        except Exception:
            log.exception("an event about %s could not be read", resource[2])

    kopf.on.event(*resource, registry=found, id=f"{resource[2]}-told")(handle)


class _Nothing(kopf.DiffBaseStorage, kopf.ProgressStorage):
    """Remembers nothing: no handler asks for changes, and half of kopf's work is to find them."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None

    def purge(self, **_: Any) -> None:
        return None

    def touch(self, **_: Any) -> None:
        return None

    def clear(self, *, essence: Any) -> Any:
        return essence

    def flush(self) -> None:
        return None


async def watch(found: kopf.OperatorRegistry, namespaces: tuple[str, ...]) -> None:
    """Watches until cancelled; raises or returns where kopf gives up."""
    await kopf.operator(
        registry=found, settings=watching(), standalone=True, clusterwide=not namespaces,
        namespaces=namespaces,
    )  # fmt: skip


def watching() -> kopf.OperatorSettings:
    """kopf as a watcher and nothing else."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.watching.chunk_size = 500
    settings.watching.server_timeout = 290
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = 70
    for resource in (("batch", "v1", "jobs"), ("", "v1", "pods")):
        settings.watching.label_selectors[resource] = RUN_LABEL
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.networking.error_backoffs = Backoffs()
    settings.persistence.diffbase_storage = _Nothing()
    settings.persistence.progress_storage = _Nothing()
    return settings
