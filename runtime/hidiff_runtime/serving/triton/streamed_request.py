"""A request to the model that holds the engines: what it asks for, whether its client waits, and all its answers."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hidiff_runtime.errors import HidiffError, InputError
from hidiff_runtime.serving.public_errors import kind_of
from hidiff_runtime.serving.service import Ticket
from hidiff_runtime.serving.triton import tensor_codec
from hidiff_runtime.serving.triton.responses import answer, refusal, send_last, tensors_of, timeout_of, told
from hidiff_runtime.serving.triton.run_tokens import RunTokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hidiff_runtime.pipeline.pipeline import PictureStep, Result
    from hidiff_runtime.pipeline.request import Request
    from hidiff_runtime.serving.metrics import MetricsRecorder
    from hidiff_runtime.serving.service import Service
    from hidiff_runtime.serving.triton.background_thread import BackgroundThread

TOKEN = "hidiff_token"
"""The request parameter by which the front names its token. A request that has one gets no progress."""


class StreamedRequest:
    """One request of Triton's. Whoever has one begins it, and then ends it by `show` of its last row or by `fail`.

    Args:
        request: Triton's.
        aside: the thread that sends and watches.
        tokens: of the server.

    Attributes:
        tickets: one for each row, in their order; none before `begin`.
    """

    def __init__(self, request: Any, aside: BackgroundThread, tokens: RunTokens) -> None:
        self.tickets: Sequence[Ticket] = ()
        self._request = request
        self._aside = aside
        self._tokens = tokens
        self._sender = request.get_response_sender()
        self._token = _token(request)
        self._rows: Sequence[tensor_codec.TensorRow] = ()
        self._running, self._watching = ExitStack(), ExitStack()
        self._ended = False

    def begin(self, service: Service, meter: MetricsRecorder) -> bool:
        """Looks at every row before the first runs, and watches the client from then on.

        Returns whether there is something to draw; the client is told otherwise.
        """
        try:
            if self._token:
                self._running.enter_context(self._tokens.running(self._token))
            self._rows = _read_rows(self._request, service, meter)
            runs = [service.request(row.values) for row in self._rows]
            if self._token:
                tensor_codec.check_one_tensor(self._rows, runs)
            allowed = timeout_of(self._request)
            deadline = time.monotonic() + allowed / 1e6 if allowed else None
            cancelled = self._watching.enter_context(self._aside.watching(self._gone)).is_set
            self.tickets = [Ticket(run, self._observer(row), cancelled, deadline) for row, run in enumerate(runs)]
            if len(runs) == 1:  # of several, one alone does not end the request
                self.tickets = [replace(self.tickets[0], left=self.fail)]
        except Exception as error:
            self.fail(error)
            return False
        return True

    @property
    def only(self) -> Request | None:
        """The row's request where there is one alone, for which somebody waits; others may be drawn with it."""
        if len(self.tickets) != 1:
            return None
        try:
            self.tickets[0].check()
        except HidiffError:
            return None
        return self.tickets[0].request

    def draw(self, service: Service) -> None:
        """Makes the pictures of all rows in their order, and tells the client of each."""
        try:
            for row, result in enumerate(service.results(self.tickets)):
                self.show(row, result)
        except Exception as error:
            self.fail(error)

    def show(self, row: int, result: Result) -> None:
        """Sends a row's pictures; with the last row, the request ends."""
        message = answer(tensor_codec.finished(row, result, self._rows[row].output))
        if row < len(self._rows) - 1:
            self._aside.do(partial(self._sender.send, message))
        else:
            self._end(message)

    def fail(self, error: Exception) -> None:
        """Tells the client why there are no more pictures."""
        message, kind = told(error)
        self._end(answer(tensor_codec.failed(message, kind)) if self._token else refusal(message, kind))

    def _end(self, response: Any) -> None:
        """Sends the last response, behind all progress and metrics; nothing where one was sent already."""
        if self._ended:
            return
        self._ended = True
        self._watching.close()
        self._aside.do(partial(send_last, self._sender, response))
        self._running.close()

    def _gone(self) -> bool:
        cancelled: bool = self._sender.is_cancelled()
        return cancelled or (self._token is not None and self._tokens.cancelled(self._token))

    def _observer(self, row: int) -> Any:
        """Returns what sends a row's progress; None where the front asks, which passes none on."""
        if self._token:
            return None

        def watch(step: PictureStep) -> None:
            self._aside.do(lambda: self._sender.send(answer(tensor_codec.progress(row, step, self._rows[row]))))

        return watch


def draw_together(requests: Sequence[StreamedRequest], service: Service) -> None:
    """Makes the pictures of requests of one row each in one run, and tells each client."""
    outcomes = service.outcomes([ticket for request in requests for ticket in request.tickets])
    for request, outcome in zip(requests, outcomes, strict=True):
        try:
            if isinstance(outcome, Exception):
                request.fail(outcome)
            else:
                request.show(0, outcome)
        except Exception as error:  # of a picture's file: the others' are sent all the same
            request.fail(error)


def _read_rows(request: Any, service: Service, meter: MetricsRecorder) -> list[tensor_codec.TensorRow]:
    try:
        return tensor_codec.read_rows(tensors_of(request), service.limits)
    except InputError as error:
        meter.failed(kind_of(error))
        raise


def _token(request: Any) -> str | None:
    """Returns the front's token; anything else that a client sends by that name is none."""
    found = json.loads(request.parameters()).get(TOKEN)
    return found if RunTokens.valid(found) else None
