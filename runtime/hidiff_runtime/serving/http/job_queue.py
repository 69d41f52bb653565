"""One thread makes pictures; requests wait for it in a queue with an end."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio import to_thread

from hidiff_runtime.errors import Expired
from hidiff_runtime.pipeline.pipeline import PictureStep
from hidiff_runtime.pipeline.request import Request
from hidiff_runtime.serving.heap_trim import trim_heap
from hidiff_runtime.serving.http.errors import BUSY, ApiError, unavailable
from hidiff_runtime.serving.metrics import MetricsRecorder
from hidiff_runtime.serving.public_errors import kind_of
from hidiff_runtime.serving.service import Service, generation_metadata

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

PICTURE_BYTES = 2**28
"""Of the pixels that all requests may hold together, over 80 pictures of 1024 x 1024; one alone may hold more."""

AGAIN = 10.0
"""Seconds after which a service that failed is tried out anew, when somebody asks whether it is ready."""

Encoder = Callable[["Image"], bytes]
"""Gives a picture's file."""

QUIET = 10.0
"""Seconds without news after which `QueuedJob.events` says so, so that connections are not taken for dead."""


@dataclass(frozen=True)
class StepEvent:
    """A step that ended.

    Args:
        run: of the request, from 0.
        step: of the run, from 0.
        steps: of the run.
        phase: its name.
        seconds: that it took.
        preview: a small picture's file in base64; None where none was asked for.
    """

    run: int
    step: int
    steps: int
    phase: str
    seconds: float
    preview: str | None

    @property
    def progress(self) -> dict[str, Any]:
        """All but the preview."""
        return {name: value for name, value in vars(self).items() if name != "preview"}


@dataclass(frozen=True)
class ImageEvent:
    """A picture that is done.

    Args:
        file: the picture's file in base64.
        parameters: what it was made with.
    """

    file: str
    parameters: dict[str, Any]


class KeepAlive:
    """Nothing happened for a while."""


Event = StepEvent | ImageEvent | KeepAlive


class QueuedJob:
    """The runs of one request, in the order of their seeds. Whoever has one ends it.

    Args:
        requests: one for each run.
        previews: at most so many a run.
        deadline: by `time.monotonic`.
        meter: told where the job ends before it begins.
        encode: gives a picture's file.

    Attributes:
        size: width and height of its pictures, one for all.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        previews: int,
        deadline: float,
        meter: MetricsRecorder,
        encode: Encoder,
    ) -> None:
        self.size = requests[0].size
        self._requests = requests
        self._previews = previews
        self._deadline = deadline
        self._meter = meter
        self._encode = encode
        self._cancelled = threading.Event()
        self._expired = False
        self._future: Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Event | Exception | None] = asyncio.Queue()

    def queue(self, pool: ThreadPoolExecutor, work: Callable[[QueuedJob], None]) -> Future[None]:
        """Puts the job behind those that wait for the pool's thread."""
        self._future = pool.submit(work, self)
        return self._future

    async def events(self) -> AsyncGenerator[Event, None]:
        """What happens, until all is done.

        Raises:
            Expired: the deadline passed.
            EngineError: an engine is missing, failed, or gave NaN.
        """
        while True:
            left = self._deadline - time.monotonic()
            try:
                news = await asyncio.wait_for(self._news.get(), min(left, QUIET))
            except asyncio.TimeoutError:
                if left > QUIET:
                    yield KeepAlive()
                    continue
                self._expired = True
                raise Expired("The deadline passed before the picture was made.") from None
            if isinstance(news, Exception):
                raise news
            if news is None:
                return
            yield news

    def end(self) -> None:
        """Ends the run after its step, which it counts itself; takes back a job that has not begun, and counts that."""
        if not self._expired:  # else the run looks at its deadline itself
            self._cancelled.set()
        if self._future is not None and not self._future.cancelled() and self._future.cancel():
            self._requests = ()  # the pool keeps the job until its turn comes, and its pictures with it
            if self._expired:
                self._meter.failed("expired")
            else:
                self._meter.cancelled()

    def run(self, service: Service) -> Exception | None:
        """Makes the pictures, in the worker's thread; returns what kept it from that. `tell` has to follow."""
        try:
            for number, request in enumerate(self._requests):
                result = service.generate(
                    request,
                    observer=partial(self._step, number),
                    cancelled=self._cancelled.is_set,
                    deadline=self._deadline,
                )
                for index, image in enumerate(result.images):
                    self.tell(ImageEvent(self._file(image), generation_metadata(result, index)))
        except Exception as error:
            return error
        finally:
            self._requests = ()  # a client that reads slowly keeps the job, not its pictures
        return None

    def _step(self, run: int, step: PictureStep) -> None:
        shown = step.step in previewed(step.steps, self._previews)
        preview = self._file(step.preview()) if shown else None
        self.tell(StepEvent(run, step.step, step.steps, step.phase.name, step.seconds, preview))

    def _file(self, image: Image) -> str:
        return base64.b64encode(self._encode(image)).decode()

    def tell(self, news: Event | Exception | None) -> None:
        """Tells `events` what happened, the end by an error or None."""
        self._loop.call_soon_threadsafe(self._news.put_nowait, news)


