"""A proxy in front of a real S3 server that breaks what passes through it, by a seeded script.

Requests reach the server unchanged (Host and path are part of the signature), but for bodies whose
bytes are flipped on purpose. Every fault that was injected is counted.
"""

import random
import socket
import ssl
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
FAILED = SLOW_DOWN.replace(b"SlowDown", b"InternalError")
IN_A_ROW = 3
"""So often at most one request (method, path, range) meets a fault before it gets through."""
FLIPS = 2
"""So often at most one object arrives with a flipped bit, whatever range of it is read."""
STORM = 12
"""Requests that one SlowDown turns away."""


class Fault(StrEnum):
    ERROR_500 = "500 before the server"
    SLOW_DOWN = "503 SlowDown, and for the next requests too"
    RESET_BEFORE = "connection reset before the server"
    RESET_AFTER = "connection reset after the server, the answer lost"
    LOST_WRITE = "500 instead of the answer to a write that was carried out"
    TRUNCATED = "a body that ends early"
    FLIPPED_ANSWER = "a flipped bit in a body that is read"
    WRONG_SUM = "a wrong checksum header with a body that is read"
    FLIPPED_REQUEST = "a flipped bit in a body that is written"
    SLOW = "a body that trickles"


WRITES = (Fault.LOST_WRITE, Fault.FLIPPED_REQUEST)
READS = (Fault.TRUNCATED, Fault.FLIPPED_ANSWER, Fault.WRONG_SUM, Fault.SLOW)
WRONG = Fault.WRONG_SUM
SUMMED = (Fault.FLIPPED_ANSWER, Fault.WRONG_SUM)
"""Only noticed by whoever has a checksum: a part of an object from outside has none."""
ALL: Mapping[Fault, float] = {fault: 0.02 for fault in Fault} | {Fault.SLOW_DOWN: 0.004}


@dataclass(frozen=True)
class Request:
    """What passes: enough for a test to wait for it."""

    method: str
    path: str
    """With the query."""
    body: int
    """Bytes."""
    ranged: str = ""
    """The header Range."""


Hook = Callable[[Request], None]


class Cut(Exception):
    """Raised by a hook: the server gets half of the body, the client nothing more."""


