"""A proxy in front of the real API server that breaks what passes through it, as a test tells it.

It speaks plain HTTP on loopback to one operator and TLS with the operator's own certificate to the
API server, so that RBAC and the audit log see the operator. It counts every write and knows every
open watch.
"""

import asyncio
import contextlib
import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web
from cluster.control_plane import Cluster

VERBS = {"POST": "create", "PUT": "update", "DELETE": "delete", "PATCH": "patch"}
REASONS = {
    401: "Unauthorized", 403: "Forbidden", 410: "Expired", 429: "TooManyRequests", 500: "InternalError",
    503: "ServiceUnavailable", 504: "Timeout",
}  # fmt: skip
HOP = ("connection", "content-length", "host", "keep-alive", "transfer-encoding")
"""Headers that belong to one connection."""


@dataclass(frozen=True)
class Request:
    """What passes, in the API's words."""

    verb: str
    resource: str
    name: str = ""
    subresource: str = ""
    write: int = 0
    """Number among the writes since `count`; 0 of a read."""

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}"

    @classmethod
    def of(cls, request: web.Request) -> "Request":
        """From method and path; the number is still to come."""
        words = request.path.strip("/").split("/")
        words = words[2 if words[0] == "api" else 3 :]
        if words[:1] == ["namespaces"]:
            words = words[2:]
        resource, name, sub = (*words, "", "", "")[:3]
        verb = VERBS.get(request.method, "get" if name else "list")
        if verb == "list" and request.query.get("watch") == "true":
            verb = "watch"
        return cls(verb, resource, name, sub)


@dataclass(frozen=True)
class Kill:
    """The operator is killed before this write is sent, or after it was applied; no answer."""

    after: bool


@dataclass(frozen=True)
class Answer:
    """The proxy answers instead of the API server."""

    code: int
    retry_after: int = 0


@dataclass(frozen=True)
class Lost:
    """The request is carried out; the connection breaks before the answer."""


@dataclass(frozen=True)
class Broken:
    """The connection breaks before the request is sent."""


@dataclass(frozen=True)
class Slow:
    """The request waits before it is sent."""

    seconds: float


@dataclass(frozen=True)
class Error:
    """A watch is answered with one ERROR event."""

    code: int


@dataclass(frozen=True)
class Empty:
    """A watch is answered and closed at once."""


Fault = Kill | Answer | Lost | Broken | Slow | Error | Empty
Rule = Callable[[Request], Fault | None]


class Watch:
    """An open watch."""

    def __init__(self, request: Request, server: web.Request) -> None:
        self.request, self.server = request, server
        self.stalled = False
        """From now on nothing is sent, and the connection stays."""
        self.closed = asyncio.Event()
        """Set: it ends in good order."""

    def cut(self) -> None:
        """RST, in the middle of whatever is being sent."""
        if self.server.transport is not None:
            self.server.transport.abort()


