"""The metrics that a server of a bundle has."""

from __future__ import annotations

import re
from pathlib import Path

from hidiff_runtime.serving.metrics import METRICS

TRITON = {
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_pending_request_count",
    "nv_inference_queue_duration_us",
    "nv_gpu_memory_used_bytes",
    "nv_gpu_memory_total_bytes",
    "nv_gpu_utilization",
}
"""Of Triton's own metrics, by its documentation; the first four are those of a server without a GPU too."""

_SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}

OURS = {metric.name + suffix: set(metric.labels) for metric in METRICS for suffix in _SUFFIXES[metric.kind]}
"""By what Prometheus calls their series: the labels that are their own."""


def metrics_in(page: Path) -> set[str]:
    """What a page of text calls by a metric's name."""
    pattern = r"\b(?:hidiff_[a-z_]+_(?:total|seconds|info)(?:_(?:count|sum|bucket))?|nv_[a-z_]+)\b"
    return set(re.findall(pattern, page.read_text()))
