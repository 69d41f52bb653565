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
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for metric in METRICS:
            self._register(metric)

    def _register(self, metric: Metric) -> None:
        told = (metric.name, metric.help, metric.labels)
        if metric.kind == "counter":
            self._counters[metric.name] = Counter(*told, registry=self.registry)
        elif metric.kind == "gauge":
            self._gauges[metric.name] = Gauge(*told, registry=self.registry)
        else:
            self._histograms[metric.name] = Histogram(*told, buckets=metric.buckets, registry=self.registry)

    def add(self, metric: Metric, labels: Mapping[str, str]) -> None:
        """Raises a counter by one."""
        counter = self._counters[metric.name]
        (counter.labels(**labels) if labels else counter).inc()

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Sets a gauge."""
        gauge = self._gauges[metric.name]
        (gauge.labels(**labels) if labels else gauge).set(value)

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Adds a value to a histogram."""
        histogram = self._histograms[metric.name]
        (histogram.labels(**labels) if labels else histogram).observe(value)
