"""Requests from plain values: what is read, what is refused before any work."""

from __future__ import annotations

import base64
import dataclasses
import inspect
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_pictures
from PIL import Image

from hidiff_runtime import InputError, Pipeline, Settings
from hidiff_runtime.pipeline.request_fields import FIELDS, ORDERS, SETTINGS, Field
from hidiff_runtime.pipeline.request_values import Limits, read_request, with_seed

SIZE = (toy_pictures.WIDTH, toy_pictures.HEIGHT)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder = toy_pictures.make(tmp_path_factory.mktemp("fields") / "bundle")
    with Pipeline.open(folder, backend=toy_pictures.Backend()) as opened:
        yield opened


def png(size: tuple[int, int] = SIZE, colour: int = 200) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (colour, 20, 30)).save(content, "PNG")
    return content.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def test_servers_take_every_setting_but_pairs() -> None:
    pairs = [name for name in SETTINGS if name.endswith(("_size", "crops"))]
    assert [name for name, field in SETTINGS.items() if field.kind in ORDERS] == pairs
    assert [field.name for field in FIELDS] == ["prompt", *(name for name in SETTINGS if name not in pairs)]


def test_the_pipeline_takes_every_setting_as_the_table_has_it() -> None:
    taken = inspect.signature(Pipeline.__call__).parameters
    assert list(taken) == ["self", "prompt", *SETTINGS, "num_images", "callback"]
    for field in dataclasses.fields(Settings):
        parameter = taken[field.name]
        assert (parameter.default, parameter.annotation) == (field.default, field.type), field.name
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("field", SETTINGS.values(), ids=lambda field: field.name)
def test_the_default_that_is_told_is_taken(field: Field) -> None:
    told = re.search(r"\(default: (.*)\)", field.help)
    if isinstance(field.default, tuple):
        assert told is not None
        assert told[1] == ",".join(map(str, field.default))
    elif field.default is not None and field.default is not False:
        assert told is not None
        assert told[1].partition(",")[0] == (field.default if field.kind == "text" else f"{field.default:g}")


def test_what_is_told_of_a_tasks_defaults_is_taken(tmp_path: Path) -> None:
    kinds = {"SD": toy.Toy(), "SDXL": toy.Toy(sdxl=True), "SDXL with a ControlNet": toy.Toy(sdxl=True, control=True)}
    picture = Image.new("RGB", SIZE)
    found: dict[str, list[Any]] = {"guidance_scale": [], "strength": []}
    for name, kind in kinds.items():
        given = {"image": picture, **({"control_image": picture} if kind.control else {})}
        with Pipeline.open(toy_pictures.make(tmp_path / name, kind), backend=toy_pictures.Backend()) as pipe:
            for masked in ({}, {"mask": picture}):
                settings = pipe.request("a", Settings(**given, **masked)).settings
                found["guidance_scale"].append(settings.guidance_scale)
                found["strength"].append(settings.strength)
    assert found == {"guidance_scale": [7.5, 7.5, 5.0, 7.5, 5.0, 5.0], "strength": [0.8, 1.0, 0.3, 0.9999, 0.8, 0.9999]}
    assert "(default: 7.5; 5 for SDXL, but for inpainting without a ControlNet)" in SETTINGS["guidance_scale"].help
    told = "(default: 0.8, 0.3 for SDXL without a ControlNet; with a mask 1, 0.9999 for SDXL)"
    assert told in SETTINGS["strength"].help