class ApiProxy:
    """One operator's way to the API server; runs in a thread of its own."""

    def __init__(self, cluster: Cluster, user: str, kill: Callable[[], None]) -> None:
        folder = cluster.authority.folder
        self.rule: Rule = lambda request: None
        self.counts: Counter[str] = Counter()
        """Requests by `verb resource`, refused ones too."""
        self.writes = 0
        self.written: list[tuple[float, Request]] = []
        """Writes that the API server carried out, with the time of its answer (time.time)."""
        self._upstream, self._kill = cluster.address, kill
        self._tls = ssl.create_default_context(cafile=str(cluster.authority.certificate))
        self._tls.load_cert_chain(folder / f"{user}.crt", folder / f"{user}.key")
        self._watches: set[Watch] = set()
        self._sending: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self.port = 0

    # What a test does ---------------------------------------------------------------------------

    def kubeconfig(self, path: Path) -> Path:
        """A file by which an operator reaches the proxy."""
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "proxy",
                    "clusters": [
                        {"name": "proxy", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}
                    ],
                    "users": [{"name": "proxy", "user": {}}],
                    "contexts": [
                        {"name": "proxy", "context": {"cluster": "proxy", "user": "proxy"}}
                    ],
                }
            )
        )
        return path

    def count(self, rule: Rule = lambda request: None) -> None:
        """Writes are counted from 1 again, under a new rule."""
        self.writes, self.rule = 0, rule

    def watches(self, resource: str = "") -> list[Watch]:
        """Those that are open and not stalled."""
        open_ = list(self._watches)
        return [w for w in open_ if resource in ("", w.request.resource) and not w.stalled]

    def cut(self, resource: str = "") -> int:
        """Cuts all open watches; how many."""
        return self._each(Watch.cut, resource)

    def close(self, resource: str = "") -> int:
        """Closes them in good order."""
        return self._each(lambda watch: watch.closed.set(), resource)

    def stall(self, resource: str = "") -> int:
        """They send nothing any more."""
        return self._each(lambda watch: setattr(watch, "stalled", True), resource)

    def _each(self, act: Callable[[Watch], None], resource: str) -> int:
        found = self.watches(resource)
        for watch in found:
            self._loop.call_soon_threadsafe(act, watch)
        return len(found)

    @contextlib.contextmanager
    def running(self) -> Iterator["ApiProxy"]:
        """Serves until the end of the block."""
        begun = threading.Event()
        thread = threading.Thread(target=self._serve, args=(begun,))
        thread.start()
        try:
            assert begun.wait(10)
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._end.set)
            thread.join()

    # Within its thread --------------------------------------------------------------------------

    def _serve(self, begun: threading.Event) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._run(begun))

    async def _run(self, begun: threading.Event) -> None:
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        connector = aiohttp.TCPConnector(ssl=self._tls, limit=0)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False
        ) as self._session:
            begun.set()
            await self._end.wait()
            await runner.cleanup()
            await asyncio.gather(*self._sending, return_exceptions=True)
        # What was aborted is closed by callbacks of the loop.
        await asyncio.sleep(0.2)

    async def _handle(self, server: web.Request) -> web.StreamResponse:
        seen = Request.of(server)
        self.counts[str(seen)] += 1
        if seen.verb in VERBS.values():
            self.writes += 1
            seen = Request(seen.verb, seen.resource, seen.name, seen.subresource, self.writes)
        fault = self.rule(seen)
        answer = await self._instead(fault, server)
        if answer is not None:
            return answer
        try:
            if seen.verb == "watch":
                return await self._watch(seen, server)
            answer = await self._forward(seen, server)
        except aiohttp.ClientError:
            return _broken(server)
        if isinstance(fault, Kill):
            await asyncio.to_thread(self._kill)
        return _broken(server) if isinstance(fault, Kill | Lost) else answer

    async def _instead(self, fault: Fault | None, server: web.Request) -> web.StreamResponse | None:
        """What the API server is spared; None: it is to be asked."""
        match fault:
            case Answer(code, retry_after):
                return _status(code, retry_after)
            case Error(code):
                return await _stream(server, _event(code))
            case Empty():
                return await _stream(server, b"")
            case Broken():
                return _broken(server)
            case Kill(after=False):
                await asyncio.to_thread(self._kill)
                return _broken(server)
            case Slow(seconds):
                await asyncio.sleep(seconds)
        return None

    def _ask(self, server: web.Request, body: bytes | None) -> Any:
        headers = {k: v for k, v in server.headers.items() if k.lower() not in HOP}
        url = self._upstream + server.raw_path
        return self._session.request(server.method, url, headers=headers, data=body or None)

    async def _forward(self, seen: Request, server: web.Request) -> web.Response:
        body = await server.read()
        # Whoever is killed meanwhile cannot take back what was sent.
        sending = asyncio.create_task(self._sent(server, body))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)
        data, code, headers = await asyncio.shield(sending)
        if seen.write and code < 300:
            self.written.append((time.time(), seen))
        return web.Response(body=data, status=code, headers=headers)

    async def _sent(self, server: web.Request, body: bytes) -> tuple[bytes, int, dict[str, str]]:
        async with self._ask(server, body) as answer:
            headers = {k: v for k, v in answer.headers.items() if k.lower() not in HOP}
            return await answer.read(), answer.status, headers

    async def _watch(self, seen: Request, server: web.Request) -> web.StreamResponse:
        watch = Watch(seen, server)
        async with self._ask(server, None) as answer:
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            await response.prepare(server)
            self._watches.add(watch)
            closing = asyncio.ensure_future(watch.closed.wait())
            pumping = asyncio.ensure_future(_pump(answer, watch, response))
            try:
                await asyncio.wait([closing, pumping], return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._watches.discard(watch)
                closing.cancel()
                pumping.cancel()
                await asyncio.gather(closing, pumping, return_exceptions=True)
        return response


async def _pump(answer: Any, watch: Watch, response: web.StreamResponse) -> None:
    async for chunk in answer.content.iter_any():
        if not watch.stalled:
            await response.write(chunk)
    while watch.stalled:
        # The API server ends a watch after some minutes; a dead peer does not tell.
        await asyncio.sleep(1)


def _problem(code: int) -> dict[str, Any]:
    return {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": "injected by a test", "reason": REASONS[code], "code": code,
    }  # fmt: skip


def _status(code: int, retry_after: int) -> web.Response:
    headers = {"Retry-After": str(retry_after)} if retry_after else {}
    return web.json_response(_problem(code), status=code, headers=headers)


def _event(code: int) -> bytes:
    return json.dumps({"type": "ERROR", "object": _problem(code)}).encode() + b"\n"


async def _stream(server: web.Request, line: bytes) -> web.StreamResponse:
    response = web.StreamResponse()
    response.content_type = "application/json"
    await response.prepare(server)
    if line:
        await response.write(line)
    return response


def _broken(server: web.Request) -> web.Response:
    if server.transport is not None:
        server.transport.abort()
    return web.Response(status=502)
