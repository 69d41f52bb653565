"""The heartbeat beats at once, goes on, and stops."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from serving_sink import Counts

from hidiff_runtime.serving.heartbeat import Heartbeat
from hidiff_runtime.serving.metrics import Metric, MetricsRecorder


class Beats(Counts):
    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.left = wanted
        self.enough = threading.Event()

    def __call__(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        super().__call__(metric, value, labels)
        self.left -= 1
        if self.left == 0:
            self.enough.set()


def test_beats_until_it_is_stopped() -> None:
    beats = Beats(3)
    heart = Heartbeat(MetricsRecorder(beats), seconds=0.01)
    before = time.time()
    heart.start()
    assert beats.enough.wait(120)
    heart.stop()
    told = [value for _, value in beats.gauges["hidiff_heartbeat_seconds"]]
    assert before <= told[0] <= told[-1] <= time.time()
    assert not heart._thread.is_alive()
    assert len(beats.gauges["hidiff_heartbeat_seconds"]) == len(told)


def test_stopping_what_never_began_is_nothing() -> None:
    Heartbeat(MetricsRecorder(Counts())).stop()