BOUNDS = [(field.name, *field.bounds) for field in FIELDS if field.bounds]


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A pipeline that takes every field."""
    folder = toy_pictures.make(tmp_path_factory.mktemp("every") / "bundle", toy.Toy(control=True))
    toy_pictures.add_samplers(folder)
    with Pipeline.open(folder, backend=toy_pictures.Backend()) as opened:
        yield opened


@pytest.mark.parametrize(("name", "least", "most"), BOUNDS, ids=[bound[0] for bound in BOUNDS])
def test_bounds_are_those_of_the_table(every: Pipeline, name: str, least: float, most: float) -> None:
    def read(value: float) -> Any:
        values = {"prompt": "a", "sampler": "ddim", "image": png(), "control_image": png(), name: value}
        return getattr(read_request(every, with_seed(values), Limits()).settings, name)

    step = 1 if SETTINGS[name].kind == "whole" else 2**-20
    for bound, beyond in ((least, least - step), (most, most + step)):
        if math.isinf(bound):
            continue
        with pytest.raises(InputError, match=name):
            read(beyond)
        if (name, bound) == ("seed", -1):
            assert 0 <= read(-1) < 2**32
        elif (name, bound) in (("strength", 0), ("steps", 1)):  # nearly: no step is left, or no table has one
            assert read(0.25 if name == "strength" else 4) > bound
        else:
            assert read(bound) == bound


def test_texts_beyond_the_choices_are_refused(pipeline: Pipeline) -> None:
    for field in FIELDS:
        for choice in field.choices:
            assert getattr(read_request(pipeline, {"prompt": "a", field.name: choice}, Limits()).settings, field.name)
        if field.choices:
            with pytest.raises(InputError, match=f"{field.name} must be one of {', '.join(field.choices)}"):
                read_request(pipeline, {"prompt": "a", field.name: "other"}, Limits())


def test_reads_everything(pipeline: Pipeline) -> None:
    values: dict[str, Any] = {
        "prompt": "a lighthouse",
        "negative_prompt": "fog",
        "seed": 2**63,
        "steps": 4,
        "guidance_scale": 3,
        "guidance_rescale": 1,
        "sampler": None,
        "strength": 0.5,
        "image": png(),
        "mask": data_url(png()),
        "resize": True,
    }
    request = read_request(pipeline, values, Limits())
    settings = request.settings
    assert (request.prompts, request.negative_prompts) == (("a lighthouse",), ("fog",))
    assert (settings.seed, settings.steps, settings.guidance_scale, settings.strength) == (2**63, 4, 3.0, 0.5)
    assert settings.guidance_rescale == 1.0
    assert request.image is not None
    assert np.isclose(request.image[0, 0, 0, 0], 200 / 127.5 - 1)
    assert request.mask is not None


@pytest.mark.parametrize("resize", [False, True])
def test_keeps_pictures_of_the_bundles_size_alone(pipeline: Pipeline, resize: bool) -> None:
    size = (300, 200) if resize else SIZE
    content = {"image": png(size), "mask": data_url(png(size))}
    request = read_request(pipeline, {"prompt": "a", "strength": 0.5, "resize": resize, **content}, Limits())
    pictures = [request.settings.image, request.settings.mask]
    assert [(picture.size, picture.info) for picture in pictures] == [(SIZE, {})] * 2
    assert sum(request.held.values()) == 2 * SIZE[0] * SIZE[1] * 3
    given = Image.open(io.BytesIO(png(size)))
    again = pipeline.request("a", Settings(image=given, strength=0.5, resize=resize))
    assert np.array_equal(again.image, request.image)
    assert again.settings.image.size == SIZE
    assert pipeline.request("a").held == {}


LIMITS = Limits(prompt_characters=20, image_bytes=2000, image_pixels=5000, steps=8)

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({}, "prompt is missing"),
    "an empty prompt": ({"prompt": " "}, "empty"),
    "a prompt of another type": ({"prompt": 3}, "must be text"),
    "a list of prompts": ({"prompt": ["a"]}, "must be text"),
    "a prompt too long": ({"prompt": "a" * 21}, "too long"),
    "a negative prompt too long": ({"negative_prompt": "a" * 21}, "too long"),
    "an unknown field": ({"colour": 1}, "no such field"),
    "steps as text": ({"steps": "4"}, "whole number"),
    "steps as a flag": ({"steps": True}, "whole number"),
    "steps as a fraction": ({"steps": 4.0}, "whole number"),
    "too many steps": ({"steps": 9}, "too many steps"),
    "no steps": ({"steps": 0}, "steps"),
    "a seed as text": ({"seed": "1"}, "whole number"),
    "a guidance scale that is none": ({"guidance_scale": float("nan")}, "guidance"),
    "a guidance scale beyond float32": ({"guidance_scale": 1e39}, "guidance_scale must be a number from -1000 to 1000"),
    "a guidance scale beyond float32, below 0": ({"guidance_scale": -1e39}, "from -1000 to 1000"),
    "a guidance scale beyond pictures": ({"guidance_scale": 1001}, "from -1000 to 1000"),
    "a guidance scale beyond every float": ({"guidance_scale": 10**400}, "guidance_scale must be a finite number"),
    "a conditioning scale beyond float32": ({"conditioning_scale": 1e39}, "conditioning_scale must be a number from"),
    "eta beyond float32": ({"eta": 1e39}, "takes no eta"),
    "a guidance rescale beyond float32": ({"guidance_rescale": 1e39}, "from 0 to 1"),
    "a strength beyond float32": ({"strength": 1e39, "image": png()}, "strength must be a number above 0, up to 1"),
    "a guidance rescale that is text": ({"guidance_rescale": "0.7"}, "must be a number"),
    "a guidance rescale above 1": ({"guidance_rescale": 1.5}, "from 0 to 1"),
    "a sampler there is not": ({"sampler": "nope"}, "sampler"),
    "resize as a number": ({"resize": 1}, "true or false"),
    "an image of bytes too many": ({"image": b"x" * 2001}, "too large"),
    "an image of pixels too many": ({"image": png((100, 51))}, "too large"),
    "an image that is none": ({"image": b"GIF89a"}, "no picture"),
    "an image cut short": ({"image": png()[:-20]}, "broken"),
    "an image of another size": ({"image": png((8, 8))}, "size"),
    "an image as a path": ({"image": "/etc/passwd"}, "data: URL"),
    "an image as a link": ({"image": "http://127.0.0.1/a.png"}, "data: URL"),
    "a data URL without base64": ({"image": "data:image/png,abc"}, "in base64"),
    "a data URL of broken base64": ({"image": "data:image/png;base64,a*b"}, "not base64"),
    "too many steps, before pictures are decoded": ({"steps": 9, "image": b"GIF89a"}, "too many steps"),
    "a data URL of half a surrogate pair": ({"image": "data:image/png;base64,\ud800AAA"}, "not base64"),
    "a data URL of bytes just too many": ({"image": data_url(b"x" * 2060)}, "too large"),
    "a data URL too long": ({"image": f"data:image/png;base64,{'A' * 4000}"}, "too large"),
    "a mask alone": ({"mask": png()}, "needs an image"),
    "an image as a number": ({"image": 3}, "bytes of a picture file"),
    "a control image": ({"control_image": png()}, "no ControlNet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(pipeline: Pipeline, name: str) -> None:
    values, told = REFUSED[name]
    given = {"prompt": "a lighthouse", **values} if values else {}
    with pytest.raises(InputError, match=told):
        read_request(pipeline, given, LIMITS)


def test_what_is_at_the_limits_is_taken(pipeline: Pipeline) -> None:
    values = {"prompt": "a" * 20, "negative_prompt": "a" * 20, "steps": 8, "image": data_url(png())}
    assert read_request(pipeline, values, LIMITS).settings.steps == 8


def test_the_usual_number_of_steps_has_to_be_within_the_limit_too(pipeline: Pipeline) -> None:
    assert read_request(pipeline, {"prompt": "a"}, Limits(steps=12)).settings.steps == 12
    with pytest.raises(InputError, match="too many steps"):
        read_request(pipeline, {"prompt": "a"}, Limits(steps=11))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_limits_are_positive_whole_numbers(value: Any) -> None:
    with pytest.raises(InputError, match="steps"):
        Limits(steps=value)
