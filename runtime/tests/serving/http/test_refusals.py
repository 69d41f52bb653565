"""What is refused: every answer is an error of OpenAI's form, without paths or tracebacks, and nothing was run."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from http_server import GENERATIONS, LARGEST, PATIENCE, PROMPT, Server, data_url, png, proven, refused, serving, until

from hidiff_runtime.pipeline.request_values import Limits
from hidiff_runtime.serving.http.request_bodies import BodyLimits

EDITS = "/v1/images/edits"
LIMITS = Limits(prompt_characters=50, image_bytes=20_000, image_pixels=5000, steps=8, pictures=3)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(proven(tmp_path_factory.mktemp("refusals") / "bundle"), limits=LIMITS) as started:
        yield started


RAW = {
    "nothing": b"",
    "no JSON": b"prompt=a",
    "half of it": b'{"prompt": "a',
    "a list": b'["a"]',
    "a text": b'"a"',
    "a number": b"3",
    "null": b"null",
    "no text": b"\xff\xfe\x00",
    "broken UTF-8": b'{"prompt": "\xc3\x28"}',
    "deep nesting": b"[" * 50_000,
    "deep nesting in a field": b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "a number without an end": b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
    "two values": b'{"prompt": "a"} {"prompt": "b"}',
    "a comment": b'{"prompt": "a"} // b',
}

# What any layer refuses is tested where its rule is: test_serving_fields.py and test_pipeline.py. Of these there is one
# of each kind here, beside what JSON and OpenAI's fields bring.
FIELDS: dict[str, dict[str, Any]] = {
    "no prompt": {},
    "an empty prompt": {"prompt": ""},
    "a prompt that is null": {"prompt": None},
    "a prompt that is a number": {"prompt": 5},
    "a prompt of half a character": {"prompt": "\ud800"},
    "an image of half a character": {"image": "data:image/png;base64,\ud800AAA"},
    "an unknown field of half a character": {"\ud800": 1},
    "a model of half a character": {"model": "\ud800"},
    "a size of half a character": {"size": "\ud800"},
    "a prompt too long": {"prompt": "a" * 51},
    "no pictures": {"n": 0},
    "fewer than no pictures": {"n": -1},
    "too many pictures": {"n": 4},
    "far too many pictures": {"n": 10**30},
    "half a picture": {"n": 1.5},
    "pictures as text": {"n": "2"},
    "another size": {"size": "1024x1024"},
    "a size that is a number": {"size": 64},
    "a size that is a path": {"size": "/etc/passwd"},
    "a URL": {"response_format": "url"},
    "an animation": {"output_format": "gif"},
    "a format of nobody": {"output_format": "tiff"},
    "quality": {"quality": "high"},
    "style": {"style": "vivid"},
    "compression": {"output_compression": 80},
    "transparency": {"background": "transparent"},
    "another model": {"model": "gpt-image-1"},
    "a model that is a number": {"model": 1},
    "streaming as text": {"stream": "yes"},
    "previews without an end": {"partial_images": 10**9},
    "fewer than no previews": {"partial_images": -1},
    "an unknown field": {"colour": "red"},
    "an unknown field that is a path": {"/etc/passwd": 1},
    "a field of Python's": {"__class__": "x"},
    "a field of pydantic's": {"model_config": {}, "model_extra": {}},
    "too many steps": {"steps": 9},
    "steps that are no number": {"steps": float("nan")},
    "a seed below that of a random one": {"seed": -2},
    "a seed beyond the last": {"seed": 2**70},
    "seeds that go beyond the last": {"seed": 2**64 - 1, "n": 2},
    "a sampler that is a path": {"sampler": "../../etc/passwd"},
    "an image that is a path": {"image": "/etc/passwd"},
    "an image that is another server's": {"image": "http://127.0.0.1/secret.png"},
    "an image that is none": {"image": data_url(b"no picture")},
    "an image cut short": {"image": data_url(png()[:-20])},
    "an image of too many bytes": {"image": data_url(b"x" * 20_001)},
    "an image with holes": {"image": data_url(png(0, mode="RGBA"))},
    "an image that is a list": {"image": [data_url(png())]},
}


@pytest.mark.parametrize("name", RAW)
def test_refuses_what_is_no_body(server: Server, name: str) -> None:
    refused(server.ask("POST", GENERATIONS, RAW[name], content_type="application/json"), 400)


STREAMED = ("an empty prompt", "a prompt of half a character", "too many pictures", "an unknown field", "another model")


@pytest.mark.parametrize(
    ("name", "stream"), [*((name, False) for name in FIELDS), *((name, True) for name in STREAMED)]
)
def test_refuses(server: Server, name: str, stream: bool) -> None:
    before = server.count("hidiff_pictures_total")
    given = {"prompt": PROMPT, "steps": 4, **FIELDS[name]} if FIELDS[name] else {"steps": 4}
    answer = server.post({"stream": stream, **given} if stream else given)
    refused(answer, 404 if "model" in given and isinstance(given["model"], str) else 400)
    assert server.count("hidiff_pictures_total") == before


def test_what_is_at_the_limits_is_taken(server: Server) -> None:
    given = {"prompt": "a" * 50, "steps": 8, "n": 3, "seed": 2**64 - 3, "image": data_url(png()), "strength": 1.0}
    assert server.post(given).status == 200


def test_names_the_parameter_that_is_unknown(server: Server) -> None:
    answer = server.post({"prompt": PROMPT, "colour": None})
    assert "negative_prompt" in refused(answer, 400, "unknown_parameter")
    assert answer.json["error"]["param"] == "colour"


def test_counts_each_refusal_once(server: Server) -> None:
    asked: list[dict[str, Any]] = [
        {"prompt": ""},
        {"prompt": PROMPT, "n": "2"},
        {"prompt": PROMPT, "style": "vivid"},
        {"prompt": PROMPT, "colour": "red"},
        {"prompt": PROMPT, "steps": 4, "seed": 2**64 - 1, "n": 2},
        {"prompt": PROMPT, "image": data_url(b"no picture")},
    ]
    before = server.count("hidiff_failures_total", kind="input")
    for values in asked:
        refused(server.post(values), 400)
    refused(server.ask("POST", GENERATIONS, b"{", content_type="application/json"), 400)
    refused(server.ask("POST", EDITS, b"{", content_type="application/json"), 400)
    refused(server.ask("POST", EDITS, b"", content_type="multipart/form-data"), 400)
    assert server.count("hidiff_failures_total", kind="input") == before + len(asked) + 3


OPENAIS: dict[str, tuple[Any, str]] = {
    "style": ("vivid", "describe the style in the prompt"),
    "input_fidelity": ("low", "give strength"),
    "complexity": ("high", "give steps"),
    "markup": ("a", "give a mask"),
    "frame_count": (4, "leave frame_count out"),
    "frame_duration_ms": (100, "leave frame_duration_ms out"),
    "svg": ({"model": "a"}, "leave svg out"),
    "response_format": ("url", "'b64_json'"),
    "output_format": ("svg", "'png' or 'jpeg' or 'webp'"),
    "background": ("transparent", "'auto' or 'opaque'"),
    "quality": ("hd", "steps"),
}


@pytest.mark.parametrize("name", OPENAIS)
def test_says_what_is_openais_and_what_to_do_instead(server: Server, name: str) -> None:
    value, advice = OPENAIS[name]
    answer = server.post({"prompt": PROMPT, "steps": 4, name: value})
    message = refused(answer, 400)
    assert message.startswith(name)
    assert "OpenAI's" in message
    assert advice in message
    assert (answer.json["error"]["param"], answer.json["error"]["code"][:12]) == (name, "unsupported_")
    assert server.post({"prompt": PROMPT, "steps": 4, name: None}).status == 200


TOLD: dict[str, tuple[dict[str, Any], str]] = {
    "quality": ({"quality": "best"}, "quality must be 'auto' or 'standard': give one of these, or leave quality out."),
    "moderation": (
        {"moderation": "high"},
        "moderation must be 'auto' or 'low': give one of these, or leave moderation out.",
    ),
    "compression": (
        {"output_compression": 80},
        "output_compression is for jpeg and webp, a PNG file is whole: leave it out, or give output_format.",
    ),
    "too little compression": ({"output_compression": 101}, "output_compression must be 100 or less."),
    "n": ({"n": 1.5}, "n must be a whole number."),
    "too many": ({"n": 4}, "This server makes up to 3 pictures a request: give n up to that."),
    "stream": ({"stream": "yes"}, "stream must be true or false."),
    "size": (
        {"size": "1024x1024"},
        "The bundle has no such width and height. Use one that it has: 64x48. 'hidiff-export add' adds one.",
    ),
    "a seed": (
        {"seed": -2},
        "seed must be a whole number from 0 to 2**64 - 1, or -1 for a random one. Given: -2. "
        "18446744073709551614 is the same seed.",
    ),
    "a large seed": (
        {"seed": 2**64},
        "seed must be a whole number from 0 to 2**64 - 1, or -1 for a random one. Given: 18446744073709551616. "
        "Give one of these.",
    ),
    "seeds": (
        {"seed": 2**64 - 1, "n": 2},
        "The seeds of 2 pictures follow each other, to at most 2**64 - 1: give a smaller seed.",
    ),
    "a guidance scale": (
        {"guidance_scale": 1e39},
        "guidance_scale must be a number from -1000 to 1000. Given: 1e+39. Give 7.5, say.",
    ),
    "a model": ({"model": "dall-e-3"}, "There is no model 'dall-e-3' here: give 'sd15', which is all there is."),
}


@pytest.mark.parametrize("name", TOLD)
def test_says_what_to_do(server: Server, name: str) -> None:
    given, message = TOLD[name]
    answer = server.post({"prompt": PROMPT, "steps": 4, **given})
    assert refused(answer, 404 if "model" in given else 400) == message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON (Expecting value, character 0)"),
        (b'{"prompt": "a",}', "not JSON ("),
        (b'["a"]', "not a list"),
        (b'"a"', "not text"),
        (b"3", "not a number"),
        (b"true", "not true or false"),
        (b"null", "not null"),
        (b"\xff\xfe\x00", "not JSON that can be read"),
    ],
)
def test_says_that_a_body_is_an_object_and_shows_one(server: Server, body: bytes, words: str) -> None:
    message = refused(server.ask("POST", GENERATIONS, body, content_type="application/json"), 400, "invalid_json")
    assert words in message
    assert message.endswith('send an object such as {"prompt": "a lighthouse"}.')


def test_refuses_parameters_behind_the_address(server: Server) -> None:
    for path in (GENERATIONS, EDITS):
        answer = server.post({"prompt": PROMPT, "steps": 4}, f"{path}?seed=3")
        message = refused(answer, 400, "unknown_parameter")
        assert message == "'seed' stands behind the address: send it in the body, where parameters are."
        assert answer.json["error"]["param"] == "seed"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", GENERATIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/docs", 404),
        ("POST", "/", 405),
        ("POST", "/images/generations", 404),
        ("POST", "/v1/chat/completions", 404),
        ("DELETE", "/v1/models/sd15", 405),
    ],
)
def test_refuses_other_ways(server: Server, method: str, path: str, status: int) -> None:
    message = refused(server.ask(method, path), status, {404: "not_found", 405: "method_not_allowed"}[status])
    assert "POST /v1/images/generations" in message


def test_describes_the_body_for_programs(server: Server) -> None:
    operation = server.get("/openapi.json").json["paths"][GENERATIONS]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert {"n", "size", "output_format", "output_compression"} <= schema["properties"].keys()


def test_says_where_variations_are(server: Server) -> None:
    message = refused(server.ask("POST", "/v1/images/variations", b"", content_type="multipart/form-data"), 404)
    assert "/v1/images/edits" in message


@pytest.mark.parametrize("name", ["other", "a/b", "a%2Fb"])
def test_names_the_model_there_is(server: Server, name: str) -> None:
    assert "'sd15'" in refused(server.get(f"/v1/models/{name}"), 404, "model_not_found")


def test_refuses_a_body_that_no_page_needs_leave_to_send(server: Server) -> None:
    body = json.dumps({"prompt": PROMPT, "steps": 4}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=cut"):
        answer = server.ask("POST", GENERATIONS, body, content_type=kind)
        assert "Content-Type: application/json" in refused(answer, 400, "invalid_content_type")
    refused(server.ask("POST", GENERATIONS, body), 400, "invalid_content_type")
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        assert server.ask("POST", GENERATIONS, body, content_type=kind).status == 200


def test_refuses_a_body_that_is_too_large_before_it_comes(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {LARGEST + 1}\r\n\r\n".encode())
        assert until(connection, b"\r\n").startswith(b"HTTP/1.1 413")
    answer = server.post({"prompt": "a" * LARGEST})
    refused(answer, 413, "too_large")
    assert server.post({"prompt": "a", "steps": 4}).status == 200


def test_refuses_a_body_that_grows_too_large(server: Server) -> None:
    chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(LARGEST // 0x10000 + 1):
            connection.sendall(chunk)
        answer = until(connection, b'"too_large"')
    assert answer.startswith(b"HTTP/1.1 413")


def test_refuses_a_body_that_does_not_come(server: Server) -> None:
    with (
        serving(server.folder, bodies=BodyLimits(seconds=0.2)) as hasty,
        socket.create_connection(("127.0.0.1", hasty.port), timeout=PATIENCE) as connection,
    ):
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        answer = until(connection, b'"too_slow"')
    assert answer.startswith(b"HTTP/1.1 408")