@dataclass
class Script:
    """What goes wrong, drawn anew for every request; equal seeds and requests meet equal faults."""

    rates: Mapping[Fault, float] = field(default_factory=dict)
    seed: int = 0
    summed: str = "/stages/"
    """Paths in which bytes may be flipped: their readers know a checksum."""
    pieces: int = 8
    """Of a body that trickles."""
    pause: float = 0.05
    """Seconds between them."""
    counts: Counter[Fault] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    """Requests by method."""

    def __post_init__(self) -> None:
        self._lock, self._storm = threading.Lock(), 0
        self._draws: defaultdict[str, int] = defaultdict(int)
        self._row: defaultdict[str, int] = defaultdict(int)
        self._flips: defaultdict[str, int] = defaultdict(int)

    def draw(self, request: Request) -> Fault | None:
        """The fault of this request."""
        identity = f"{request.method} {request.path} {request.ranged}"
        with self._lock:
            self.seen[request.method] += 1
            self._draws[identity] += 1
            draw = random.Random(f"{self.seed} {identity} {self._draws[identity]}").random()
            fault = self._of(draw, request)
            if fault is None or self._row[identity] >= IN_A_ROW:
                self._row[identity] = 0
                return None
            self._row[identity] += 1
            self._flips[request.path] += fault in SUMMED
            self.counts[fault] += 1
            return fault

    def _of(self, draw: float, request: Request) -> Fault | None:
        if self._storm:
            self._storm -= 1
            return Fault.SLOW_DOWN
        for fault, rate in self.rates.items():
            # Whatever the draws: each kind that is asked for comes at least once.
            due = not self.counts[fault] and draw < 0.5
            if (due or 0 <= draw < rate) and self._fits(fault, request):
                self._storm = STORM if fault is Fault.SLOW_DOWN else 0
                return fault
            draw -= rate
        return None

    def _fits(self, fault: Fault, request: Request) -> bool:
        if fault in WRITES:
            # A part's body has a checksum; the list of parts (POST) has none.
            methods = ("PUT", "POST") if fault is Fault.LOST_WRITE else ("PUT",)
            return request.method in methods and request.body > 0
        if fault in SUMMED and (
            self.summed not in request.path or self._flips[request.path] >= FLIPS
        ):
            return False
        return fault not in READS or (
            request.method == "GET" and not (request.ranged and fault is WRONG)
        )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream: tuple[str, int], script: Script) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.script = upstream, script
        self.before: Hook = lambda request: None
        self.after: Hook = lambda request: None

    def handle_error(self, *_: Any) -> None:
        """Clients are killed in the middle of a request; that is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, self.path, len(body), self.headers.get("Range", ""))
        fault = self.server.script.draw(request)
        try:
            self.server.before(request)
        except Cut:
            return self._cut(body)
        if fault in (Fault.ERROR_500, Fault.SLOW_DOWN):
            self._refuse(500 if fault is Fault.ERROR_500 else 503)
        elif fault is Fault.RESET_BEFORE:
            self._reset()
        else:
            self._forward(request, body, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass

    def _forward(self, request: Request, body: bytes, fault: Fault | None) -> None:
        try:
            answer, data = self._ask(_flipped(body) if fault is Fault.FLIPPED_REQUEST else body)
            self.server.after(request)
        except (OSError, HTTPException, Cut):
            return self._reset()
        if fault is Fault.RESET_AFTER:
            self._reset()
        elif fault is Fault.LOST_WRITE:
            self._refuse(500)
        else:
            self._answer(answer, data, fault)

    def _ask(self, body: bytes) -> tuple[HTTPResponse, bytes]:
        """The server's answer to this very request."""
        connection = HTTPConnection(*self.server.upstream, timeout=300)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                # The client has told us all; nobody waits for 100 Continue any more.
                if name.lower() != "expect":
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            with connection.getresponse() as answer:
                return answer, answer.read()
        finally:
            connection.close()

    def _cut(self, body: bytes) -> None:
        with socket.create_connection(self.server.upstream) as server:
            lines = [f"{self.command} {self.path} HTTP/1.1"]
            lines += [f"{k}: {v}" for k, v in self.headers.items() if k.lower() != "expect"]
            server.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body[: len(body) // 2])
        self._reset()

    def _refuse(self, status: int) -> None:
        text = b"" if self.command == "HEAD" else SLOW_DOWN if status == 503 else FAILED
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _reset(self) -> None:
        """RST instead of an orderly end."""
        self.close_connection = True
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()

    def _answer(self, answer: HTTPResponse, data: bytes, fault: Fault | None) -> None:
        sent = data
        if data and fault is Fault.FLIPPED_ANSWER and answer.status < 300:
            sent = _flipped(data)
        if data and fault is Fault.TRUNCATED:
            sent = data[: len(data) // 2]
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() in ("content-length", "transfer-encoding", "connection"):
                continue
            wrong = fault is WRONG and name.lower().startswith("x-amz-checksum-crc32")
            self.send_header(name, "AAAAAA==" if wrong else value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        if fault is Fault.SLOW and len(sent) > 2**16:
            self._trickle(sent)
        else:
            self.wfile.write(sent)
        # An orderly end: what was sent arrives.
        self.close_connection = self.close_connection or len(sent) < len(data)

    def _trickle(self, data: bytes) -> None:
        step = max(1, len(data) // self.server.script.pieces)
        for start in range(0, len(data), step):
            self.wfile.write(data[start : start + step])
            self.wfile.flush()
            time.sleep(self.server.script.pause)


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


class Proxy:
    """A running proxy."""

    def __init__(self, server: _Server, scheme: str) -> None:
        self._server = server
        self.script = server.script
        self.endpoint = f"{scheme}://127.0.0.1:{server.server_address[1]}"

    def watch(self, before: Hook | None = None, after: Hook | None = None) -> None:
        """Calls `before` with a request that has arrived, `after` with one that was carried out.

        The client waits meanwhile.
        """
        self._server.before = before or (lambda request: None)
        self._server.after = after or (lambda request: None)


@contextmanager
def faulty(
    endpoint: str, script: Script | None = None, *, tls: tuple[str, str] | None = None
) -> Iterator[Proxy]:
    """A proxy in front of `endpoint` (http://host:port); `tls`: files of its certificate and key."""
    host, _, port = endpoint.removeprefix("http://").rpartition(":")
    server = _Server((host, int(port)), script or Script())
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield Proxy(server, "https" if tls else "http")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
