"""Metrics in a Prometheus registry."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics

from hidiff_runtime.serving.metrics import METRICS, Metric


class Prometheus:
    """A sink that Prometheus reads, with what the process itself takes.

    Attributes:
        registry: that holds every metric of the table from the start.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series each: when it was first counted
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._metrics = {metric.name: self._registered(metric) for metric in METRICS}

    def _registered(self, metric: Metric) -> Counter | Gauge | Histogram:
        told = (metric.name, metric.help, metric.labels)
        if metric.kind == "histogram":
            return Histogram(*told, buckets=metric.buckets, registry=self.registry)
        return (Counter if metric.kind == "counter" else Gauge)(*told, registry=self.registry)

    def __call__(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Writes a value."""
        found = self._metrics[metric.name]
        written = found.labels(**labels) if labels else found
        if isinstance(written, Counter):
            written.inc(value)
        elif isinstance(written, Gauge):
            written.set(value)
        else:
            written.observe(value)
