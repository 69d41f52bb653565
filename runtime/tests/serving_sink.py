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
    begun: set[tuple[str, tuple[tuple[str, str], ...]]] = field(default_factory=set)
    gauges: dict[str, list[tuple[dict[str, str], float]]] = field(default_factory=dict)
    observed: dict[str, list[tuple[dict[str, str], float]]] = field(default_factory=dict)

    def __call__(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        assert metric in METRICS
        assert tuple(labels) == metric.labels
        if metric.kind == "counter":
            assert value == int(value) >= 0
            key = metric.name, tuple(labels.items())
            self.begun.add(key)
            if value:
                self.counters[key] += int(value)
        else:
            values = self.gauges if metric.kind == "gauge" else self.observed
            values.setdefault(metric.name, []).append((dict(labels), value))
