"""The operator's metrics: every name of btx_api.metrics.ENGINE, and nothing else.

No label has the name of a run: what is known of single runs is in their status. Numbers of objects
are counted when somebody scrapes; the rest when it happens.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from btx_api.metrics import ENGINE, MetricType
from btx_api.spec import BTXRunSpec
from btx_api.status import PREFLIGHT, Row, State, Status
from btx_operator.attempts import scheduling_of
from btx_operator.cluster.cache import Cache
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as PromCounter
from prometheus_client.core import GaugeMetricFamily

COUNTED = ("runs", "stages", "cache_objects")
"""Taken from the cache at each scrape."""
BYTES = tuple(float(2**power) for power in range(9, 18))
SECONDS = (1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 12 * 3600.0, 86_400.0, 7 * 86_400.0)
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BUCKETS = {"attempt_seconds": SECONDS, "status_bytes": BYTES}
MAKERS: dict[MetricType, Callable[..., Any]] = {
    MetricType.COUNTER: PromCounter, MetricType.GAUGE: Gauge, MetricType.HISTOGRAM: Histogram,
}  # fmt: skip


class Meters:
    """One registry; `self[name]` is the metric of that key in ENGINE."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._all: dict[str, Any] = {}
        for key, metric in ENGINE.items():
            if key in COUNTED:
                continue
            more = {}
            if metric.type is MetricType.HISTOGRAM:
                more["buckets"] = BUCKETS.get(key, SHORT)
            self._all[key] = MAKERS[metric.type](
                metric.name, metric.help, metric.labels, registry=self.registry, **more
            )

    def __getitem__(self, key: str) -> Any:
        return self._all[key]

    def watch(self, cache: Cache) -> None:
        """From now on its objects are counted at each scrape."""
        self.registry.register(_Census(cache))

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def request(self, verb: str, resource: str, code: str, seconds: float) -> None:
        """One request to the API server."""
        self["api_requests"].labels(verb, resource, code).inc()
        self["api_seconds"].labels(verb, resource).observe(seconds)

    def told(self, before: Status, after: Status, spec: BTXRunSpec | None, *, size: int) -> None:
        """A status was stored: the attempts that ended with it."""
        self["status_bytes"].observe(size)
        rows = {row.name: row for row in _rows(before)}
        for row in _rows(after):
            old = rows.get(row.name) or Row(name=row.name, digest=row.digest)
            kind = row.name.partition("-")[0]
            if row.state is State.COMPLETE is not old.state and row.attempt == 0:
                self["reused"].labels(kind).inc()
            outcome = _outcome(old, row)
            if not outcome:
                continue
            self["attempts"].labels(kind, outcome).inc()
            # A complete row of prepare keeps no time.
            took = max(0, row.seconds - old.seconds)
            self["attempt_seconds"].labels(kind).observe(took)
            if spec is not None and row.name != PREFLIGHT:
                block = scheduling_of(spec, row.name)
                self["gpu_seconds"].labels(kind).inc(took * block.gpus * block.nodes)


def _rows(status: Status) -> tuple[Row, ...]:
    return (*filter(None, [status.preflight]), *status.stages)


def _outcome(old: Row, row: Row) -> str:
    """What became of the attempt that the old row had; empty: it goes on."""
    if not old.handle or row.handle == old.handle:
        return ""
    if row.state is State.COMPLETE:
        return "complete"
    for name in ("failures", "preemptions", "lost"):
        if getattr(row, name) > getattr(old, name):
            return {"failures": "failed", "preemptions": "preempted"}.get(name, name)
    return "stopped"


class _Census:
    """Counts the cache's objects for prometheus_client."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def describe(self) -> list[Any]:
        """Nothing: they are not known before the first scrape."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Families of the moment."""
        runs, stages = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
        for run in self._cache.runs.values():
            runs[(run.state or "Pending",)] += 1
            stages.update(run.tally)
        records = self._cache.records.values()
        objects = {
            ("runs",): len(self._cache.runs),
            ("jobs",): sum(record.job is not None for record in records),
            ("pods",): sum(len(record.pods) for record in records),
        }
        for key, counts in (("runs", runs), ("stages", stages), ("cache_objects", objects)):
            metric = ENGINE[key]
            family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
            for labels, number in counts.items():
                family.add_metric(list(labels), number)
            yield family
