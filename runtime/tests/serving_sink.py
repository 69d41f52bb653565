"""A sink for metrics that tests can look into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from hidiff_runtime.serving.metrics import METRICS, Metric


@dataclass
class Counts:
    """Keeps everything, and refuses what the table of metrics does not say."""

    counters: Counter[tuple[str, tuple[tuple[str, str], ...]]] = field(default_factory=Counter)
    gauges: dict[str, list[tuple[dict[str, str], float]]] = field(default_factory=dict)
    observed: dict[str, list[tuple[dict[str, str], float]]] = field(default_factory=dict)

    def add(self, metric: Metric, labels: Mapping[str, str]) -> None:
        self._check(metric, "counter", labels)
        self.counters[metric.name, tuple(labels.items())] += 1

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self._check(metric, "gauge", labels)
        self.gauges.setdefault(metric.name, []).append((dict(labels), value))

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self._check(metric, "histogram", labels)
        self.observed.setdefault(metric.name, []).append((dict(labels), value))

    @staticmethod
    def _check(metric: Metric, kind: str, labels: Mapping[str, str]) -> None:
        assert metric in METRICS
        assert metric.kind == kind
        assert tuple(labels) == metric.labels
