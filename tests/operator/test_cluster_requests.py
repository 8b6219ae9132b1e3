"""kopf's requests: lists are told of, and what is asked again and again is asked slowly."""

import asyncio

import aiohttp
import pytest
from btx_api.names import API_VERSION
from btx_operator.cluster.cache import Cache
from btx_operator.cluster.handlers import Requests
from btx_operator.cluster.kube import Kube
from btx_operator.cluster.meters import Meters
from btx_operator.cluster.resync import SILENT_SECONDS, Resync, WatchDead
from btx_operator.cluster.settings import Settings
from kubernetes.aio.client import Configuration
from multidict import CIMultiDict
from yarl import URL

BATCH = "https://api/apis/batch/v1"


def begun(requests: Requests, monkeypatch: pytest.MonkeyPatch, *urls: str) -> list[float]:
    """Seconds that each request had to wait, one after the other at one moment."""
    delays: list[float] = []

    async def sleep(seconds: float) -> None:
        delays.append(seconds)

    async def ask() -> None:
        for url in urls:
            asked = aiohttp.TraceRequestStartParams("GET", URL(url), CIMultiDict())
            await requests.begin(None, None, asked)

    with monkeypatch.context() as patch:
        patch.setattr("btx_operator.cluster.handlers.asyncio.sleep", sleep)
        asyncio.run(ask())
    return delays


def test_every_list_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that will be empty; a look at what is served is none, and a watch is told apart."""
    told: list[tuple[str, bool]] = []
    requests = Requests(lambda path, watch: told.append((path.rpartition("/")[2], watch)), str)
    watch = f"{BATCH}/namespaces/a/jobs?watch=true&resourceVersion=1"

    begun(
        requests, monkeypatch, watch, BATCH, "https://api/apis", f"https://api/apis/{API_VERSION}"
    )
    assert told == [("jobs", True)]
    lists = (f"{BATCH}/namespaces/a/jobs?limit=500", "https://api/api/v1/pods")
    begun(requests, monkeypatch, *lists, f"https://api/apis/{API_VERSION}/btxruns")
    assert told[1:] == [("jobs", False), ("pods", False), ("btxruns", False)]


def test_repetitions_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ever longer, up to a limit; each kind for itself; not after a watch that lasted."""
    requests = Requests(lambda path, watch: None, str)
    jobs, pods = f"{BATCH}/jobs?watch=true", "https://api/api/v1/pods?watch=true"

    assert begun(requests, monkeypatch, *[jobs] * 8) == [0, 0.1, 0.2, 0.4, 0.8, 1.6, 2, 2]
    assert begun(requests, monkeypatch, pods, pods) == [0, 0.1]
    monkeypatch.setattr(requests, "CALM", -1000.0)
    assert begun(requests, monkeypatch, jobs) == [0]


def test_the_pages_of_a_list_are_one_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of Jobs are many pages: none of them waits, and only the first is told of."""
    told: list[str] = []
    requests = Requests(lambda path, watch: told.append(path), str)
    pages = [f"{BATCH}/jobs?limit=100&continue={number}" for number in range(20)]

    assert begun(requests, monkeypatch, f"{BATCH}/jobs?limit=100", *pages) == [0]
    assert len(told) == 1


def test_a_watcher_that_never_asks_again_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """kopf can wait for ever after a request without an answer; one that goes on trying is well."""
    now = [1000.0]
    monkeypatch.setattr("btx_operator.cluster.resync.time.monotonic", lambda: now[0])

    async def scene() -> None:
        kube, settings = Kube(Configuration()), Settings(trainer_image="trainer")
        resync = Resync(kube, Cache(lambda key: None), settings, Meters())
        resync.asked("/api/v1/pods", False)
        now[0] += 10 * SILENT_SECONDS
        resync._judge()
        for _ in range(3):
            resync.lost("/api/v1/pods")
            now[0] += SILENT_SECONDS - 1
            resync._judge()
            resync.asked("/api/v1/pods", False)
        resync.lost("/api/v1/pods")
        now[0] += SILENT_SECONDS + 1
        with pytest.raises(WatchDead, match="pods"):
            resync._judge()
        await kube.close()

    asyncio.run(scene())
