"""A bundle in a server: proven before it is ready, and runs that can be watched, cancelled and measured."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from hidiff_runtime.denoising.conditioning import takes_channels
from hidiff_runtime.errors import Cancelled, Expired, ParityError
from hidiff_runtime.format.left_out import phases_of_steps
from hidiff_runtime.pipeline.image_processing import pillow
from hidiff_runtime.pipeline.pipeline import PictureStep, Pipeline, Result
from hidiff_runtime.pipeline.prompt_encoding import TruncationWarning
from hidiff_runtime.pipeline.request import Request
from hidiff_runtime.pipeline.request_fields import Settings
from hidiff_runtime.pipeline.request_values import Limits, read_request, with_seed
from hidiff_runtime.serving.metrics import MetricsRecorder
from hidiff_runtime.serving.public_errors import kind_of
from hidiff_runtime.verification.comparison import render
from hidiff_runtime.verification.replay import check

Observer = Callable[[PictureStep], object]
"""Called after each step."""


@dataclass(frozen=True)
class Ticket:
    """A request, and who waits for its pictures.

    Args:
        observer: called after each step, with the latents of this request's pictures alone.
        cancelled: asked before the run, after each step and after each tile that is decoded.
        deadline: by `time.monotonic`; looked at as often.
        left: told at once why nobody waits any more, where the run goes on for other requests.
    """

    request: Request
    observer: Observer | None = None
    cancelled: Callable[[], bool] = lambda: False
    deadline: float | None = None
    left: Callable[[Exception], object] = lambda _: None

    def check(self) -> None:
        """Raises Cancelled or Expired where nobody waits any more."""
        if self.cancelled():
            raise Cancelled("The client cancelled the run.")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise Expired(advice="Allow more time.")

    def observe(self, step: PictureStep, first: int) -> None:
        """Tells the observer of a step of a batch in which this request's pictures begin at ``first``."""
        if self.observer is not None:
            own = slice(first, first + len(self.request.prompts))
            self.observer(replace(step, latents=step.latents[own]))


class Service:
    """A pipeline that was proven on this machine. A context manager: leaving it closes every engine.

    Args:
        pipeline: an open one; closed with the service.
        limits: of each request.
        meter: told of everything that happens.

    Attributes:
        pipeline: that makes the pictures.
        limits: of each request.
        bundle_hash: the manifest's digest, which covers every file's hash.
        parity_hash: SHA-256 of the warm-up picture's pixels: replicas that have the same one draw the same pictures.

    Raises:
        BundleError: the bundle has no reference samples.
        EngineError: an engine does not load or fails.
        ParityError: the engines of this machine do not compute what PyTorch computed.
    """

    def __init__(self, pipeline: Pipeline, limits: Limits | None = None, meter: MetricsRecorder | None = None) -> None:
        self.pipeline = pipeline
        self.limits = limits or Limits()
        self._meter = meter or MetricsRecorder()
        self.bundle_hash = pipeline.bundle.manifest.digest
        _prove(pipeline)
        self.parity_hash = _warm_up(pipeline)
        sizes = [(bucket.manifest.width, bucket.manifest.height) for bucket in pipeline.bundle.buckets]
        self._meter.proven(self.bundle_hash, self.parity_hash, pipeline.bundle.backend, sizes)

    @classmethod
    def open(
        cls, folder: str | Path, *, limits: Limits | None = None, meter: MetricsRecorder | None = None, **options: Any
    ) -> Service:
        """Opens the bundle in ``folder``, compares every file's hash, and proves it.

        Args:
            options: those of :func:`hidiff_runtime.open`.

        Raises:
            InputError: an option is not one there is.
            BundleError: it is no bundle, is broken, or lacks text encoders, the VAE or reference samples.
            EngineError: the backend is not installed, or an engine does not load.
            ParityError: the engines of this machine do not compute what PyTorch computed.
        """
        pipeline = Pipeline.open(folder, **options)
        try:
            return cls(pipeline, limits, meter)
        except BaseException:
            pipeline.close()
            raise

    def request(self, values: Mapping[str, object]) -> Request:
        """Returns the request that plain values ask for; see `hidiff_runtime.pipeline.request_values.read_request`.

        A seed of -1 is drawn.

        Raises:
            InputError: a value is not one this server takes.
        """
        with _counted(self._meter):
            return read_request(self.pipeline, with_seed(values), self.limits)

    def generate(
        self,
        request: Request,
        *,
        observer: Observer | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        deadline: float | None = None,
    ) -> Result:
        """Makes one run's pictures. Runs follow each other: a second thread waits for the first one's run.

        Args:
            observer: and what follows: see `Ticket`.

        Raises:
            Cancelled: ``cancelled`` said so, or the observer raised.
            Expired: the deadline passed.
            EngineError: an engine is missing, failed, or gave NaN.
        """
        return next(self.results([Ticket(request, observer, cancelled, deadline)]))

    def results(self, tickets: Sequence[Ticket]) -> Iterator[Result]:
        """Yields the pictures of requests in their order, drawn together where `Pipeline.batches` says so.

        Raises:
            Exception: what kept it from making the next ones, as of `generate`.
        """
        for run in self._runs(tickets):
            for outcome in self._draw_run(run):
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome

    def outcomes(self, tickets: Sequence[Ticket]) -> list[Result | Exception]:
        """Makes the pictures of requests, together as `results` does; returns what became of each."""
        return [outcome for run in self._runs(tickets) for outcome in self._draw_run(run)]

    def _runs(self, tickets: Sequence[Ticket]) -> Iterator[Sequence[Ticket]]:
        """Yields the tickets of each run."""
        first = 0
        for run in self.pipeline.batches([ticket.request for ticket in tickets]):
            yield tickets[first : first + len(run)]
            first += len(run)

    def _draw_run(self, tickets: Sequence[Ticket]) -> list[Result | Exception]:
        """Makes the pictures of one run.

        A request that nobody waits for any more is told so, and the run goes on for the others; it ends with the last.
        Whatever else goes wrong is every request's.
        """
        requests = [ticket.request for ticket in tickets]
        size, ended = requests[0].size, dict[int, Exception]()
        places = [0, *accumulate(len(request.prompts) for request in requests)]

        def follow(act: Callable[[int, Ticket], object]) -> None:
            for index, ticket in enumerate(tickets):
                if index in ended:
                    continue
                try:
                    act(index, ticket)
                except Exception as error:
                    if len(ended) == len(tickets) - 1:
                        raise  # and the run ends, whose own error is this request's
                    ended[index] = error if isinstance(error, Cancelled) else Cancelled(str(error))
                    ticket.left(ended[index])

        def go_on(*_: int) -> None:
            follow(lambda _index, ticket: ticket.check())

        def after(step: PictureStep) -> None:
            self._meter.step(step.phase.name, size, step.seconds)
            go_on()
            follow(lambda index, ticket: ticket.observe(step, places[index]))

        started = time.monotonic()
        outcomes: list[Result | Exception]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TruncationWarning)  # the result tells what was cut
                go_on()
                results = list(self.pipeline.run(requests, callback=after, progress=go_on))
            outcomes = [ended.get(index, result) for index, result in enumerate(results)]
        except Exception as error:
            outcomes = [ended.get(index, error) for index in range(len(tickets))]
        for outcome in outcomes:
            self._count(outcome, time.monotonic() - started)
        return outcomes

    def _count(self, outcome: Result | Exception, seconds: float) -> None:
        if isinstance(outcome, Exception):
            _count_failure(self._meter, outcome)
        else:
            self._meter.served(outcome.request.size, seconds)
            self._meter.pictures(len(outcome.images), outcome.request.size)

    def try_out(self) -> None:
        """Draws the warm-up picture once more: where that fails, every request would.

        Raises:
            BundleError: a file of the bundle has gone or is another.
            EngineError: an engine is missing, failed, or gave NaN.
        """
        _warm_up(self.pipeline)

    def close(self) -> None:
        """Closes every engine; waits for a run in progress."""
        self.pipeline.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *failure: Any) -> None:
        self.pipeline.__exit__(*failure)


