"""What an attempt tells the outside while it runs: its Progress, and its log.

Progress is the only value that a stage publishes; it is rendered here as one plain log line, as
/metrics (names from btx_api.metrics) and as /progress (JSON). The log is whatever the process
prints. Called by __main__.py, which also asks `idle` whether there is still progress.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from btx_api.metrics import TRAINER, Metric, MetricType
from btx_api.stage import Kind, Progress

from btx_trainer.storage import Store, traffic

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family

log = logging.getLogger(__name__)

LINE_SECONDS = 5.0
"""At most one progress line in this time, but for the first and last of each phase."""
UPLOAD_SECONDS = 30.0
LOG_BYTES = 8 * 2**20
"""A longer log keeps its newest half."""
TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Telemetry:
    """The latest Progress of this process, and who may read it."""

    def __init__(self, *, run: str, stage: str, kind: Kind) -> None:
        self._labels = {"run": run, "stage": stage}
        self._kind = kind
        self._latest = Progress(kind=kind, phase="starting", time=time.time())
        self._moved = time.monotonic()
        self._logged = 0.0

    @property
    def idle(self) -> float:
        """Seconds since the work last published, or bytes last moved to or from storage.

        Each published value stands for a unit of work done.
        """
        return time.monotonic() - max(self._moved, traffic.last)

    def publish(self, progress: Progress) -> None:
        """Replaces the latest value; `kind` and `time` are filled in."""
        before = self._latest
        self._latest = progress.model_copy(update={"kind": self._kind, "time": time.time()})
        now = time.monotonic()
        self._moved = now
        last = progress.step == progress.steps and progress.step != before.step
        if last or progress.phase != before.phase or now - self._logged >= LINE_SECONDS:
            self._logged = now
            log.info("%s %s", self._labels["stage"], line(progress))

    def serve(self, listen: str) -> ThreadingHTTPServer:
        """Serves /metrics and /progress on `host:port` in the background; logs where."""
        telemetry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                pages = {"/metrics": telemetry.exposition, "/progress": telemetry.progress_json}
                page = pages.get(self.path)
                if page is None:
                    return self.send_error(404)
                body = page()
                self.send_response(200)
                self.send_header(
                    "Content-Type", TEXT if self.path == "/metrics" else "application/json"
                )
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Requests are no part of the log."""

        host, _, port = listen.rpartition(":")
        server = ThreadingHTTPServer((host, int(port)), Handler)
        threading.Thread(target=server.serve_forever, daemon=True, name="telemetry").start()
        log.info("listening on http://%s:%d", host, server.server_address[1])
        return server

    def progress_json(self) -> bytes:
        """The latest Progress as JSON."""
        return self._latest.model_dump_json(exclude_none=True).encode()

    def exposition(self) -> bytes:
        """The latest Progress in Prometheus' text format."""
        from prometheus_client import generate_latest  # noqa: PLC0415 - only where it is scraped

        return generate_latest(self)

    def collect(self) -> Iterator["Family"]:
        """Families of the latest Progress; called by prometheus_client."""
        from prometheus_client.metrics_core import (  # noqa: PLC0415 - as above
            CounterMetricFamily,
            GaugeMetricFamily,
        )

        families = {
            MetricType.COUNTER: CounterMetricFamily,
            MetricType.GAUGE: GaugeMetricFamily,
        }
        for metric, values in samples(self._latest):
            family = families[metric.type](metric.name, metric.help, labels=metric.labels)
            for labels, value in values:
                named = {**self._labels, **labels}
                family.add_metric([named[name] for name in metric.labels], value)
            yield family


def line(progress: Progress) -> str:
    """`training step 120/200 loss 2.3456 tokens/s 12345 eta 80 s`; nothing that is not known."""
    words = [progress.phase]
    if progress.steps:
        words.append(f"step {progress.step}/{progress.steps}")
    for name, value, form in (
        ("loss", progress.loss, ".4f"),
        ("balance", progress.balance, ".3f"),
        ("lr", progress.lr, ".2e"),
        ("grad_norm", progress.grad_norm, ".3f"),
        ("tokens/s", progress.tokens_per_second or None, ".0f"),
        ("eta_s", progress.eta_seconds, ".0f"),
        ("checkpoint", progress.checkpoint_step or None, "d"),
        ("dead", len(progress.dead_experts) or None, "d"),
    ):
        if value is not None:
            words.append(f"{name} {value:{form}}")
    return " ".join(words)


def samples(progress: Progress) -> Iterator[tuple[Metric, list[tuple[dict[str, str], float]]]]:
    """Each trainer metric that has a value, with its own labels; run and stage are added later."""
    for field, metric in TRAINER.items():
        match getattr(progress, field):
            case str(phase):
                yield metric, [({"kind": str(progress.kind or ""), "phase": phase}, 1.0)]
            case tuple(items) if field == "expert_load" and items:
                yield metric, [({"expert": str(i)}, share) for i, share in enumerate(items)]
            case tuple(items) if field == "dead_experts" and progress.expert_load:
                yield metric, [({}, float(len(items)))]
            case int() | float() as value:
                yield metric, [({}, float(value))]


class Log:
    """Sends what this process and its children print to storage as well, every 30 s and at the end.

    Descriptors 1 and 2 are taken, so that libraries and children are in it too.
    """

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key
        self._text, self._lock = bytearray(), threading.Lock()
        self._uploaded = b""
        self._closed = threading.Event()
        sys.stdout.flush()
        self._kept = {number: os.dup(number) for number in (1, 2)}
        self._pumps = [self._tee(number, kept) for number, kept in self._kept.items()]
        threading.Thread(target=self._keep_uploading, daemon=True, name="log").start()

    def _tee(self, number: int, kept: int) -> threading.Thread:
        source, target = os.pipe()
        os.dup2(target, number)
        os.close(target)

        def pump() -> None:
            while data := os.read(source, 65536):
                # Who reads our output may have gone; the copy goes on.
                with suppress(OSError):
                    os.write(kept, data)
                with self._lock:
                    self._text += data
                    if len(self._text) > LOG_BYTES:
                        del self._text[: LOG_BYTES // 2]
            os.close(source)

        thread = threading.Thread(target=pump, daemon=True, name="log")
        thread.start()
        return thread

    def _keep_uploading(self) -> None:
        while not self._closed.wait(UPLOAD_SECONDS):
            self._upload()

    def _upload(self) -> None:
        with self._lock:
            text = bytes(self._text)
        # The log is for people: an attempt does not fail for it.
        with suppress(OSError):
            if text != self._uploaded:
                self._store.put(self._key, text)
                self._uploaded = text

    def close(self) -> None:
        """Gives the descriptors back and uploads the whole log; waits 5 s for children at most."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._closed.set()
        for number, kept in self._kept.items():
            os.dup2(kept, number)
        for thread in self._pumps:
            thread.join(5)
        self._upload()
