"""Answers that stay open: server-sent events, and cancelling when the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from hidiff_runtime.errors import Cancelled

Found = TypeVar("Found")


class EventStream(StreamingResponse):
    """Sends what a generator gives.

    Args:
        lines: server-sent events, whole.
        end: called in the end, however that comes: a generator that never began would not notice.
    """

    def __init__(self, lines: AsyncGenerator[str, None], end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the end, or until the client goes away."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


def event(name: str, data: dict[str, Any]) -> str:
    """Returns a server-sent event; its data carry its name too, as OpenAI's do."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"


def comment(name: str, data: dict[str, Any] | None = None) -> str:
    """Returns a comment: clients that do not know it, OpenAI's among them, pass over it."""
    return f": {name} {json.dumps(data or {})}\n\n"


async def while_connected(request: Request, work: Coroutine[Any, Any, Found]) -> Found:
    """What the work gives; cancelled when the client goes away.

    Raises:
        Cancelled: the client went away.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("The client went away.")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait((working, leaving))


async def _gone(request: Request) -> None:
    """Returns when the client has gone away; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
