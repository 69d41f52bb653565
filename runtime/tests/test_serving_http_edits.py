"""OpenAI's form with an image and a mask, and what it comes to."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import toy_pictures
from http_server import LARGEST, PROMPT, Answer, Server, data_url, events, png, proven, serving
from PIL import Image

EDITS = "/v1/images/edits"
SIZE = (toy_pictures.WIDTH, toy_pictures.HEIGHT)
ASKED = {"prompt": PROMPT, "steps": "4", "seed": "3"}
Part = str | bytes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(proven(tmp_path_factory.mktemp("edits") / "bundle")) as started:
        yield started


def send(server: Server, parts: dict[str, Part] | list[tuple[str, Part]]) -> Answer:
    body = b""
    for name, value in parts.items() if isinstance(parts, dict) else parts:
        file = '; filename="a.png"\r\nContent-Type: image/png' if isinstance(value, bytes) else ""
        content = value.encode() if isinstance(value, str) else value
        body += f'--cut\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"
    return server.ask("POST", EDITS, body + b"--cut--\r\n", content_type="multipart/form-data; boundary=cut")


def half(mode: str) -> bytes:
    """A mask of whose left half is to be painted: white for a bundle, transparent for OpenAI."""
    colours = {"L": (0, 255), "RGBA": ((9, 9, 9, 255), (9, 9, 9, 0))}[mode]
    mask = Image.new(mode, SIZE, colours[0])
    mask.paste(colours[1], (0, 0, SIZE[0] // 2, SIZE[1]))
    content = io.BytesIO()
    mask.save(content, "PNG")
    return content.getvalue()


def test_an_edit_is_a_request_with_an_image(server: Server) -> None:
    values = {"prompt": PROMPT, "steps": 4, "seed": 3, "strength": 0.5}
    expected = server.post({**values, "image": data_url(png())}).picture
    for name in ("image", "image[]"):
        answer = send(server, {**ASKED, "strength": "0.5", name: png()})
        assert np.array_equal(answer.picture, expected)
    assert not np.array_equal(send(server, {**ASKED, "strength": "0.5", "image": png(90)}).picture, expected)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_a_mask_is_white_or_transparent_where_to_paint(server: Server, mode: str) -> None:
    values = {"prompt": PROMPT, "steps": 4, "seed": 3, "image": data_url(png())}
    expected = server.post({**values, "mask": data_url(half("L"))}).picture
    assert np.array_equal(send(server, {**ASKED, "image": png(), "mask": half(mode)}).picture, expected)
    assert not np.array_equal(send(server, {**ASKED, "image": png()}).picture, expected)


def test_everything_else_is_read_from_text(server: Server) -> None:
    parts = {"n": "2", "guidance_scale": "3.5", "resize": "true", "size": "auto", "image": png(size=(16, 16))}
    first, second = send(server, {**ASKED, **parts}).json["data"]
    assert [each["parameters"]["seed"] for each in (first, second)] == [3, 4]
    assert first["parameters"]["guidance_scale"] == 3.5


def test_a_stream_has_the_names_of_edits(server: Server) -> None:
    answer = send(server, {**ASKED, "strength": "1", "image": png(), "stream": "true", "partial_images": "1"})
    names = [name for name, _ in events(answer.body) if not name.startswith(":")]
    assert names == ["image_edit.partial_image", "image_edit.completed"]


REFUSED: dict[str, Any] = {
    "no image": ASKED,
    "no prompt": {"image": png()},
    "two images": [*ASKED.items(), ("image[]", png()), ("image[]", png())],
    "an image as text": {**ASKED, "image": "/etc/passwd"},
    "an image that is none": {**ASKED, "image": b"no picture"},
    "a mask that is none": {**ASKED, "image": png(), "mask": b"no picture"},
    "a mask of another size": {**ASKED, "image": png(), "mask": png(0, (8, 8), "RGBA")},
    "a prompt as a file": {**ASKED, "prompt": b"a", "image": png()},
    "steps that are no number": {**ASKED, "steps": "many", "image": png()},
    "n that is no number": {**ASKED, "n": "two", "image": png()},
    "an unknown name": {**ASKED, "input_fidelity": "high", "image": png()},
    "files without an end": [*ASKED.items(), *((f"image{number}", png()) for number in range(5))],
    "fields without an end": [*((f"name{number}", "a") for number in range(50)), ("image", png())],
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(server: Server, name: str) -> None:
    answer = send(server, REFUSED[name])
    assert answer.status == 400
    assert answer.json["error"]["message"]
    assert "/etc" not in answer.body.decode()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data; boundary=cut"),
        (b"--cut\r\nnonsense", "multipart/form-data; boundary=cut"),
        (b"--cut\r\n", "multipart/form-data"),
        (b"{}", "application/json"),
        (b"prompt=a", "application/x-www-form-urlencoded"),
    ],
)
def test_refuses_what_is_no_form(server: Server, body: bytes, kind: str) -> None:
    answer = server.ask("POST", EDITS, body, content_type=kind)
    assert answer.status == 400
    assert answer.json["error"]["type"] == "invalid_request_error"


def test_refuses_a_form_that_is_too_large(server: Server) -> None:
    assert send(server, {**ASKED, "image": b"x" * LARGEST}).status == 413
