"""Streams end what they show, however they end themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from hidiff_runtime.serving.http.sse import EventStream, comment, event


async def lines() -> AsyncGenerator[str, None]:
    yield comment("accepted")
    yield event("done", {"text": "two\nlines"})


async def send_to(client: list[dict[str, Any]], stream: EventStream, *, leaves: bool) -> None:
    async def receive() -> dict[str, Any]:
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        client.append(message)
        if leaves:
            await asyncio.Event().wait()  # it takes no more

    await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)


def test_a_stream_ends_after_its_last_line() -> None:
    ended, client = [], list[dict[str, Any]]()
    asyncio.run(send_to(client, EventStream(lines(), lambda: ended.append(1)), leaves=False))
    body = b"".join(message.get("body", b"") for message in client)
    assert body == b': accepted {}\n\nevent: done\ndata: {"type": "done", "text": "two\\nlines"}\n\n'
    assert ended == [1]


def test_a_stream_to_a_client_that_has_left_ends_though_it_never_began() -> None:
    ended, client = [], list[dict[str, Any]]()
    asyncio.run(send_to(client, EventStream(lines(), lambda: ended.append(1)), leaves=True))
    assert [message["type"] for message in client] == ["http.response.start"]
    assert ended == [1]
