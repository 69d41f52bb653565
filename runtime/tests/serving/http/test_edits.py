"""OpenAI's form with an image and a mask, and what it comes to."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import toy_pictures
from http_server import EDITS, LARGEST, PROMPT, Server, data_url, events, png, proven, send, serving
from PIL import Image

SIZE = (toy_pictures.WIDTH, toy_pictures.HEIGHT)
ASKED = {"prompt": PROMPT, "steps": "4", "seed": "3"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(proven(tmp_path_factory.mktemp("edits") / "bundle")) as started:
        yield started


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


def rgba(alpha: np.ndarray) -> bytes:
    """A picture of one color that is as transparent as this."""
    pixels = np.full((*SIZE[::-1], 4), (200, 20, 30, 255), np.uint8)
    pixels[..., 3] = alpha
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def alpha(*, left: int = 255, right: int = 255) -> np.ndarray:
    found = np.full(SIZE[::-1], right, np.uint8)
    found[:, : SIZE[0] // 2] = left
    return found


def grey_alpha(found: np.ndarray) -> bytes:
    content = io.BytesIO()
    pixels = Image.merge("LA", (Image.new("L", SIZE, 99), Image.fromarray(found)))
    pixels.save(content, "PNG")
    return content.getvalue()


def key_color() -> bytes:
    """A picture without alpha, one color of which stands for transparent: its left half."""
    pixels = np.full((*SIZE[::-1], 3), (200, 20, 30), np.uint8)
    pixels[:, : SIZE[0] // 2] = (1, 2, 3)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", transparency=(1, 2, 3))
    return content.getvalue()


def flat(image: bytes) -> bytes:
    """The picture's colors without its transparency."""
    content = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGBA").convert("RGB").save(content, "PNG")
    return content.getvalue()


HOLES = {
    "a hole": rgba(alpha(left=0)),
    "a hole that is not quite transparent": rgba(alpha(left=127)),
    "a hole beside what is a little transparent": rgba(alpha(left=0, right=128)),
    "a hole in a grey picture": grey_alpha(alpha(left=0)),
    "a hole by a color": key_color(),
}


@pytest.mark.parametrize("name", HOLES)
def test_without_a_mask_the_hole_is_where_to_paint(server: Server, name: str) -> None:
    answer = send(server, {**ASKED, "image": HOLES[name]})
    values = {"prompt": PROMPT, "steps": 4, "seed": 3, "image": data_url(flat(HOLES[name]))}
    assert np.array_equal(answer.picture, server.post({**values, "mask": data_url(half("L"))}).picture)
    assert not np.array_equal(answer.picture, server.post(values).picture)
    assert answer.json["data"][0]["parameters"]["given"] == ["image", "mask"]


def test_a_hole_may_be_of_another_size_where_pictures_are_fitted(server: Server) -> None:
    small = Image.open(io.BytesIO(HOLES["a hole"])).resize((16, 16), Image.Resampling.NEAREST)
    content = io.BytesIO()
    small.save(content, "PNG")
    answer = send(server, {**ASKED, "image": content.getvalue(), "resize": "true"})
    assert answer.json["data"][0]["parameters"]["given"] == ["image", "mask"]
    refused = send(server, {**ASKED, "image": content.getvalue()})
    assert "not of the bundle's size" in refused.json["error"]["message"]


@pytest.mark.parametrize("least", [255, 254, 250])
def test_an_opaque_picture_without_a_mask_is_a_picture_to_start_from(server: Server, least: int) -> None:
    image = rgba(alpha(left=least))
    values = {"prompt": PROMPT, "steps": 4, "seed": 3, "image": data_url(flat(image))}
    answer = send(server, {**ASKED, "image": image})
    assert np.array_equal(answer.picture, server.post(values).picture)
    assert answer.json["data"][0]["parameters"]["given"] == ["image"]
    masked = send(server, {**ASKED, "image": image, "mask": half("L")})
    assert np.array_equal(masked.picture, server.post({**values, "mask": data_url(half("L"))}).picture)


def speck() -> np.ndarray:
    found = alpha()
    found[3, 3] = 0
    return found


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"image": rgba(alpha(left=0, right=0))}, "transparent everywhere"),
        ({"image": rgba(alpha(left=127, right=90))}, "transparent everywhere"),
        ({"image": rgba(alpha(left=249))}, "no hole that is large enough"),
        ({"image": rgba(alpha(left=128, right=200))}, "no hole that is large enough"),
        ({"image": rgba(speck())}, "no hole that is large enough"),
        ({"image": rgba(alpha(left=0)), "mask": half("L")}, "there is a mask too"),
    ],
)
def test_refuses_transparency_that_says_nothing(server: Server, parts: dict[str, str | bytes], words: str) -> None:
    before = server.count("hidiff_failures_total", kind="input")
    answer = send(server, {**ASKED, **parts})
    assert answer.status == 400
    assert words in answer.json["error"]["message"]
    assert server.count("hidiff_failures_total", kind="input") == before + 1


