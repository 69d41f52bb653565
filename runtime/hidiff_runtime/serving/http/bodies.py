"""Bodies of requests: how large one may be, how long it may take, and how much memory all may have together."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hidiff_runtime.serving.http.errors import SERVER, ApiError
from hidiff_runtime.serving.metrics import Meter

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


class Budget:
    """Counts the bytes of all bodies.

    Args:
        together: bytes there may be.
    """

    def __init__(self, together: int) -> None:
        self._together = together
        self._taken = 0

    def has(self, count: int) -> bool:
        """Whether there is room for this many bytes more."""
        return self._taken + count <= self._together

    def take(self, count: int) -> None:
        """Counts bytes that came."""
        self._taken += count

    def give(self, count: int) -> None:
        """Counts bytes that are gone."""
        self._taken -= count


class Bodies:
    """ASGI middleware that hands out bodies within their limits.

    Args:
        app: the application.
        largest: bytes of a body.
        limits: of time, and of all bodies together.
        meter: told of what finds no room.
    """

    def __init__(self, app: ASGIApp, largest: int, limits: BodyLimits, meter: Meter) -> None:
        self._app = app
        self._largest = largest
        self._seconds = limits.seconds
        self._meter = meter
        self._budget = Budget(limits.together)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Calls the application with a body that ends in an error where it passes a limit."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = Body(receive, self)
        try:
            await self._app({**scope, _BODY: body}, body.receive, send)
        finally:
            body.release()

    def check(self, before: int, size: int) -> None:
        """Counts what came of a body.

        Args:
            before: bytes that had come.
            size: bytes that have come now.

        Raises:
            ApiError: it is too large, or there is no room for it.
        """
        if size > self._largest:
            raise too_large(self._largest)
        more = _counted(size) - _counted(before)
        if not self._budget.has(more):
            self._meter.failed("busy")
            told = "The server is receiving as much as it can hold: ask again later."
            raise ApiError(503, told, kind=SERVER, code="too_busy", headers={"Retry-After": "2"})
        self._budget.take(more)

    def release(self, size: int) -> None:
        """Counts that a body of this size is gone."""
        self._budget.give(_counted(size))

    @property
    def seconds(self) -> float:
        """In which a body must have come."""
        return self._seconds


class Body:
    """One request's body, while it comes and while its content is kept.

    Args:
        receive: of the request.
        bodies: what counts it.
    """

    def __init__(self, receive: Receive, bodies: Bodies) -> None:
        self._receive = receive
        self._bodies = bodies
        self._end = time.monotonic() + bodies.seconds
        self._size = 0
        self._whole = False

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
        size = self._size + len(message.get("body", b""))
        self._bodies.check(self._size, size)
        self._size = size
        self._whole = not message.get("more_body", False)
        return message

    def release(self) -> None:
        """Says that nothing of it is kept any longer. Does nothing the second time."""
        size, self._size = self._size, 0
        if size:
            self._bodies.release(size)


def release_body(scope: Scope) -> None:
    """Says that nothing of a request's body is kept any longer."""
    body: Body | None = scope.get(_BODY)
    if body is not None:
        body.release()


def too_large(largest: int) -> ApiError:
    """The error for a body that is too large."""
    return ApiError(413, f"The body is too large: this server takes up to {largest} bytes.", code="too_large")


def _counted(size: int) -> int:
    return max(0, size - SMALL)
