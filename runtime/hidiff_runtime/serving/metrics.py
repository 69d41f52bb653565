"""What a server counts. One table names everything; a sink writes it where the server's own metrics are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from hidiff_runtime.pipeline.request_fields import Size


@dataclass(frozen=True)
class Metric:
    """A metric as Prometheus knows it.

    Args:
        name: with the unit or ``_total`` at the end.
        kind: of metric.
        help: one sentence.
        labels: every value carries these.
        buckets: of a histogram, upper ends, rising.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_STEP_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_REQUEST_BUCKETS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 900.0)

PICTURES = Metric("hidiff_pictures_total", "counter", "Pictures that were made.", ("size",))
STEP_SECONDS = Metric(
    "hidiff_step_seconds",
    "histogram",
    "Seconds of a denoising step; its count is steps.",
    ("phase", "size"),
    _STEP_BUCKETS,
)
REQUEST_SECONDS = Metric(
    "hidiff_request_seconds",
    "histogram",
    "Seconds of a run that made its pictures, from prompt to pixels.",
    ("size",),
    _REQUEST_BUCKETS,
)
CANCELLATIONS = Metric("hidiff_cancellations_total", "counter", "Runs that the client ended.")
FAILURES = Metric(
    "hidiff_failures_total", "counter", "Requests that failed: input, busy, expired, engine, internal.", ("kind",)
)
PARITY = Metric(
    "hidiff_parity_info",
    "gauge",
    "1; the bundle's hash, and that of the warm-up picture, the same on replicas that draw the same.",
    ("bundle", "parity", "backend"),
)
HEARTBEAT = Metric("hidiff_heartbeat_seconds", "gauge", "Unix time at which this process last said that it lives.")

METRICS = (PICTURES, STEP_SECONDS, REQUEST_SECONDS, CANCELLATIONS, FAILURES, PARITY, HEARTBEAT)


Sink = Callable[[Metric, float, Mapping[str, str]], object]
"""Where values and their labels go: Triton's own metrics, or a Prometheus registry. It raises a counter by the value,
sets a gauge to it, or adds it to a histogram. Called from any thread."""


class MetricsRecorder:
    """Says what happened, in the words of a server.

    Args:
        sink: where it is written; nowhere if left out.
    """

    def __init__(self, sink: Sink = lambda *_: None) -> None:
        self._sink = sink

    def pictures(self, count: int, size: Size) -> None:
        """Counts pictures that were made; their size is width and height, as in all that follows."""
        self._sink(PICTURES, count, {"size": _text(size)})

    def step(self, phase: str, size: Size, seconds: float) -> None:
        """Observes a step of a phase, in a run of pictures of this size."""
        self._sink(STEP_SECONDS, seconds, {"phase": phase, "size": _text(size)})

    def served(self, size: Size, seconds: float) -> None:
        """Observes a run that made its pictures."""
        self._sink(REQUEST_SECONDS, seconds, {"size": _text(size)})

    def cancelled(self) -> None:
        """Counts a run that the client ended, or took back before it began."""
        self._sink(CANCELLATIONS, 1, {})

    def failed(self, kind: str) -> None:
        """Counts a request that failed; the kind is that of `hidiff_runtime.serving.public_errors.kind_of`."""
        self._sink(FAILURES, 1, {"kind": kind})

    def proven(self, bundle: str, parity: str, backend: str, sizes: Iterable[Size]) -> None:
        """Notes that the bundle with this hash passed its checks and drew a warm-up picture with that hash.

        Pictures of each of its sizes are counted from zero on: Prometheus sees no increase in what begins at one.
        """
        self._sink(PARITY, 1, {"bundle": bundle, "parity": parity, "backend": backend})
        for size in dict.fromkeys(sizes):
            self.pictures(0, size)

    def alive(self) -> None:
        """Notes that this process lives."""
        self._sink(HEARTBEAT, time.time(), {})


def _text(size: Size) -> str:
    width, height = size
    return f"{width}x{height}"
