"""The server: uvicorn's, with a bound on connections, and an end that waits for pictures alone."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from contextlib import suppress
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from hidiff_runtime.serving.http.connections import Connection, ConnectionLimits, ConnectionSlots

log = logging.getLogger(__name__)

BACKLOG = 512
"""Connections that the system keeps until they are accepted."""

RETRY_SECONDS = 1.0
"""After which a connection is accepted again, where the system had no descriptor for one."""


class Server(uvicorn.Server):
    """Serves an application on one socket.

    It accepts connections itself, one at a time: asyncio would accept all there are before any can be counted, and goes
    on trying, a line in the log each time, where the system has no descriptor left.

    Args:
        app: the application.
        listening: the socket, which is closed in the end.
        limits: of connections.
        grace: seconds for what runs when the server is told to stop.
    """

    def __init__(self, app: ASGIApp, listening: socket.socket, limits: ConnectionLimits, grace: int) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=limits.idle_seconds,
            timeout_graceful_shutdown=grace,
        )
        super().__init__(config)
        self._listening = listening
        self._limits = limits
        self._places = ConnectionSlots(limits.most)
        self._accepting: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - it has its own
        """Starts the application, and to accept connections."""
        await super().startup(sockets=[])
        self._listening.setblocking(False)
        self._listening.listen(BACKLOG)
        self._accepting = asyncio.create_task(self._accept())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - it has its own
        """Takes no more, waits for what runs as long as the grace lasts, and ends the application.

        A second signal ends the waiting.
        """
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait((self._accepting,))
        self._listening.close()
        await super().shutdown(sockets=[])
        if self.force_exit:  # uvicorn leaves requests and application as they are
            running = list(self.server_state.tasks)
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stops at the first signal, without grace at the second, and without looking back at the third."""
        if not self.should_exit:
            super().handle_exit(sig, frame)
        elif not self.force_exit:
            self.force_exit = True
        else:
            os._exit(128 + sig)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted = await self._next()
            except OSError as error:
                log.error("No connection can be accepted (%s): the limit on open files is too low.", error)
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._places.make_room(), RETRY_SECONDS)
                continue
            try:
                await self._places.take()
                await loop.connect_accepted_socket(self._connection, accepted)
            except OSError:
                self._places.give()
                accepted.close()
            except BaseException:
                accepted.close()
                raise

    async def _next(self) -> socket.socket:
        """The next connection.

        Not by the selector loop's own ``sock_accept``: cancelled in the moment in which there is one, it tells of that
        in the log, and the connection is lost.

        Raises:
            OSError: the system has no descriptor for it.
        """
        loop = asyncio.get_running_loop()
        if sys.platform == "win32":
            return (await loop.sock_accept(self._listening))[0]
        while True:
            with suppress(BlockingIOError, InterruptedError, ConnectionError):  # another may be gone by now
                accepted, _ = self._listening.accept()
                accepted.setblocking(False)
                return accepted
            readable = asyncio.Event()
            loop.add_reader(self._listening, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(self._listening)

    def _connection(self) -> Connection:
        state = self.lifespan.state
        return Connection(self.config, self.server_state, state, places=self._places, limits=self._limits)
