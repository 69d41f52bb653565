"""``hidiff-serve`` asked by OpenAI's own client: what it sends is taken, and what it parses is there."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import toy
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
)
from PIL import ExifTags, Image

from hidiff_runtime import Pipeline
from hidiff_runtime.format.safetensors import SafetensorsFile, write
from tests.deploy.serve import Served

PROMPT = "a lighthouse at dusk"
LONG = 200
"""Pictures of a request that takes long at any size."""


@pytest.fixture(scope="module")
def served(sd15_bundle: Path) -> Iterator[Served]:
    with Served(sd15_bundle, "--limit", f"pictures={LONG}", "--resident", "all") as server:
        yield server


@pytest.fixture(scope="module")
def pipe(sd15_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(sd15_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def pixels(encoded: str | None) -> np.ndarray:
    assert encoded is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def test_generates_the_pipelines_picture(client: openai.OpenAI, pipe: Pipeline) -> None:
    response = client.images.generate(
        model="tiny", prompt=PROMPT, size="128x128", n=1, extra_body={"seed": 3, "negative_prompt": "fog"}
    )
    assert response.data is not None
    found = pixels(response.data[0].b64_json)
    assert np.array_equal(found, pipe(PROMPT, negative_prompt="fog", seed=3))
    assert not np.array_equal(found, pipe(PROMPT, negative_prompt="fog", seed=4))
    assert (response.size, response.output_format, response.background) == ("128x128", "png", "opaque")
    told: Any = response.data[0]
    assert (told.parameters["seed"], told.parameters["steps"]) == (3, 3)


def test_streams_partial_images_and_nothing_that_the_client_does_not_know(
    client: openai.OpenAI, pipe: Pipeline
) -> None:
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 5})
    found = list(stream)
    assert [type(event) for event in found] == [ImageGenPartialImageEvent] * 2 + [ImageGenCompletedEvent]
    assert [event.partial_image_index for event in found[:2]] == [0, 1]  # type: ignore[union-attr]
    assert all(ImageGenPartialImageEvent.model_validate(event.to_dict()) for event in found[:2])
    assert ImageGenCompletedEvent.model_validate(found[2].to_dict()).usage.total_tokens == 0
    assert pixels(found[0].b64_json).shape == (16, 16, 3)
    assert np.array_equal(pixels(found[2].b64_json), pipe(PROMPT, seed=5))


def test_edits(client: openai.OpenAI, pipe: Pipeline) -> None:
    start = Image.new("RGB", (128, 128), (40, 80, 160))
    transparent = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    transparent.paste((0, 0, 0, 0), (0, 0, 64, 128))
    white = Image.new("L", (128, 128), 0)
    white.paste(255, (0, 0, 64, 128))
    given: dict[str, Any] = {"prompt": PROMPT, "extra_body": {"seed": 2, "strength": 0.9}}
    response = client.images.edit(image=png(start), mask=png(transparent), **given)
    assert response.data is not None
    expected = pipe(PROMPT, image=start, mask=white, seed=2, strength=0.9)
    assert np.array_equal(pixels(response.data[0].b64_json), expected)
    found = list(client.images.edit(image=[png(start)], mask=png(white), stream=True, partial_images=1, **given))
    assert [type(event) for event in found] == [ImageEditPartialImageEvent, ImageEditCompletedEvent]
    assert np.array_equal(pixels(found[-1].b64_json), expected)


def test_a_hole_in_the_image_is_where_to_paint(client: openai.OpenAI, pipe: Pipeline) -> None:
    start, white = Image.new("RGB", (128, 128), (40, 80, 160)), Image.new("L", (128, 128), 0)
    white.paste(255, (0, 0, 64, 128))
    holed = start.copy()
    holed.putalpha(white.point(lambda value: 255 - value))
    given: dict[str, Any] = {"prompt": PROMPT, "extra_body": {"seed": 2, "strength": 0.9}}
    for image in (png(holed), [png(holed)]):
        response = client.images.edit(image=image, **given)
        assert response.data is not None
        expected = pipe(PROMPT, image=start, mask=white, seed=2, strength=0.9)
        assert np.array_equal(pixels(response.data[0].b64_json), expected)
    assert not np.array_equal(expected, pipe(PROMPT, image=start, seed=2, strength=0.9))


def test_a_seed_of_minus_one_is_random_and_told(client: openai.OpenAI, pipe: Pipeline) -> None:
    pictures: list[Any] = []
    for _ in range(2):
        response = client.images.generate(prompt=PROMPT, extra_body={"seed": -1})
        assert response.data is not None
        pictures.append(response.data[0])
    first, second = pictures
    assert first.seed == first.parameters["seed"] != second.seed
    assert np.array_equal(pixels(first.b64_json), pipe(PROMPT, seed=first.seed))


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_other_formats_tell_how_the_picture_was_made_too(client: openai.OpenAI, pipe: Pipeline, name: Any) -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "output_format": name, "extra_body": {"seed": 3}}
    response = client.images.generate(**asked)
    smaller = client.images.generate(**asked, output_compression=40)
    assert response.data is not None
    assert smaller.data is not None
    assert (response.output_format, smaller.output_format) == (name, name)
    content, less = (base64.b64decode(each.data[0].b64_json or "") for each in (response, smaller))
    assert len(less) < len(content)
    picture, wanted = Image.open(io.BytesIO(content)), pipe(PROMPT, seed=3)
    exif = picture.getexif().get_ifd(ExifTags.IFD.Exif)
    assert exif[ExifTags.Base.UserComment][8:].decode("utf-16-be") == wanted.info["parameters"]
    assert exif[ExifTags.Base.MakerNote].decode() == wanted.info["hidiff"]
    assert np.abs(np.asarray(picture, float) - np.asarray(wanted, float)).mean() < 12


def test_lists_the_model(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_are_the_clients(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="style is OpenAI's") as style:
        client.images.generate(prompt=PROMPT, style="vivid")
    assert (style.value.param, style.value.code, style.value.type) == (
        "style",
        "unsupported_parameter",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError, match="no parameter 'colour'"):
        client.images.generate(prompt=PROMPT, extra_body={"colour": "red"})
    with pytest.raises(openai.BadRequestError, match="128x128"):
        client.images.generate(prompt=PROMPT, size="1024x1024")
    with pytest.raises(openai.BadRequestError, match="sampler"):
        client.images.generate(prompt=PROMPT, stream=True, extra_body={"sampler": "nope"})
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt=PROMPT, model="gpt-image-1")


def test_the_example_of_the_documentation_runs(served: Served, pipe: Pipeline) -> None:
    text = (Path(__file__).parents[2] / "docs/serve.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found: dict[str, Any] = {}
    exec(example.replace("http://127.0.0.1:8000", served.url).replace('"steps": 30', '"steps": 3'), found)
    assert np.array_equal(pixels(found["image"].b64_json), pipe(PROMPT, seed=1))
    assert found["image"].parameters["seed"] == 1
    found["client"].close()


def test_closing_a_stream_ends_the_run(served: Served, client: openai.OpenAI, pipe: Pipeline) -> None:
    before = served.count("hidiff_pictures_total")
    stream = client.images.generate(prompt=PROMPT, stream=True, n=LONG, extra_body={"seed": 1})
    assert isinstance(next(iter(stream)), ImageGenCompletedEvent)
    stream.close()
    response = client.images.generate(prompt=PROMPT, extra_body={"seed": 3})  # waits for the run's end
    assert served.count("hidiff_cancellations_total") == 1
    assert served.count("hidiff_pictures_total") < before + LONG
    assert response.data is not None
    assert np.array_equal(pixels(response.data[0].b64_json), pipe(PROMPT, seed=3))


def test_keys_deadlines_and_a_signal_while_a_picture_is_made(sd15_bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("right\n")
    limits = ("--limit", "pictures=2000", "--timeout", "1", "--grace", "1", "--resident", "all")
    with Served(sd15_bundle, "--api-key-file", keys, *limits) as server:
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.images.generate(prompt=PROMPT)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="right") as client:
            with pytest.raises(openai.InternalServerError, match="deadline") as late:  # asked once: it is not retried
                client.images.generate(prompt=PROMPT, n=2000)
            assert (late.value.status_code, late.value.code) == (504, "timeout")
            with pytest.raises(openai.APIError, match="deadline"):
                list(client.images.generate(prompt=PROMPT, n=2000, stream=True))
            stream = client.images.generate(prompt=PROMPT, n=2000, stream=True)
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError):
                list(stream)
        assert server.end() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_while_it_opens_ends_it(sd15_bundle: Path, number: signal.Signals, code: int) -> None:
    with Served(sd15_bundle, wait=False) as server:
        assert json.loads(server.get("/health/live")) == {"status": "live"}
        assert server.end(number) == code
        assert not any("Traceback" in line for line in server.lines)


def test_a_bundle_that_does_not_compute_what_pytorch_did_ends_it(sd15_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(sd15_bundle, folder)
    path = folder / "reference/samples.safetensors"
    with SafetensorsFile.open(path) as file:
        arrays = {name: array * np.array(1.5, array.dtype) for name, array in file.arrays().items()}
    write(path, arrays)
    toy.seal(folder)  # what PyTorch is said to have computed is signed, and wrong
    with Served(folder, wait=False) as server:
        assert server.end() == 1
        assert any("do not compute what PyTorch computed" in line for line in server.lines)
