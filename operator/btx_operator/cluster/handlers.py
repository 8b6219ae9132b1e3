"""Watch events -> cache. The only place that knows kopf.

The handlers do no I/O and never raise: kopf would swallow the error. kopf lists at its start and
after 410 Gone, and does not tell what vanished; nor does it wait before it watches again. Both is
seen to where its requests begin (Requests).
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import aiohttp
import kopf
from btx_api.names import GROUP, PLURAL, RUN_LABEL, VERSION

from btx_operator.cluster.cache import Cache
from btx_operator.cluster.kube import PAGE, UNPACKED, Kube, credentials

log = logging.getLogger(__name__)


class Backoffs:
    """Delays between tries of a list or watch, without end: kopf gives up when they are through."""

    def __iter__(self) -> Any:
        yield from (0.5, 1.0, 2.0, 3.0)
        while True:
            yield 5.0


class Requests:
    """What kopf asks the API server: at most every few seconds the same.

    `told` of each list and watch of a kind's path, before it is sent, and whether it is a watch;
    `lost` of each that could not be answered.
    """

    CALM = 5.0
    """Seconds between two equal requests that need no delay: a watch that lasts so long is well."""
    FIRST, LAST = 0.1, 2.0
    """Delay of the first repetition and of all later ones, doubled from one to the next."""

    def __init__(self, told: Callable[[str, bool], None], lost: Callable[[str], None]) -> None:
        self._told, self._lost = told, lost
        self._last: dict[tuple[str, bool], tuple[float, float]] = {}

    async def begin(self, _: Any, __: Any, request: aiohttp.TraceRequestStartParams) -> None:
        """Called by aiohttp before a request is sent."""
        if "continue" in request.url.query:
            return  # the next page of a list
        path, watches = request.url.path, "watch" in request.url.query
        if _of_a_kind(path):
            self._told(path, watches)
        now = asyncio.get_running_loop().time()
        time, delay = self._last.get((path, watches), (now - self.CALM, 0.0))
        hasty = now - time < self.CALM
        delay = min(self.LAST, max(self.FIRST, 2 * delay)) if hasty else 0.0
        self._last[path, watches] = (now + delay, delay)
        await asyncio.sleep(delay)

    async def fail(self, _: Any, __: Any, request: aiohttp.TraceRequestExceptionParams) -> None:
        """Called by aiohttp when there is no answer."""
        # Where kopf waits for new credentials while it is ending, it waits for ever.
        if _of_a_kind(request.url.path):
            self._lost(request.url.path)

    def session(self, server: kopf.ConnectionInfo) -> kopf.AiohttpSession:
        """As kopf would make it, but for the trace; kopf closes it."""
        trace = aiohttp.TraceConfig()
        trace.on_request_start.append(self.begin)
        trace.on_request_exception.append(self.fail)
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=server.as_ssl_context()),
            headers=server.as_http_headers() | UNPACKED,
            trace_configs=[trace],
        )
        return kopf.AiohttpSession(server=server.server, aiohttp_session=session)


def _of_a_kind(path: str) -> bool:
    return path.rpartition("/")[2] in (PLURAL, "jobs", "pods")


def registry(
    cache: Cache, kube: Kube, heard: Callable[[Any], None], requests: Requests
) -> kopf.OperatorRegistry:
    """Handlers of the three kinds. `heard` gets every object."""
    found = kopf.OperatorRegistry()
    feeds = {
        (GROUP, VERSION, PLURAL): (cache.put_run, cache.drop_run),
        ("batch", "v1", "jobs"): (cache.put_job, cache.drop_job),
        ("", "v1", "pods"): (cache.put_pod, cache.drop_pod),
    }

    @kopf.on.login(registry=found)
    async def login(**_: Any) -> kopf.AiohttpSession:
        return requests.session(kopf.ConnectionInfo(**credentials(kube.configuration)))

    for resource, (put, drop) in feeds.items():

        def told(event: Any, put: Any = put, drop: Any = drop) -> None:
            heard(event["object"])
            (drop if event["type"] == "DELETED" else put)(event["object"])

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
    settings.watching.chunk_size = PAGE
    settings.watching.server_timeout = 290
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = 70
    for resource in (("batch", "v1", "jobs"), ("", "v1", "pods")):
        settings.watching.label_selectors[resource] = RUN_LABEL
    # A worker keeps its object's last event, sixty times as large as what the cache takes of it.
    settings.queueing.idle_timeout = 0.1
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.networking.error_backoffs = Backoffs()
    settings.persistence.diffbase_storage = _Nothing()
    settings.persistence.progress_storage = _Nothing()
    return settings