def generation_metadata(result: Result, index: int = 0) -> dict[str, Any]:
    """Returns all that a picture of a batch was made with, what was left out filled in: the JSON of its PNG file."""
    facts: dict[str, Any] = json.loads(result.images[index].info["hidiff"])
    return facts


@contextmanager
def _counted(meter: MetricsRecorder) -> Iterator[None]:
    """Counts how a request ended badly."""
    try:
        yield
    except Exception as error:
        _count_failure(meter, error)
        raise


def _count_failure(meter: MetricsRecorder, error: Exception) -> None:
    kind = kind_of(error)
    if kind == "cancelled":
        meter.cancelled()
    else:
        meter.failed(kind)


def _prove(pipeline: Pipeline) -> None:
    """Replays the reference samples."""
    report = check(pipeline.bundle)
    if not report.ok:
        failed = [verdict for verdict in report.verdicts if not verdict.ok]
        raise ParityError(
            "The engines of this machine do not compute what PyTorch computed when the bundle was built.",
            given=f"{len(failed)} of {len(report.verdicts)} comparisons failed\n{render(failed[:3])}",
            advice=f"Run 'hidiff-run check {pipeline.bundle.root}'.",
        )


def _warm_up(pipeline: Pipeline) -> str:
    """Draws the picture of the fewest steps that takes most of the phases' graphs; the SHA-256 of its pixels."""
    manifest = pipeline.bundle.manifest
    settings = _warm_up_settings(pipeline)
    asked = [pipeline.request("warm-up", Settings(steps=steps, **settings)) for steps in manifest.steps]

    def graphs(request: Request) -> int:
        return len({*phases_of_steps(manifest.rule, manifest.forecast, request.steps)} - {None})

    request = max(asked, key=lambda request: (graphs(request), -request.steps))
    digest = hashlib.sha256()
    for image in next(pipeline.run([request])).images:
        digest.update(image.tobytes())
    return digest.hexdigest()


def _warm_up_settings(pipeline: Pipeline) -> dict[str, Any]:
    """Grey pictures for a bundle that needs some."""
    manifest = pipeline.bundle.manifest
    grey = pillow().new("RGB", (manifest.width, manifest.height), (128, 128, 128))
    settings: dict[str, Any] = {}
    if takes_channels(manifest):
        settings |= {"image": grey, "mask": grey.convert("L")}
    if manifest.controlnet is not None:
        settings["control_image"] = grey
    return settings