def test_an_opaque_mask_with_alpha_is_read_by_its_brightness(server: Server) -> None:
    content = io.BytesIO()
    Image.open(io.BytesIO(half("L"))).convert("RGBA").save(content, "PNG")
    answers = [send(server, {**ASKED, "image": png(), "mask": mask}) for mask in (content.getvalue(), half("L"))]
    assert np.array_equal(answers[0].picture, answers[1].picture)
    assert not np.array_equal(answers[0].picture, send(server, {**ASKED, "image": png()}).picture)


def test_empty_texts_stand_for_left_out(server: Server) -> None:
    empty = {"mask": "", "sampler": "", "n": "", "size": "", "style": "", "svg[model]": "", "negative_prompt": ""}
    answer = send(server, {**ASKED, **empty, "image": png()})
    assert np.array_equal(answer.picture, send(server, {**ASKED, "image": png()}).picture)
    told = send(server, {**ASKED, "prompt": "", "image": png()}).json["error"]["message"]
    assert "prompt is empty" in told


def test_a_seed_of_minus_one_is_a_random_one(server: Server) -> None:
    seeds = [send(server, {**ASKED, "seed": "-1", "image": png()}).json["data"][0]["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_an_edit_comes_in_the_format_that_was_asked_for(server: Server) -> None:
    parts = {"output_format": "webp", "output_compression": "50", "image": png()}
    answer = send(server, {**ASKED, **parts}).json
    picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert (picture.format, answer["output_format"]) == ("WEBP", "webp")


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
    "an unknown name": {**ASKED, "colour": "red", "image": png()},
    "files without an end": [*ASKED.items(), *((f"image{number}", png()) for number in range(5))],
    "fields without an end": [*((f"name{number}", "a") for number in range(50)), ("image", png())],
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(server: Server, name: str) -> None:
    answer = send(server, REFUSED[name])
    assert answer.status == 400
    assert answer.json["error"]["message"]
    assert "/etc" not in answer.body.decode()


TOLD: dict[str, tuple[Any, str]] = {
    "no image": (ASKED, "add a file by the name of image"),
    "an image twice": ([*ASKED.items(), ("image[]", png()), ("image[]", png())], "send one image"),
    "a seed twice": ([*ASKED.items(), ("seed", "4"), ("image", png())], "seed is there twice. Give one of them."),
    "OpenAI's field": ({**ASKED, "input_fidelity": "high", "image": png()}, "give strength"),
    "OpenAI's file": ({**ASKED, "markup": png(), "image": png()}, "give a mask"),
    "OpenAI's object": (
        [*ASKED.items(), ("svg[model]", "a"), ("svg[reasoning][effort]", "low"), ("image", png())],
        "svg is OpenAI's",
    ),
    "OpenAI's value": ({**ASKED, "quality": "high", "image": png()}, "steps"),
    "steps that are no number": ({**ASKED, "steps": "many", "image": png()}, "steps must be a whole number."),
    "resize that is neither": ({**ASKED, "resize": "perhaps", "image": png()}, "resize must be true or false."),
    "a random seed's neighbor": ({**ASKED, "seed": "-2", "image": png()}, "or -1 for a random one"),
    "a mask of no bytes": ({**ASKED, "image": png(), "mask": b""}, "no picture that can be read"),
}


@pytest.mark.parametrize("name", TOLD)
def test_says_what_to_do(server: Server, name: str) -> None:
    parts, words = TOLD[name]
    answer = send(server, parts)
    assert answer.status == 400
    assert words in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data; boundary=cut"),
        (b"--cut\r\nnonsense", "multipart/form-data; boundary=cut"),
        (b"--cut\r\n", "multipart/form-data"),
        (b"{}", "application/json"),
        (b"", "text/plain"),
        (b"prompt=a", "application/x-www-form-urlencoded"),
    ],
)
def test_refuses_what_is_no_form(server: Server, body: bytes, kind: str) -> None:
    answer = server.ask("POST", EDITS, body, content_type=kind)
    assert answer.status == 400
    assert answer.json["error"]["type"] == "invalid_request_error"


def test_refuses_a_form_that_is_too_large(server: Server) -> None:
    assert send(server, {**ASKED, "image": b"x" * LARGEST}).status == 413
