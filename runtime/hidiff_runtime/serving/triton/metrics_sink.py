"""Metrics among Triton's own, on its metrics port."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from hidiff_runtime.serving.metrics import METRICS, Metric

_WRITES = {"counter": "increment", "gauge": "set", "histogram": "observe"}


class TritonSink:
    """Writes values as Triton's custom metrics. Every value carries the model and its instance beside its own labels.

    Args:
        model: its name.
        worker: the instance's name; each is a process of its own.
    """

    def __init__(self, model: str, worker: str) -> None:
        self._own = {"model": model, "worker": worker}
        self._lock = threading.Lock()
        self._families = {metric.name: _family(metric) for metric in METRICS}
        self._metrics: dict[tuple[str, tuple[str, ...]], Any] = {}

    def __call__(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Writes a value."""
        getattr(self._of(metric, labels), _WRITES[metric.kind])(value)

    def _of(self, metric: Metric, labels: Mapping[str, str]) -> Any:
        """Triton's metric for these labels, made when it is first asked for."""
        key = metric.name, tuple(labels.values())
        with self._lock:
            if key not in self._metrics:
                buckets = {"buckets": list(metric.buckets)} if metric.kind == "histogram" else {}
                family = self._families[metric.name]
                self._metrics[key] = family.Metric(labels={**self._own, **labels}, **buckets)
            return self._metrics[key]


def _family(metric: Metric) -> Any:
    kind = getattr(pb_utils.MetricFamily, metric.kind.upper())
    return pb_utils.MetricFamily(name=metric.name, description=metric.help, kind=kind)