class Trial:
    """Tells a service that fails from requests that do.

    Attributes:
        failed: whether the service failed when it was tried out last, and has made no picture since.
    """

    def __init__(self, service: Service) -> None:
        self.failed = False
        self._service = service
        self._lock = threading.Lock()
        self._due = 0.0

    def is_due(self) -> bool:
        """Returns whether it is time to try again; whoever is told so does."""
        with self._lock:
            due = time.monotonic() >= self._due
            if due:
                self._due = math.inf  # until it has been tried
        return due

    def run(self) -> None:
        """Draws the warm-up picture, in the worker's thread."""
        try:
            self._service.try_out()
            self.failed = False
        except Exception as error:
            if not self.failed:
                log.error("The server is not ready any more: %s", error)
            self.failed = True
        finally:
            with self._lock:
                self._due = time.monotonic() + AGAIN


class JobWorker:
    """Takes jobs while there is a place, and does one at a time.

    Args:
        service: that makes the pictures; closed with the worker.
        meter: told of jobs that end before they begin.
        waiting: jobs that may wait while one runs.
    """

    def __init__(self, service: Service, meter: MetricsRecorder, waiting: int) -> None:
        self.service = service
        self._meter = meter
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
            job = QueuedJob(requests, previews, deadline, self._meter, encode)
            future = job.queue(self._pool, partial(self._work, held=held))
        except BaseException:
            self._leave(held)
            raise
        future.add_done_callback(lambda done: self._leave(held) if done.cancelled() else None)
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

    def _busy(self, told: str) -> ApiError:
        self._meter.failed("busy")
        wait = {"Retry-After": str(math.ceil(self._seconds))}
        return ApiError(429, f"{told} Ask again later.", kind=BUSY, code="queue_full", headers=wait)

    def _work(self, job: QueuedJob, held: int) -> None:
        started = time.monotonic()
        try:
            error = job.run(self.service)
        finally:
            self._seconds = time.monotonic() - started
            self._leave(held)  # before the client is told, who may ask again at once
        job.tell(error)
        if error is None:
            self._trial.failed = False
        elif kind_of(error) in ("engine", "internal") and not self._trial.failed:
            self._trial.run()  # the request may be at fault, or all that follow will fail too


def _not_ready(why: str) -> ApiError:
    return unavailable(f"The server is not ready: {why}. Its log says more.", "not_ready", math.ceil(AGAIN))


def previewed(steps: int, previews: int) -> set[int]:
    """Picks steps to preview: evenly spread, and not after the last while there are fewer than steps."""
    if previews >= steps:
        return set(range(steps))
    return {round((place + 1) * steps / (previews + 1)) - 1 for place in range(previews)}
