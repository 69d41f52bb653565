"""A thread that says every few seconds that its process lives, so that a probe sees one that does not."""

from __future__ import annotations

import threading

from hidiff_runtime.serving.metrics import MetricsRecorder

SECONDS = 5.0
"""Between two beats."""


class Heartbeat:
    """Beats from `start` to `stop`, each time after so many ``seconds``."""

    def __init__(self, meter: MetricsRecorder, seconds: float = SECONDS) -> None:
        self._meter = meter
        self._seconds = seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="hidiff-heartbeat", daemon=True)

    def start(self) -> None:
        """Beats at once, and from then on."""
        self._meter.alive()
        self._thread.start()

    def stop(self) -> None:
        """Ends the beating; does nothing where it never began."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _beat(self) -> None:
        while not self._stopped.wait(self._seconds):
            self._meter.alive()
