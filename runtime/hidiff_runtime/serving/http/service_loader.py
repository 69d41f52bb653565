"""A service that is opened behind a server's back: ready once it is proven."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from hidiff_runtime.serving.heartbeat import Heartbeat
from hidiff_runtime.serving.http.errors import unavailable
from hidiff_runtime.serving.http.job_queue import JobWorker
from hidiff_runtime.serving.metrics import MetricsRecorder
from hidiff_runtime.serving.service import Service

log = logging.getLogger(__name__)


class ServiceLoader:
    """Opens the service in a thread of its own, and hands out the worker when there is one.

    Args:
        open_service: opens and proves the bundle.
        meter: whose heart beats meanwhile.
        waiting: jobs that may wait while one runs.
        dynamic_batching: see `JobWorker`.
        failed: called with the error of a service that did not open.
        ready: called with the service.
    """

    def __init__(
        self,
        open_service: Callable[[], Service],
        meter: MetricsRecorder,
        *,
        waiting: int,
        dynamic_batching: bool = False,
        failed: Callable[[BaseException], object],
        ready: Callable[[Service], object] = lambda _: None,
    ) -> None:
        self._open_service = open_service
        self._new_worker = partial(JobWorker, meter=meter, waiting=waiting, dynamic_batching=dynamic_batching)
        self._failed = failed
        self._ready = ready
        self._worker: JobWorker | None = None
        self._heartbeat = Heartbeat(meter)
        self._thread = threading.Thread(target=self._open, name="hidiff-open", daemon=True)

    @property
    def worker(self) -> JobWorker:
        """Who makes pictures. Raises ApiError before the service is proven."""
        if self._worker is None:
            raise unavailable("The server is not ready: it is opening and checking its bundle.", "not_ready")
        return self._worker

    @property
    def opening(self) -> bool:
        """Whether the bundle is still being opened."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begins to open, and to say that the process lives."""
        self._heartbeat.start()
        self._thread.start()

    def close(self) -> None:
        """Ends the worker. Whatever is still being opened is left to the end of the process."""
        self._heartbeat.stop()
        if self._worker is not None:
            self._worker.close()

    def _open(self) -> None:
        try:
            service = self._open_service()
        except BaseException as error:
            self._failed(error)
            return
        self._worker = self._new_worker(service)
        self._ready(service)
