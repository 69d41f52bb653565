"""Every field of OpenAI's own types, sent by OpenAI's own client: taken, or refused by its name."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import openai
import pytest
import toy_pictures
from http_server import PROMPT, Server, proven, serving
from openai.types import image_edit_params, image_generate_params
from PIL import Image

from hidiff_runtime.pipeline.request_fields import BY_NAME
from hidiff_runtime.serving.http.openai_fields import CHOICES, UNSUPPORTED
from hidiff_runtime.serving.http.request_models import GenerationRequest

SIZE = (toy_pictures.WIDTH, toy_pictures.HEIGHT)
ASKED: dict[str, Any] = {"prompt": PROMPT, "extra_body": {"seed": 3, "steps": 4}}

GENERATION = get_type_hints(image_generate_params.ImageGenerateParamsNonStreaming)
EDIT = get_type_hints(image_edit_params.ImageEditParamsNonStreaming)

TAKEN = {
    "background": ["auto", "opaque"],
    "image": [],
    "mask": [],
    "model": ["sd15"],
    "moderation": ["auto", "low"],
    "n": [1, 2],
    "output_compression": [100],
    "output_format": ["png", "jpeg", "webp"],
    "partial_images": [0, 3],
    "prompt": [PROMPT],
    "quality": ["auto", "standard"],
    "response_format": ["b64_json"],
    "safety_identifier": ["someone"],
    "size": ["auto", f"{SIZE[0]}x{SIZE[1]}"],
    "stream": [False],
    "user": ["someone"],
}
"""Fields with values that are obeyed, or have nothing to change here; files have tests of their own."""

SAMPLES: dict[str, list[Any]] = {
    "frame_count": [2],
    "frame_duration_ms": [200],
    "markup": [b"a picture"],
    "output_compression": [0, 99],  # of PNG
    "svg": [{"model": "gpt-5", "reasoning": {"effort": "low"}}],
}
"""Values of fields whose types do not list them."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(proven(tmp_path_factory.mktemp("fields") / "bundle")) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as made:
        yield made


def listed(hint: Any) -> list[Any]:
    """The values that a type lists: those of every ``Literal`` in it."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [value for part in get_args(hint) for value in listed(part)]


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


START = png(Image.new("RGB", SIZE, (200, 20, 30)))


def ask(client: openai.OpenAI, edit: bool, **given: Any) -> Any:
    if edit:
        return client.images.edit(**{"image": START, **ASKED, **given})
    return client.images.generate(**{**ASKED, **given})


CASES = [(edit, name) for edit, fields in ((False, GENERATION), (True, EDIT)) for name in fields]


@pytest.mark.parametrize(("edit", "name"), CASES)
def test_every_field_is_taken_or_refused_by_its_name(client: openai.OpenAI, edit: bool, name: str) -> None:
    taken = TAKEN.get(name, [])
    for value in taken:
        assert ask(client, edit, **{name: value}).data
    refused = [value for value in listed((EDIT if edit else GENERATION)[name]) if value not in taken]
    refused += SAMPLES.get(name, [])
    assert name in TAKEN or refused, "a new field: say what is to become of it"
    if name in ("model", "size"):
        refused = refused[:2]
    for value in refused:
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as error:
            ask(client, edit, **{name: value})
        assert error.value.param == name
        assert error.value.code in ("unsupported_parameter", "unsupported_value", "invalid_value", "model_not_found")


@pytest.mark.parametrize("name", [name for name in GENERATION if name != "prompt"])
def test_null_is_as_good_as_leaving_out(client: openai.OpenAI, name: str) -> None:
    plain = ask(client, False).data[0].b64_json
    assert ask(client, False, **{name: None}).data[0].b64_json == plain


def test_what_nobody_has_is_unknown(client: openai.OpenAI) -> None:
    for edit in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, edit, extra_body={"colour": "red"})
        assert (error.value.param, error.value.code) == ("colour", "unknown_parameter")


def test_variations_say_where_to_go(client: openai.OpenAI) -> None:
    with (
        pytest.warns(DeprecationWarning, match="deprecated"),
        pytest.raises(openai.NotFoundError, match="/v1/images/edits"),
    ):
        client.images.create_variation(image=START)


def test_parameters_behind_the_address_are_refused(client: openai.OpenAI) -> None:
    for edit in (False, True):
        with pytest.raises(openai.BadRequestError, match="in the body"):
            ask(client, edit, extra_query={"seed": 3})


def test_several_images_are_refused_as_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="send one image"):
        ask(client, True, image=[START] * 16)


def test_a_list_of_one_image_is_an_image(client: openai.OpenAI) -> None:
    assert ask(client, True, image=[START]).data[0].b64_json == ask(client, True).data[0].b64_json


def test_a_hole_is_the_mask(client: openai.OpenAI) -> None:
    holed = Image.new("RGBA", SIZE, (200, 20, 30, 255))
    holed.paste((200, 20, 30, 0), (0, 0, SIZE[0] // 2, SIZE[1]))
    found, masked, whole = (
        ask(client, True, **given).data[0].b64_json
        for given in ({"image": png(holed)}, {"image": START, "mask": png(holed)}, {"image": START})
    )
    assert found == masked
    assert found != whole


def test_a_seed_of_minus_one_is_random_and_told(client: openai.OpenAI) -> None:
    for edit in (False, True):
        first, second = (ask(client, edit, extra_body={"seed": -1, "steps": 4}).data[0] for _ in range(2))
        assert first.seed != second.seed
        assert ask(client, edit, extra_body={"seed": first.seed, "steps": 4}).data[0].b64_json == first.b64_json


@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_a_stream_tells_the_format_that_it_sends(client: openai.OpenAI, name: str, edit: bool) -> None:
    events = list(ask(client, edit, stream=True, partial_images=3, output_format=name))
    assert [event.type.rpartition(".")[2] for event in events[:-1]] == ["partial_image"] * (len(events) - 1)
    assert [event.partial_image_index for event in events[:-1]] == list(range(len(events) - 1))
    assert events[:-1]
    for event in events:
        picture = Image.open(io.BytesIO(base64.b64decode(event.b64_json)))
        assert (event.output_format, picture.format) == (name, name.upper())
        assert (event.quality, event.background) == ("auto", "opaque")
        assert event.size == f"{SIZE[0]}x{SIZE[1]}"
        assert type(event).model_validate(event.to_dict(), strict=True)
    assert picture.size == SIZE
    assert np.asarray(picture).std() > 10


def test_the_page_of_the_server_has_every_field() -> None:
    text = (Path(__file__).parents[2] / "docs/serve.md").read_text(encoding="utf-8")
    rows = text.partition("## A request")[2].partition("### Edits")[0]
    named = {name for row in rows.splitlines() if row.startswith("|") for name in re.findall(r"`(\w+)`", row)}
    assert {*GENERATION, *EDIT, *BY_NAME} <= named
    assert {*GenerationRequest.model_fields, *UNSUPPORTED, *CHOICES, *BY_NAME} <= named
