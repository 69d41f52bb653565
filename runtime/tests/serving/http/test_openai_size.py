"""OpenAI's size, and our width and height, at a server of a bundle of two sizes."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
import toy
import toy_pictures
import toy_reference
import toy_sizes
from http_server import PROMPT, Server, proven, refused, send, serving
from PIL import Image

from hidiff_runtime import Pipeline

ASKED = {"prompt": PROMPT, "steps": 4, "seed": 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = toy_sizes.add_turned(proven(tmp_path_factory.mktemp("sizes") / "bundle"))
    toy_reference.record_others(folder, toy.Toy())
    with serving(folder) as started:
        yield started


def drawn(server: Server, width: int, height: int, seed: int) -> np.ndarray:
    with Pipeline.open(server.folder, backend=toy_pictures.Backend()) as pipe:
        return np.asarray(pipe(PROMPT, steps=4, seed=seed, width=width, height=height))


@pytest.mark.parametrize("given", [{"size": "48x64"}, {"width": 48, "height": 64}])
def test_a_size_is_drawn_however_it_is_asked_for(server: Server, given: dict[str, object]) -> None:
    answer = server.post({**ASKED, **given})
    assert np.array_equal(answer.picture, drawn(server, 48, 64, 3))
    assert answer.json["size"] == "48x64"
    parameters = answer.json["data"][0]["parameters"]
    assert (parameters["width"], parameters["height"]) == (48, 64)


@pytest.mark.parametrize("given", [{}, {"size": "auto"}, {"size": "64x48"}, {"size": None}])
def test_the_first_size_is_the_usual_one(server: Server, given: dict[str, object]) -> None:
    assert np.array_equal(server.post({**ASKED, **given}).picture, drawn(server, 64, 48, 3))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"size": "32x32"},
            "The bundle has no such width and height. Use one that it has: 64x48, 48x64. 'hidiff-export add' adds one.",
        ),
        ({"size": "large"}, "size must be WIDTHxHEIGHT in pixels, such as 1024x1024, or auto."),
        ({"size": "48x64", "width": 64}, "size and width or height say different things: give one of them."),
    ],
)
def test_other_sizes_are_refused_with_those_there_are(server: Server, given: dict[str, object], told: str) -> None:
    answer = server.post({**ASKED, **given})
    assert refused(answer, 400, "invalid_value") == told
    assert answer.json["error"]["param"] == "size"


def test_a_side_that_the_bundle_lacks_is_refused(server: Server) -> None:
    assert "64x48, 48x64" in refused(server.post({**ASKED, "width": 56}), 400)


def test_the_model_tells_its_sizes(server: Server) -> None:
    (card,) = server.get("/v1/models").json["data"]
    assert card["hidiff"]["sizes"] == ["64x48", "48x64"]


def test_an_image_is_painted_in_at_the_size_that_is_asked_for(server: Server) -> None:
    image = Image.new("RGBA", (48, 64), (200, 20, 30, 255))
    image.paste((0, 0, 0, 0), (0, 0, 24, 64))
    content = io.BytesIO()
    image.save(content, "PNG")
    asked = {name: str(value) for name, value in ASKED.items()}
    answer = send(server, {**asked, "size": "48x64", "image": content.getvalue()})
    mask = image.getchannel("A").point(lambda alpha: 255 - alpha)
    with Pipeline.open(server.folder, backend=toy_pictures.Backend()) as pipe:
        expected = pipe(PROMPT, steps=4, seed=3, image=image.convert("RGB"), mask=mask, width=48, height=64)
    assert np.array_equal(answer.picture, np.asarray(expected))
