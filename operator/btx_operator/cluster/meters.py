"""The operator's metrics: every name of btx_api.metrics.ENGINE, and nothing else.

Only runs that have not ended have series of their own. What is, is counted when somebody scrapes;
what happens, when it happens.
"""

import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from btx_api.metrics import ENGINE, MetricType, Outcome
from btx_api.spec import BTXRunSpec
from btx_api.status import Status
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as PromCounter
from prometheus_client.core import GaugeMetricFamily

from btx_operator.cluster.cache import Cache
from btx_operator.cluster.run_metrics import KINDS, Gauges, LiveRun, Sample, ended

COUNTED = (
    "runs", "stages", "run_refused", "run_gpu_seconds", "stage_gpus", "stage_flops",
    "cache_objects",
)  # fmt: skip
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
        self._by_name: dict[str, Any] = {}
        for key, metric in ENGINE.items():
            if key in COUNTED:
                continue
            more = {}
            if metric.type is MetricType.HISTOGRAM:
                more["buckets"] = BUCKETS.get(key, SHORT)
            self._all[key] = MAKERS[metric.type](
                metric.name, metric.help, metric.labels, registry=self.registry, **more
            )
            self._by_name[metric.name] = self._all[key]
        # A counter that appears with its first 1 has no increase that an alert could see.
        for kind, outcome in product(KINDS, Outcome):
            self["attempts"].labels(kind, outcome)

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
        for sample in ended(before, after, spec, time.time()):
            metric = self._by_name[sample.metric.name].labels(**sample.labels)
            if sample.metric.type is MetricType.HISTOGRAM:
                metric.observe(sample.value)
            else:
                metric.inc(sample.value)


class _Census:
    """Counts the cache's objects for prometheus_client."""

    def __init__(self, cache: Cache) -> None:
        self._cache, self._gauges = cache, Gauges()

    def describe(self) -> list[Any]:
        """Nothing: they are not known before the first scrape."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Families of the moment."""
        runs, records = self._cache.runs.values(), self._cache.records.values()
        live = [
            LiveRun(
                namespace=run.key[0], name=run.key[1], uid=run.uid, spec=run.spec,
                status=run.status,
            )
            for run in runs
            if not run.ended
        ]  # fmt: skip
        samples = list(self._gauges.samples((run.state for run in runs), live, time.time()))
        objects = {
            "runs": len(runs),
            "jobs": sum(record.job is not None for record in records),
            "pods": sum(len(record.pods) for record in records),
        }
        samples += [
            Sample(metric=ENGINE["cache_objects"], labels={"kind": kind}, value=number)
            for kind, number in objects.items()
        ]
        for key in COUNTED:
            metric = ENGINE[key]
            family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
            for sample in samples:
                if sample.metric is metric:
                    family.add_metric([sample.labels[k] for k in metric.labels], sample.value)
            yield family
