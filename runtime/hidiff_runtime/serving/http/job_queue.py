"""One thread makes pictures; requests wait for it in a queue with an end."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

from anyio import to_thread

from hidiff_runtime.heap_trim import trim_heap
from hidiff_runtime.pipeline.batching import fill, run_key
from hidiff_runtime.pipeline.request import Request
from hidiff_runtime.serving.http.errors import BUSY, ApiError, unavailable
from hidiff_runtime.serving.http.queued_job import Encoder, QueuedJob, run_together
from hidiff_runtime.serving.http.service_trial import AGAIN, Trial
from hidiff_runtime.serving.metrics import MetricsRecorder
from hidiff_runtime.serving.public_errors import kind_of
from hidiff_runtime.serving.service import Service

PICTURE_BYTES = 2**28
"""Of the pixels that all requests may hold together, over 80 pictures of 1024 x 1024; one alone may hold more."""


class JobWorker:
    """Takes jobs while there is a place, and does one at a time.

    Args:
        service: that makes the pictures; closed with the worker.
        meter: told of jobs that end before they begin.
        waiting: jobs that may wait while one runs.
        dynamic_batching: whether waiting jobs of one request each are drawn together, where the bundle has a batch for
            them and they are alike in all that a run has once.
    """

    def __init__(
        self, service: Service, meter: MetricsRecorder, waiting: int, *, dynamic_batching: bool = False
    ) -> None:
        self.service = service
        self._meter = meter
        self._waiting: list[QueuedJob] | None = [] if dynamic_batching else None
        self._held = 0
        self._holding = threading.Lock()
        self._decoding = asyncio.Lock()
        self._places = threading.BoundedSemaphore(waiting + 1)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hidiff-pictures")
        self._seconds = 1.0
        self._trial = Trial(service)

    async def submit(
        self,
        read: Callable[[Service], Sequence[Request]],
        *,
        pictures: bool,
        previews: int,
        deadline: float,
        encode: Encoder,
    ) -> QueuedJob:
        """Takes a place, reads the request in a thread, and queues it.

        Args:
            read: gives the runs. It decodes pictures, which take memory, so it is called with a place alone.
            pictures: whether it does: then it waits until no other does.
            previews: at most so many a run.
            deadline: by `time.monotonic`.
            encode: gives a picture's file.

        Raises:
            ApiError: the queue is full, by its places or by the pictures that wait in it.
            InputError: the request is refused.
        """
        if not self._places.acquire(blocking=False):
            raise self._busy("The queue is full.")
        held = 0
        try:
            async with self._decoding if pictures else nullcontext():
                requests = await to_thread.run_sync(self._read, read, pictures)
                held = self._hold(requests)
            job = QueuedJob(requests, previews, deadline, self._meter, encode, held)
            if self._waiting is not None:
                with self._holding:
                    self._waiting.append(job)
            future = job.queue(self._pool, self._work)
        except BaseException:
            self._leave(held)
            raise
        future.add_done_callback(lambda done: self._give_up(job) if done.cancelled() else None)
        return job

    def check_ready(self) -> None:
        """Looks whether requests can be served, as far as is known; a service that failed is tried out behind them.

        Raises:
            ApiError: files of the bundle are gone, or a request failed and the warm-up picture does too.
        """
        if self.service.pipeline.bundle.lost_files():
            raise _not_ready("files of its bundle are gone")
        if self._trial.failed:
            if self._trial.is_due():
                self._pool.submit(self._trial.run)
            raise _not_ready("a request failed, and the picture that it is tried out with does too")

    def close(self) -> None:
        """Waits for the job that runs, drops those that wait, and closes the service."""
        self._pool.shutdown(cancel_futures=True)
        self.service.close()

    def _read(self, read: Callable[[Service], Sequence[Request]], pictures: bool) -> Sequence[Request]:
        try:
            return read(self.service)
        finally:
            if pictures:
                trim_heap()

    def _hold(self, requests: Sequence[Request]) -> int:
        """Counts the bytes of pictures, which a request's runs share. Raises ApiError where they are too many."""
        found: dict[int, int] = {}
        for request in requests:
            found |= request.held
        size = sum(found.values())
        with self._holding:
            if size and self._held and self._held + size > PICTURE_BYTES:
                raise self._busy("The requests that wait hold as many pictures as there is room for.")
            self._held += size
        return size

    def _leave(self, held: int) -> None:
        """Gives back a place, and the bytes of the pictures that were held."""
        with self._holding:
            self._held -= held
        self._places.release()

    def _give_up(self, job: QueuedJob) -> None:
        self._no_longer_waits(job)
        self._leave(job.held)

    def _no_longer_waits(self, job: QueuedJob) -> None:
        with self._holding:
            if self._waiting is not None and job in self._waiting:
                self._waiting.remove(job)

    def _busy(self, told: str) -> ApiError:
        self._meter.failed("busy")
        wait = {"Retry-After": str(math.ceil(self._seconds))}
        return ApiError(429, f"{told} Ask again later.", kind=BUSY, code="queue_full", headers=wait)

    def _work(self, job: QueuedJob) -> None:
        if not job.begin():
            return  # it was drawn with another
        self._no_longer_waits(job)
        jobs = [job, *self._companions(job)]
        started = time.monotonic()
        try:
            errors = [job.run(self.service)] if len(jobs) == 1 else run_together(jobs, self.service)
        finally:
            self._seconds = time.monotonic() - started
            for each in jobs:
                self._leave(each.held)  # before the client is told, who may ask again at once
        for each, error in zip(jobs, errors, strict=True):
            each.tell(error)
        self._judge(errors)

    def _companions(self, job: QueuedJob) -> list[QueuedJob]:
        """Returns the jobs that the same run can draw, which have begun then; those that wait longest first."""
        request = job.only
        if self._waiting is None or request is None:
            return []
        key = run_key(request)
        with self._holding:
            alike = [other for other in self._waiting if other.only is not None and run_key(other.only) == key]
        count = fill(self.service.pipeline.bundle.manifest, request, 1 + len(alike))
        found: list[QueuedJob] = []
        for other in alike:
            if len(found) + 1 < count and other.begin():
                self._no_longer_waits(other)
                found.append(other)
        return found

    def _judge(self, errors: Sequence[Exception | None]) -> None:
        """Tries the service out where a request failed: it may be at fault, or all that follow will fail too."""
        if None in errors:
            self._trial.failed = False
        elif any(kind_of(error) in ("engine", "internal") for error in errors if error) and not self._trial.failed:
            self._trial.run()


def _not_ready(why: str) -> ApiError:
    return unavailable(f"The server is not ready: {why}. Its log says more.", "not_ready", math.ceil(AGAIN))
