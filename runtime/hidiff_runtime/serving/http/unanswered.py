"""How requests end that come to no answer, and requests for an answer's head alone."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hidiff_runtime.serving.http.errors import SERVER, ApiError


class UnansweredRequests:
    """ASGI middleware, the outermost: what is nobody's fault is no fault in the log.

    It takes ``HEAD`` for ``GET`` at every address (uvicorn leaves the body out), passes over clients that go away while
    their body comes, and answers requests that are cancelled, as the server does when it stops.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Calls the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def tell(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        seen = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self._app(seen, receive, tell)
        except ClientDisconnect:
            return
        except asyncio.CancelledError:
            if not started:
                error = ApiError(503, "The server has stopped: ask again.", kind=SERVER, code="stopped")
                await error.response()(scope, receive, send)
