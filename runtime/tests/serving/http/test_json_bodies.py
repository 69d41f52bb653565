"""JSON bodies: what is refused before it is parsed, and that others are answered meanwhile."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from http_server import PATIENCE, PROMPT, proven, serving

from hidiff_runtime.serving.http import json_bodies
from hidiff_runtime.serving.http.errors import ApiError
from hidiff_runtime.serving.http.json_bodies import BETWEEN, CONTAINERS, ESCAPES, QUOTES, parse

REFUSED = {
    "lists": (b"[" + b"[]," * CONTAINERS + b"[]]", f"{CONTAINERS + 2} lists and objects, expected at most"),
    "nested lists": (b'{"a": ' + b"[" * CONTAINERS + b"]" * CONTAINERS + b"}", "lists and objects, expected at most"),
    "nested objects": (b'{"a": ' * 65 + b"1" + b"}" * 65, "65 lists and objects, expected at most"),
    "objects that end nowhere": (b"{" * 1000, "1000 lists and objects, expected at most"),
    "numbers": (b"[" + b"1," * (BETWEEN // 2) + b"1]", "bytes outside of its texts, expected at most"),
    "one long number": (b'{"seed": ' + b"1" * BETWEEN + b"}", "bytes outside of its texts, expected at most"),
    "white space": (b" " * (BETWEEN + 1) + b"{}", f"{BETWEEN + 3} bytes outside of its texts"),
    "quotes": (b'{"a": "' + b'\\"' * QUOTES + b'"}', f"{QUOTES + 4} quotes"),
    "escapes": (b'{"a": "' + b"\\n" * (ESCAPES + 1) + b'"}', f"{ESCAPES + 1} escapes"),
    "lists behind a text that seems to end late": (b'{"a": "\\\\", "b": ' + b"[" * 65, "66 lists and objects"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_has_more_parts_than_a_request(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content, told = REFUSED[name]
    monkeypatch.setattr(json_bodies.json, "loads", lambda _: pytest.fail("parsed"))
    with pytest.raises(ApiError) as refused:
        parse(bytearray(content))
    assert told in str(refused.value)
    assert '{"prompt": "a lighthouse"}' in str(refused.value)
    assert (refused.value.status, refused.value.body["error"]["code"]) == (400, "invalid_json")


TAKEN: dict[str, Any] = {
    "a request": {"prompt": "a", "seed": 1, "image": "data:image/png;base64," + "A" * 100_000},
    "brackets in a text": {"prompt": "[{" * 1000, "user": ", " * 100_000},
    "quotes in a text": {"prompt": '"[' * 100, "user": "\\" * 101},
    "backslashes at an end": {"prompt": "\\", "negative_prompt": '\\"', "user": '\\\\"[[['},
    "other alphabets": {"prompt": "ein Fuß 🗼", "user": "\u2028"},
    "nothing": {},
}


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("name", TAKEN)
def test_takes_what_is_a_request(name: str, ascii_only: bool) -> None:
    assert parse(bytearray(json.dumps(TAKEN[name], ensure_ascii=ascii_only).encode())) == TAKEN[name]


def test_takes_indented_json_with_a_byte_order_mark() -> None:
    assert parse(bytearray(b"\xef\xbb\xbf" + json.dumps({"a": [1, {"b": None}]}, indent=8).encode()))


def test_keeps_nothing_of_the_body_while_it_is_parsed() -> None:
    content = bytearray(b'{"a": "b"}')
    parse(content)
    assert content == b""


def test_others_are_answered_while_a_body_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait(content: bytearray) -> dict[str, Any]:
        begun.set()
        assert go_on.wait(PATIENCE)
        return parse(content)

    monkeypatch.setattr(json_bodies, "parse", wait)
    with serving(proven(tmp_path / "bundle")) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.post, {"prompt": PROMPT, "steps": 4})
        assert begun.wait(PATIENCE)
        assert server.get("/health/live").status == 200
        assert not asked.done()
        go_on.set()
        assert asked.result().status == 200
