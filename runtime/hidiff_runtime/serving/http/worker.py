"""One thread makes pictures; requests wait for it in a queue with an end."""

from __future__ import annotations

import asyncio
import base64
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio import to_thread

from hidiff_runtime.errors import Expired
from hidiff_runtime.pipeline import PictureStep
from hidiff_runtime.request import Request
from hidiff_runtime.serving.http.errors import BUSY, ApiError
from hidiff_runtime.serving.metrics import Meter
from hidiff_runtime.serving.service import Service, used

if TYPE_CHECKING:
    from PIL.Image import Image

Encoder = Callable[["Image"], bytes]
"""Gives a picture's file."""

QUIET = 10.0
"""Seconds without news after which `Job.events` says so, so that connections are not taken for dead."""


@dataclass(frozen=True)
class Step:
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
class Picture:
    """A picture that is done.

    Args:
        file: the picture's file in base64.
        parameters: what it was made with.
    """

    file: str
    parameters: dict[str, Any]


class Quiet:
    """Nothing happened for a while."""


Event = Step | Picture | Quiet


class Job:
    """The runs of one request, in the order of their seeds. Whoever has one ends it.

    Args:
        requests: one for each run.
        previews: at most so many a run.
        deadline: by `time.monotonic`.
        meter: told where the job ends before it begins.
        encode: gives a picture's file.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        previews: int,
        deadline: float,
        meter: Meter,
        encode: Encoder,
    ) -> None:
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

    def queue(self, pool: ThreadPoolExecutor, work: Callable[[Job], None]) -> Future[None]:
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
                    yield Quiet()
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
            if self._expired:
                self._meter.failed("expired")
            else:
                self._meter.cancelled()

    def run(self, service: Service) -> None:
        """Makes the pictures, in the worker's thread."""
        try:
            for number, request in enumerate(self._requests):
                result = service.generate(
                    request,
                    observer=partial(self._step, number),
                    cancelled=self._cancelled.is_set,
                    deadline=self._deadline,
                )
                for index, image in enumerate(result.images):
                    self._tell(Picture(self._file(image), used(result, index)))
            self._tell(None)
        except Exception as error:
            self._tell(error)

    def _step(self, run: int, step: PictureStep) -> None:
        shown = step.step in previewed(step.steps, self._previews)
        preview = self._file(step.preview()) if shown else None
        self._tell(Step(run, step.step, step.steps, step.phase.name, step.seconds, preview))

    def _file(self, image: Image) -> str:
        return base64.b64encode(self._encode(image)).decode()

    def _tell(self, news: Event | Exception | None) -> None:
        self._loop.call_soon_threadsafe(self._news.put_nowait, news)


class Worker:
    """Takes jobs while there is a place, and does one at a time.

    Args:
        service: that makes the pictures; closed with the worker.
        meter: told of jobs that end before they begin.
        waiting: jobs that may wait while one runs.
    """

    def __init__(self, service: Service, meter: Meter, waiting: int) -> None:
        self.service = service
        self._meter = meter
        self._places = threading.BoundedSemaphore(waiting + 1)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hidiff-pictures")
        self._seconds = 1.0

    async def submit(
        self, read: Callable[[Service], Sequence[Request]], *, previews: int, deadline: float, encode: Encoder
    ) -> Job:
        """Takes a place, reads the request in a thread, and queues it.

        Args:
            read: gives the runs. It decodes pictures, which take memory, so it is called with a place alone.
            previews: at most so many a run.
            deadline: by `time.monotonic`.
            encode: gives a picture's file.

        Raises:
            ApiError: the queue is full.
            InputError: the request is refused.
        """
        if not self._places.acquire(blocking=False):
            self._meter.failed("busy")
            wait = {"Retry-After": str(math.ceil(self._seconds))}
            raise ApiError(429, "The queue is full. Ask again later.", kind=BUSY, code="queue_full", headers=wait)
        try:
            requests = await to_thread.run_sync(read, self.service)
            job = Job(requests, previews, deadline, self._meter, encode)
            future = job.queue(self._pool, self._work)
        except BaseException:
            self._places.release()
            raise
        future.add_done_callback(lambda _: self._places.release())
        return job

    def close(self) -> None:
        """Waits for the job that runs, drops those that wait, and closes the service."""
        self._pool.shutdown(cancel_futures=True)
        self.service.close()

    def _work(self, job: Job) -> None:
        started = time.monotonic()
        job.run(self.service)
        self._seconds = time.monotonic() - started


def previewed(steps: int, previews: int) -> set[int]:
    """After which steps there is a preview: evenly spread, and not after the last while there are fewer than steps."""
    if previews >= steps:
        return set(range(steps))
    return {round((place + 1) * steps / (previews + 1)) - 1 for place in range(previews)}
