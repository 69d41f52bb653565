"""Connections: how many there may be, and how long each may keep the server waiting for its client."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from hidiff_runtime.serving.http.errors import ApiError, unavailable

log = logging.getLogger(__name__)

LARGEST_HEAD = 2**14
"""Bytes of a request's head that has not ended; what comes at once may be more."""

PIECES, PIECE_BYTES = 10_000, 64
"""A body of more pieces than this must have them of this size on average: each costs the event loop as much as a
request's head, and chunks of one byte would keep it from all else."""


@dataclass(frozen=True)
class ConnectionLimits:
    """What connections may cost.

    Args:
        most: connections at once.
        head_seconds: in which a request's head must have come.
        idle_seconds: that a connection may stay open between requests, and that the rest of a body is waited for whose
            request has been answered already.
        send_seconds: in which a client must take something of its answer.
    """

    most: int = 512
    head_seconds: float = 10
    idle_seconds: int = 5
    send_seconds: float = 60


class ConnectionStage(Enum):
    """What a connection waits for."""

    HEAD = "the client: for a request, or for the rest of its head"
    BODY = "the client: for the rest of a request's body"
    UNREAD = "the client: for the rest of a body that nobody reads, so that the answer before it is not lost"
    ANSWER = "the server"


class ConnectionSlots:
    """The connections that there are; where there is none left, those go that wait for their clients."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._freed = asyncio.Event()
        self._waiting: dict[ConnectionStage, dict[Connection, None]] = {stage: {} for stage in ConnectionStage}

    async def take(self) -> None:
        """Takes a place; waits for one while all connections wait for the server."""
        while self._taken >= self._most:
            log.warning(
                "All %d places for connections are taken (--connections): those that have waited longest for their "
                "clients are closed.",
                self._most,
            )
            await self.make_room()
        self._taken += 1

    async def make_room(self) -> None:
        """Closes the connection that has waited longest for its client, and waits until some connection has ended."""
        self._freed.clear()
        self._close_longest()
        await self._freed.wait()

    def give(self) -> None:
        """Gives a place back."""
        self._taken -= 1
        self._freed.set()

    def _close_longest(self) -> None:
        """Looks for those that wait for a head first, then for a body."""
        for stage in (ConnectionStage.UNREAD, ConnectionStage.HEAD, ConnectionStage.BODY):
            for connection in self._waiting[stage]:
                connection.give_up()
                return

    def move(self, connection: Connection, before: ConnectionStage | None, after: ConnectionStage | None) -> None:
        """Notes what a connection waits for now; None before it is made, and after it is lost."""
        if before is not None:
            self._waiting[before].pop(connection, None)
        if after is not None:
            self._waiting[after][connection] = None


class Parser(h11.Connection):
    """Reads HTTP, but no body that comes in crumbs."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, LARGEST_HEAD)
        self._pieces = self._bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Returns the next event. Raises h11.RemoteProtocolError for what is not HTTP, or comes in crumbs."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._pieces = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._pieces += 1
            self._bytes += len(event.data)
            if self._pieces > PIECES and self._bytes < self._pieces * PIECE_BYTES:
                raise h11.RemoteProtocolError("a body of too many pieces")
        return event


class Connection(H11Protocol):
    """A connection that ends where its client keeps it waiting for too long.

    Uvicorn ends what idles between requests. A head that does not end, a body that nobody reads any more and an answer
    that nobody takes would stay for good.

    Args:
        config: of the server.
        server_state: of the server.
        app_state: of the application.
        places: told what the connection waits for.
        limits: how long it may.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        places: ConnectionSlots,
        limits: ConnectionLimits,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self.conn = Parser()
        self._places = places
        self._limits = limits
        self._stage: ConnectionStage | None = None
        self._waiting: asyncio.TimerHandle | None = None
        self._sending: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first head."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that an answer of any size that nobody takes is noticed
        self._enter(ConnectionStage.HEAD)
        self._wait(self._limits.head_seconds)

    def data_received(self, data: bytes) -> None:
        """Reads what came."""
        super().data_received(data)
        self._look()
        if self._stage is ConnectionStage.HEAD and self._waiting is None:
            self._wait(self._limits.head_seconds)

    def on_response_complete(self) -> None:
        """Waits for the next request, or for the rest of a body that was not read."""
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Gives the place back."""
        super().connection_lost(exc)
        self._enter(None)
        self._stop_watching()
        self._places.give()

    def pause_writing(self) -> None:
        """Begins to look whether the client takes something of its answer."""
        super().pause_writing()
        self._stop_watching()
        self._sending = self.loop.call_soon(self._watch_sending, None)  # once all of this piece is in the buffer

    def resume_writing(self) -> None:
        """Goes on once all has been taken."""
        super().resume_writing()
        self._stop_watching()

    def shutdown(self) -> None:
        """Ends what waits for its client; the server waits for the others."""
        if self._stage is ConnectionStage.BODY:
            self.give_up("The server is stopping: ask again.")
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's own words
        """Says that this is no HTTP, unless an answer has begun; closes either way."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            told = "The request is not HTTP that can be read, or its body comes in too many too small pieces."
            self._answer(ApiError(400, told, code="invalid_http"))
            self.transport.close()
        else:
            self.transport.abort()

    def give_up(self, reason: str = "The server has no place for this request: ask again later.") -> None:
        """Closes the connection at once, with an error where a request's body was coming."""
        if self._stage is ConnectionStage.BODY:
            self._answer(unavailable(reason, "too_busy"))
        self.transport.abort()

    def _look(self) -> None:
        """Notes what the connection waits for now, and for how long it may."""
        stage = self._find_stage()
        if stage is self._stage:
            return
        self._enter(stage)
        if stage is ConnectionStage.UNREAD:
            self._wait(self._limits.idle_seconds)

    def _find_stage(self) -> ConnectionStage:
        if self.cycle is None or self.conn.their_state is h11.IDLE:
            return ConnectionStage.HEAD
        if self.conn.their_state is not h11.SEND_BODY:
            return ConnectionStage.ANSWER
        if self.cycle.response_complete:
            return ConnectionStage.UNREAD
        return ConnectionStage.ANSWER if self.cycle.response_started else ConnectionStage.BODY

    def _enter(self, stage: ConnectionStage | None) -> None:
        self._places.move(self, self._stage, stage)
        self._stage = stage
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _wait(self, seconds: float) -> None:
        self._waiting = self.loop.call_later(seconds, self._end_waiting)

    def _end_waiting(self) -> None:
        """Says why where half a head has come, and closes."""
        if self._stage is ConnectionStage.HEAD and self.conn.trailing_data[0]:
            told = f"The request's head did not come within {self._limits.head_seconds:g} seconds."
            self._answer(ApiError(408, told, code="too_slow"))
        self.transport.abort()

    def _answer(self, error: ApiError) -> None:
        """Sends an error in the application's stead, which is told that the client has gone away."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        answer = error.response()
        answer.headers["connection"] = "close"
        reason = HTTPStatus(error.status).phrase.encode()
        events = (
            h11.Response(status_code=error.status, headers=answer.raw_headers, reason=reason),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")

    def _watch_sending(self, before: int | None) -> None:
        """Closes the connection where nothing was taken since there were `before` bytes left; looks again later."""
        left = self.transport.get_write_buffer_size()
        if before is not None and left >= before:
            self.transport.abort()
        else:
            self._sending = self.loop.call_later(self._limits.send_seconds, self._watch_sending, left)

    def _stop_watching(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
