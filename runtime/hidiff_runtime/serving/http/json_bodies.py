"""Bodies of JSON: looked at before they are parsed, and parsed beside the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request

from hidiff_runtime.serving.http.errors import ApiError

BETWEEN = 2**16
"""Bytes between the texts of a body: no field needs more than a number there, while each byte may become an object."""

CONTAINERS = 64
"""Lists and objects in a body. A request is one object; fields that hold others are refused, by their names."""

QUOTES = 100_000
"""Quotes in a body, those that are escaped included."""

ESCAPES = 2_000_000
"""Backslashes in a body. Some encoders write each slash of base64 as two characters: one in 64 is one."""

EXAMPLE = 'send an object such as {"prompt": "a lighthouse"}.'

_READER = ThreadPoolExecutor(1, thread_name_prefix="hidiff-json")
"""One body is parsed at a time, since for a moment it takes its size several times."""


async def read_object(request: Request) -> dict[str, Any]:
    """The object that a request's body is.

    Raises:
        ApiError: it is not JSON, no object, or is made of more than a request can be.
    """
    content = bytearray()
    async for piece in request.stream():
        content += piece
    return await asyncio.get_running_loop().run_in_executor(_READER, parse, content)


def parse(content: bytearray) -> dict[str, Any]:
    """Returns the object that this is; empties the content. Raises ApiError for anything else."""
    try:
        _check(content)
        text = content.decode("utf-8-sig")
        content.clear()
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise _refused(f"The body is not JSON ({error.msg}, character {error.pos}): {EXAMPLE}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, or a number of thousands of digits
        raise _refused(f"The body is not JSON that can be read: {EXAMPLE}") from error
    if not isinstance(found, dict):
        names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
        raise _refused(f"The body must be a JSON object, not {names.get(type(found), 'a number')}: {EXAMPLE}")
    return found


def _check(content: bytearray) -> None:
    """Refuses what would take long to parse, during which nobody else is answered, or much memory.

    Raises:
        ApiError: it is made of too many parts.
    """
    quotes, escapes = content.count(b'"'), content.count(b"\\")
    if quotes > QUOTES or escapes > ESCAPES:
        told = f"The body has {quotes} quotes and {escapes} escapes, expected at most {QUOTES} and {ESCAPES}: {EXAMPLE}"
        raise _refused(told)
    between = containers = 0
    for start, end in _outside(content):
        between += end - start
        containers += content.count(b"[", start, end) + content.count(b"{", start, end)
    if between > BETWEEN:
        raise _refused(f"The body has {between} bytes outside of its texts, expected at most {BETWEEN}: {EXAMPLE}")
    if containers > CONTAINERS:
        raise _refused(f"The body has {containers} lists and objects, expected at most {CONTAINERS}: {EXAMPLE}")


def _outside(content: bytearray) -> Iterator[tuple[int, int]]:
    """Yields where the content is that is outside of texts, each from its first byte to behind its last."""
    start = 0
    while (begin := content.find(b'"', start)) >= 0:
        yield start, begin
        end = content.find(b'"', begin + 1)
        while end >= 0 and _escaped(content, end):
            end = content.find(b'"', end + 1)
        if end < 0:
            return
        start = end + 1
    yield start, len(content)


def _escaped(content: bytearray, place: int) -> bool:
    """Returns whether an odd number of backslashes stands before a place."""
    first = place
    while content[first - 1] == 0x5C:
        first -= 1
    return (place - first) % 2 == 1


def _refused(told: str) -> ApiError:
    return ApiError(400, told, code="invalid_json")
