"""Pictures over HTTP: whose they are, what is told with them, whole and as a stream."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_pictures
from http_server import PROMPT, Server, data_url, decoded, events, png, proven, serving
from PIL import Image

from hidiff_runtime import Pipeline
from hidiff_runtime.serving.http.queued_job import previewed

pytestmark = pytest.mark.alone

ASKED = {"prompt": PROMPT, "steps": 4}
SIZE = f"{toy_pictures.WIDTH}x{toy_pictures.HEIGHT}"


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(proven(tmp_path_factory.mktemp("generations") / "bundle")) as started:
        yield started


@pytest.fixture(scope="module")
def pipe(server: Server) -> Iterator[Pipeline]:
    with Pipeline.open(server.folder, backend=toy_pictures.Backend()) as opened:
        yield opened


def test_the_picture_is_the_pipelines_with_the_same_seed(server: Server, pipe: Pipeline) -> None:
    answer = server.post({**ASKED, "seed": 3})
    assert answer.status == 200
    assert np.array_equal(answer.picture, pipe(PROMPT, seed=3, steps=4))
    assert not np.array_equal(answer.picture, pipe(PROMPT, seed=4, steps=4))


def test_everything_else_reaches_the_pipeline(server: Server, pipe: Pipeline) -> None:
    given = {"negative_prompt": "fog", "guidance_scale": 3, "strength": 0.5, "seed": 2}
    answer = server.post({**ASKED, **given, "image": data_url(png())})
    grey = Image.new("RGB", (toy_pictures.WIDTH, toy_pictures.HEIGHT), (200, 20, 30))
    assert np.array_equal(answer.picture, pipe(PROMPT, steps=4, image=grey, **given))


def test_tells_what_the_picture_was_made_with(server: Server) -> None:
    answer = server.post({**ASKED, "seed": 3}).json
    told = answer["data"][0]["parameters"]
    assert (told["prompt"], told["seed"], told["steps"], told["guidance_scale"]) == (PROMPT, 3, 4, 7.5)
    assert (answer["size"], answer["output_format"], answer["background"]) == (SIZE, "png", "opaque")
    assert answer["created"] > 1_700_000_000


def test_a_seed_that_is_left_out_is_drawn_and_told(server: Server) -> None:
    first, second = (server.post(ASKED) for _ in range(2))
    seeds = [answer.json["data"][0]["parameters"]["seed"] for answer in (first, second)]
    assert seeds[0] != seeds[1]
    again = server.post({**ASKED, "seed": seeds[0]})
    assert np.array_equal(again.picture, first.picture)
    assert not np.array_equal(again.picture, second.picture)


def test_a_seed_of_minus_one_is_a_random_one(server: Server, pipe: Pipeline) -> None:
    data = [server.post({**ASKED, "seed": -1, "n": 2}).json["data"] for _ in range(2)]
    seeds = [[picture["seed"] for picture in pictures] for pictures in data]
    assert seeds[0] != seeds[1]
    for pictures, (first, second) in zip(data, seeds, strict=True):
        assert 0 <= first < 2**32
        assert second == first + 1
        assert [picture["parameters"]["seed"] for picture in pictures] == [first, second]
        assert np.array_equal(decoded(pictures[1]["b64_json"]), pipe(PROMPT, seed=second, steps=4))
        assert not np.array_equal(decoded(pictures[1]["b64_json"]), pipe(PROMPT, seed=-1, steps=4))


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_a_picture_comes_in_the_format_that_was_asked_for(server: Server, pipe: Pipeline, name: str, kind: str) -> None:
    wanted, other = (np.asarray(pipe(PROMPT, seed=seed, steps=4), np.float32) for seed in (3, 4))
    answer = server.post({**ASKED, "seed": 3, "output_format": name}).json
    picture = opened(answer["data"][0]["b64_json"])
    assert (picture.format, answer["output_format"]) == (kind, name)
    errors = [np.abs(np.asarray(picture, np.float32) - each).mean() for each in (wanted, other)]
    assert errors[0] <= {"png": 0, "jpeg": 4, "webp": 12}[name]  # squares of 8 pixels: WebP halves the size of colors
    assert errors[1] > 40
    stream = {**ASKED, "seed": 3, "output_format": name, "stream": True, "partial_images": 1}
    found = [data for name, data in events(server.post(stream).body) if not name.startswith(":")]
    assert [opened(data["b64_json"]).format for data in found] == [kind] * 2
    assert [data["output_format"] for data in found] == [name] * 2
    assert [(data["size"], data["background"], data["quality"]) for data in found] == [(SIZE, "opaque", "auto")] * 2
    assert found[1]["b64_json"] == answer["data"][0]["b64_json"]


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_more_compression_is_a_smaller_file_that_is_less_like_the_picture(
    server: Server, pipe: Pipeline, name: str
) -> None:
    wanted = np.asarray(pipe(PROMPT, seed=3, steps=4), np.float32)
    files = []
    for quality in (100, 50, 0):
        asked = {**ASKED, "seed": 3, "output_format": name, "output_compression": quality}
        files.append(server.post(asked).json["data"][0]["b64_json"])
    assert files[0] == server.post({**ASKED, "seed": 3, "output_format": name}).json["data"][0]["b64_json"]
    sizes = [len(file) for file in files]
    errors = [np.abs(decoded(file).astype(np.float32) - wanted).mean() for file in files]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] < errors[2]


def test_several_pictures_have_seeds_that_follow_each_other(server: Server, pipe: Pipeline) -> None:
    data = server.post({**ASKED, "seed": 7, "n": 3}).json["data"]
    assert [picture["parameters"]["seed"] for picture in data] == [7, 8, 9]
    for seed, picture in enumerate(data, 7):
        assert np.array_equal(decoded(picture["b64_json"]), pipe(PROMPT, seed=seed, steps=4))


def test_a_bundle_with_a_batch_makes_that_many_a_run(tmp_path: Path) -> None:
    kind = toy.Toy(batch=2)
    with serving(proven(tmp_path / "bundle", kind)) as server:
        data = server.post({**ASKED, "seed": 1}).json["data"]
        assert [(picture["parameters"]["seed"], picture["parameters"]["index"]) for picture in data] == [(1, 0), (1, 1)]
        assert len(server.post({**ASKED, "n": 4}).json["data"]) == 4
        assert server.post({**ASKED, "n": 3}).status == 400


@pytest.mark.parametrize(
    "given",
    [
        {"size": "auto"},
        {"size": SIZE},
        {"response_format": "b64_json", "output_format": "png"},
        {"background": "opaque", "quality": "auto", "moderation": "low", "user": "someone", "n": 1},
        {"background": "auto", "quality": "standard", "moderation": "auto", "safety_identifier": "someone"},
        {"output_format": "png", "output_compression": 100},
        {"n": None, "size": None, "stream": None, "seed": None, "image": None, "model": None},
        {"stream": False, "partial_images": 2},
    ],
    ids=str,
)
def test_takes_what_openais_clients_send(server: Server, given: dict[str, Any]) -> None:
    assert server.post({**ASKED, **given}).status == 200


def test_a_stream_tells_every_step_and_ends_with_the_picture(server: Server, pipe: Pipeline) -> None:
    answer = server.post({**ASKED, "seed": 5, "stream": True, "partial_images": 2})
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.body)
    steps = [data for name, data in found if name == ":progress"]
    assert [(data["run"], data["step"], data["steps"]) for data in steps] == [(0, step, 4) for step in range(4)]
    assert [data["phase"] for data in steps] == ["strided_pooled", "strided", "windowed", "windowed"]
    previews = [data for name, data in found if name == "image_generation.partial_image"]
    assert [data["partial_image_index"] for data in previews] == [0, 1]
    assert all(data["type"] == "image_generation.partial_image" for data in previews)
    assert decoded(previews[0]["b64_json"]).shape == (toy.HEIGHT, toy.WIDTH, 3)
    name, last = found[-1]
    assert name == last["type"] == "image_generation.completed"
    assert np.array_equal(decoded(last["b64_json"]), pipe(PROMPT, seed=5, steps=4))
    assert last["parameters"]["seed"] == last["seed"] == 5


def test_a_stream_of_several_pictures_has_each_as_it_is_done(server: Server) -> None:
    found = events(server.post({**ASKED, "seed": 5, "n": 2, "stream": True}).body)
    names = [name for name, _ in found]
    run = [":progress"] * 4 + ["image_generation.completed"]
    assert names == [":accepted", *run, *run]
    assert [data["parameters"]["seed"] for name, data in found if name.endswith("completed")] == [5, 6]


@pytest.mark.parametrize(
    ("steps", "previews", "after"),
    [(4, 0, set()), (4, 1, {1}), (4, 3, {0, 1, 2}), (4, 4, {0, 1, 2, 3}), (1, 1, {0}), (10, 3, {1, 4, 7})],
)
def test_previews_are_spread(steps: int, previews: int, after: set[int]) -> None:
    assert previewed(steps, previews) == after


@pytest.mark.parametrize("steps", range(1, 40))
def test_there_are_as_many_previews_as_were_asked_for(steps: int) -> None:
    for previews in range(50):
        found = previewed(steps, previews)
        assert len(found) == min(steps, previews)
        assert found <= set(range(steps))


@pytest.mark.parametrize(
    ("written", "offered"), [(["a cat", "an owl"], ["a cat", "an owl"]), (["a cat", 3, None], ["a cat"]), ("a cat", [])]
)
def test_example_prompts_are_texts_whatever_the_manifest_holds(
    tmp_path: Path, written: object, offered: list[str]
) -> None:
    bundle = toy_pictures.add_samplers(proven(tmp_path / "bundle"), example_prompts=written)
    with serving(bundle) as started:
        (card,) = started.get("/v1/models").json["data"]
    assert card["hidiff"]["example_prompts"] == offered


def test_models_lists_the_one_there_is(server: Server) -> None:
    (card,) = server.get("/v1/models").json["data"]
    assert server.get(f"/v1/models/{card['id']}").json == card
    assert server.get("/v1/models/other").status == 404
    assert card["hidiff"]["example_prompts"] == []
    assert (card["object"], card["hidiff"]["width"]) == ("model", toy_pictures.WIDTH)
    assert card["hidiff"]["sampler"] in card["hidiff"]["samplers"]
    assert server.post({**ASKED, "model": card["id"]}).status == 200
    assert server.post({**ASKED, "model": "other"}).json["error"]["code"] == "model_not_found"
