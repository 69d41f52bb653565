"""Bodies of requests: how large one may be, how long it may take, and how much memory all may have together."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hidiff_runtime.serving.http.errors import ApiError, unavailable
from hidiff_runtime.serving.metrics import MetricsRecorder

SMALL = 2**16
"""Bytes of each body that are not counted: about what a connection buffers anyway. So a prompt is always taken."""

_BODY = "hidiff.body"
"""A request's `Body` in its ASGI scope."""


@dataclass(frozen=True)
class BodyLimits:
    """What bodies may cost.

    Args:
        seconds: in which a body must have come.
        together: bytes of all bodies that are being received, or whose content is still kept.
    """

    seconds: float = 60
    together: int = 256 * 2**20


class Bodies:
    """ASGI middleware that hands out bodies within their limits.

    Args:
        app: the application.
        largest: bytes of a body.
        limits: of time, and of all bodies together.
        meter: told of what finds no room.

    Attributes:
        left: bytes that all bodies may have besides those that they have.
    """

    def __init__(self, app: ASGIApp, largest: int, limits: BodyLimits, meter: MetricsRecorder) -> None:
        self._app = app
        self.largest = largest
        self.seconds = limits.seconds
        self.left = limits.together
        self._meter = meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Calls the application with a body that ends in an error where it passes a limit."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = Body(receive, self)
        try:
            await self._app({**scope, _BODY: body}, body.receive, send)
        finally:
            if body.refused:
                self._meter.failed("busy")
            body.release()


class Body:
    """One request's body, while it comes and while its content is kept.

    Args:
        receive: of the request.
        bodies: whose limits it keeps to; what it takes of them is counted, but for its first bytes.

    Attributes:
        refused: whether there was no room for it.
    """

    def __init__(self, receive: Receive, bodies: Bodies) -> None:
        self._receive = receive
        self._bodies = bodies
        self._end = time.monotonic() + bodies.seconds
        self._size = self._taken = 0
        self._whole = False
        self.refused = False

    async def receive(self) -> Message:
        """The next piece, and after the last one whatever else there is.

        Raises:
            ApiError: it is too late or too large, or there is no room for it.
        """
        if self._whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._end - time.monotonic())
        except asyncio.TimeoutError:
            told = f"The body did not come within {self._bodies.seconds:g} seconds."
            raise ApiError(408, told, code="too_slow") from None
        self._count(len(message.get("body", b"")))
        self._whole = not message.get("more_body", False)
        return message

    def release(self) -> None:
        """Says that nothing of it is kept any longer. Does nothing the second time."""
        self._bodies.left += self._taken
        self._taken = 0

    def _count(self, count: int) -> None:
        self._size += count
        if self._size > self._bodies.largest:
            raise too_large(self._bodies.largest)
        more = max(0, self._size - SMALL) - self._taken
        if more > self._bodies.left:
            self.release()
            self.refused = True
            raise unavailable("The server is receiving as much as it can hold: ask again later.", "too_busy")
        self._bodies.left -= more
        self._taken += more


def release_body(scope: Scope) -> None:
    """Says that nothing of a request's body is kept any longer."""
    body: Body | None = scope.get(_BODY)
    if body is not None:
        body.release()


def too_large(largest: int) -> ApiError:
    """Returns the error for a body that is too large."""
    return ApiError(413, f"The body is too large: this server takes up to {largest} bytes.", code="too_large")
