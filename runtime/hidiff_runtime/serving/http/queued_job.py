"""The runs of one request: what happens to them, told across threads to who waits for it."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hidiff_runtime.errors import Expired
from hidiff_runtime.pipeline.pipeline import PictureStep, Result
from hidiff_runtime.pipeline.request import Request
from hidiff_runtime.serving.metrics import MetricsRecorder
from hidiff_runtime.serving.service import Service, Ticket, generation_metadata

if TYPE_CHECKING:
    from PIL.Image import Image

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
        held: bytes of the pictures that its requests hold.

    Attributes:
        size: width and height of its pictures, one for all.
        held: bytes of the pictures that its requests hold.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        previews: int,
        deadline: float,
        meter: MetricsRecorder,
        encode: Encoder,
        held: int = 0,
    ) -> None:
        self.size = requests[0].size
        self.held = held
        self._requests = requests
        self._previews = previews
        self._deadline = deadline
        self._meter = meter
        self._encode = encode
        self._cancelled = threading.Event()
        self._expired = False
        self._begun = False
        self._beginning = threading.Lock()
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
                raise Expired from None
            if isinstance(news, Exception):
                raise news
            if news is None:
                return
            yield news

    def end(self) -> None:
        """Ends the run after its step, which it counts itself; takes back a job that has not begun, and counts that."""
        if not self._expired:  # else the run looks at its deadline itself
            self._cancelled.set()
        with self._beginning:
            future = None if self._begun else self._future
            taken_back = future is not None and not future.cancelled() and future.cancel()
        if taken_back:
            self._requests = ()  # the pool keeps the job until its turn comes, and its pictures with it
            if self._expired:
                self._meter.failed("expired")
            else:
                self._meter.cancelled()

    def begin(self) -> bool:
        """Returns whether the job was still to be begun; whoever is told so runs it, and nobody else."""
        with self._beginning:
            if self._begun or (self._future is not None and self._future.cancelled()):
                return False
            self._begun = True
        return True

    @property
    def only(self) -> Request | None:
        """The job's request where there is one alone, which may be drawn with those of other jobs."""
        requests = self._requests
        return requests[0] if len(requests) == 1 else None

    def run(self, service: Service) -> Exception | None:
        """Makes the pictures, in the worker's thread; returns what kept it from that. `tell` has to follow."""
        try:
            for result in service.results(self.tickets()):
                self.show(result)
        except Exception as error:
            return error
        finally:
            self.let_go()
        return None

    def tickets(self) -> list[Ticket]:
        """Returns a ticket for each request."""
        return [
            Ticket(request, partial(self._step, number), self._cancelled.is_set, self._deadline)
            for number, request in enumerate(self._requests)
        ]

    def show(self, result: Result) -> None:
        """Tells `events` of a request's pictures."""
        for index, image in enumerate(result.images):
            self.tell(ImageEvent(self._file(image), generation_metadata(result, index)))

    def let_go(self) -> None:
        """Forgets the requests: a client that reads slowly keeps the job, not its pictures."""
        self._requests = ()

    def _step(self, run: int, step: PictureStep) -> None:
        shown = step.step in previewed(step.steps, self._previews)
        preview = self._file(step.preview()) if shown else None
        self.tell(StepEvent(run, step.step, step.steps, step.phase.name, step.seconds, preview))

    def _file(self, image: Image) -> str:
        return base64.b64encode(self._encode(image)).decode()

    def tell(self, news: Event | Exception | None) -> None:
        """Tells `events` what happened, the end by an error or None."""
        self._loop.call_soon_threadsafe(self._news.put_nowait, news)


def run_together(jobs: Sequence[QueuedJob], service: Service) -> list[Exception | None]:
    """Makes the pictures of jobs with one request each, in the worker's thread; returns what kept each from that.

    `QueuedJob.tell` has to follow for each.
    """
    found: list[Exception | None] = []
    outcomes = service.outcomes([ticket for job in jobs for ticket in job.tickets()])
    for job, outcome in zip(jobs, outcomes, strict=True):
        error = outcome if isinstance(outcome, Exception) else None
        if not isinstance(outcome, Exception):
            try:
                job.show(outcome)
            except Exception as fault:  # of a picture's file
                error = fault
        found.append(error)
        job.let_go()
    return found


def previewed(steps: int, previews: int) -> set[int]:
    """Picks steps to preview: evenly spread, and not after the last while there are fewer than steps."""
    if previews >= steps:
        return set(range(steps))
    return {round((place + 1) * steps / (previews + 1)) - 1 for place in range(previews)}
