"""Tensors of a request to rows of plain values, and results to tensors."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_pictures
import toy_sizes

from hidiff_runtime import InputError, PictureStep, Pipeline, Settings
from hidiff_runtime.pipeline.image_processing import decode_picture
from hidiff_runtime.pipeline.pipeline import Result
from hidiff_runtime.pipeline.request_values import Limits
from hidiff_runtime.serving.triton import tensor_codec
from hidiff_runtime.serving.triton.schema import results
from hidiff_runtime.serving.triton.tensor_codec import TensorRow, read_rows

LIMITS = Limits(pictures=3)


def texts(*values: str | bytes) -> np.ndarray:
    return np.array([[value.encode() if isinstance(value, str) else value] for value in values], np.object_)


def test_each_row_has_its_own_values_as_plain_ones() -> None:
    tensors = {
        "prompt": texts("a", "b"),
        "seed": np.array([[1], [2**62]], np.int64),
        "strength": np.array([[0.7], [1.0]]),
        "resize": np.array([[True], [False]]),
        "image": texts(b"\x89PNG", b"data:"),
        "previews": np.array([[2], [0]], np.int64),
        "output": texts("base64", "base64"),
    }
    first, second = read_rows(tensors, LIMITS)
    values = {"prompt": "a", "seed": 1, "strength": 0.7, "resize": True, "image": b"\x89PNG"}
    assert first == TensorRow(values, "base64", 2)
    assert [type(value) for value in first.values.values()] == [str, int, float, bool, bytes]
    assert second.values["seed"] == 2**62
    assert second.previews == 0


def test_an_empty_text_or_picture_is_left_out_and_zero_is_not() -> None:
    tensors = {
        "prompt": texts("a"),
        "negative_prompt": texts(""),
        "image": texts(b""),
        "seed": np.array([[0]], np.int64),
    }
    assert read_rows(tensors, LIMITS) == [TensorRow({"prompt": "a", "seed": 0}, "png", 0)]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "one value for each row"),
        ({"seed": np.array([[1]], np.int64)}, "prompt is needed"),
        ({"prompt": texts("a", "b"), "seed": np.array([[1]], np.int64)}, "one value for each row"),
        ({"prompt": np.empty((0, 1), np.object_)}, "one value for each row"),
        ({"prompt": np.array([[b"a", b"b"]], np.object_)}, "one value for each row"),
        ({"prompt": np.array([b"a"], np.object_)}, "one value for each row"),
        ({"prompt": texts("a", "b", "c", "d")}, "too many rows"),
        ({"prompt": texts(b"\xff")}, "not UTF-8"),
        ({"prompt": texts("a"), "output": texts("jpeg")}, "no such output"),
        ({"prompt": texts("a", "b"), "output": texts("png", "uint8")}, "same output"),
        ({"prompt": texts("a"), "previews": np.array([[-1]], np.int64)}, "previews"),
    ],
)
def test_tensors_that_are_no_rows_are_refused(tensors: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_rows(tensors, LIMITS)


@pytest.mark.parametrize(("steps", "previews"), [(50, 0), (50, 1), (50, 7), (3, 3), (3, 9), (1, 1)])
def test_previews_are_spread_evenly_and_the_last_is_at_the_end(steps: int, previews: int) -> None:
    shown = [step for step in range(steps) if tensor_codec.shows(step, steps, previews)]
    assert len(shown) == min(steps, previews)
    if shown:
        assert shown[-1] == steps - 1
        gaps = np.diff([-1, *shown])
        assert gaps.max() - gaps.min() <= 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[PictureStep], Result]:
    """The steps and the result of a run of a toy."""
    folder = toy_pictures.make(tmp_path_factory.mktemp("toy") / "bundle")
    seen: list[PictureStep] = []
    with Pipeline.open(folder, backend=toy_pictures.Backend()) as pipe:
        request = pipe.request("a", Settings(steps=4))
        return seen, next(pipe.run([request], callback=seen.append))


def test_a_step_becomes_a_message(run: tuple[list[PictureStep], Result]) -> None:
    steps, _ = run
    messages = [tensor_codec.progress(5, step, TensorRow({}, "base64", 2)) for step in steps]
    assert [one["step"].item() for one in messages] == [1, 2, 3, 4]
    assert ["preview" in one for one in messages] == [False, True, False, True]
    assert all(one["event"].tolist() == [[b"progress"]] and one["row"].tolist() == [[5]] for one in messages)
    preview = decode_picture(base64.b64decode(messages[3]["preview"][0, 0]))
    assert np.array_equal(preview, steps[3].preview())


@pytest.mark.parametrize("output", ["png", "base64", "uint8"])
def test_a_result_becomes_a_message_in_the_form_that_was_asked(
    run: tuple[list[PictureStep], Result], output: str
) -> None:
    _, result = run
    message = tensor_codec.finished(2, result, output)
    assert message["event"].tolist() == [[b"result"]]
    assert json.loads(message["parameters"][0, 0])["steps"] == 4
    wanted = np.asarray(result.images[0])
    if output == "uint8":
        assert "image" not in message
        assert message["pixels"].shape == (1, 1, *wanted.shape)
        found = message["pixels"][0, 0]
    else:
        assert "pixels" not in message
        content = message["image"][0, 0]
        found = np.asarray(decode_picture(base64.b64decode(content) if output == "base64" else content))
    assert np.array_equal(found, wanted)
    assert not np.array_equal(found, 255 - wanted)


def test_a_bundle_that_draws_several_at_once_gives_all_of_them(tmp_path: Path) -> None:
    folder = toy_pictures.make(tmp_path / "bundle", toy.Toy(batch=2))
    with Pipeline.open(folder, backend=toy_pictures.Backend()) as pipe:
        result = next(pipe.run([pipe.request("a", Settings(steps=2))]))
        height, width = pipe.bundle.manifest.height, pipe.bundle.manifest.width
        shapes = {tensor.name: tensor.dims for tensor in results(pipe.bundle.manifest)}
    assert (
        tensor_codec.finished(0, result, "uint8")["pixels"].shape == (1, 2, height, width, 3) == (1, *shapes["pixels"])
    )
    message = tensor_codec.finished(0, result, "png")
    assert message["image"].shape == message["parameters"].shape == (1, 2) == (1, *shapes["image"])
    assert message["image"][0, 0] != message["image"][0, 1]


def test_rows_are_joined_under_each_other(run: tuple[list[PictureStep], Result]) -> None:
    _, result = run
    whole = tensor_codec.joined([tensor_codec.finished(index, result, "uint8") for index in range(3)])
    assert sorted(whole) == ["parameters", "pixels"]
    assert whole["pixels"].shape[:2] == (3, 1)
    assert whole["parameters"].shape == (3, 1)


def test_an_error_crosses_between_the_models_with_its_kind(run: tuple[list[PictureStep], Result]) -> None:
    _, result = run
    assert tensor_codec.refused(tensor_codec.failed("The prompt is missing.", "input")) == (
        "The prompt is missing.",
        "input",
    )
    assert tensor_codec.refused(tensor_codec.finished(0, result, "png")) is None


def test_pixels_of_several_sizes_are_refused_before_any_is_made(tmp_path: Path) -> None:
    folder = toy_sizes.add_turned(toy_pictures.make(tmp_path / "bundle"))
    with Pipeline.open(folder, backend=toy_pictures.Backend()) as pipe:
        runs = [pipe.request("a", Settings(width=width)) for width in (None, 64)]
        runs += [pipe.request("a", Settings(width=48, height=64))]
        declared = {tensor.name: tensor.dims for tensor in results(pipe.bundle.manifest)}
    assert declared["pixels"] == (1, -1, -1, 3)
    for output in ("png", "uint8"):
        rows = [TensorRow({}, output, 0)] * 3
        tensor_codec.check_one_tensor(rows[:2], runs[:2])
        if output == "png":
            tensor_codec.check_one_tensor(rows, runs)
    with pytest.raises(InputError, match="several sizes"):
        tensor_codec.check_one_tensor(rows, runs)
