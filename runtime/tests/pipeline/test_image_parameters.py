"""What pictures say of how they were made: ours, web UIs', and those of programs that are not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from web_ui import png

import hidiff_runtime
from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.image_metadata import FileFormat, FormatName
from hidiff_runtime.pipeline.image_parameters import read_parameters

WEB = (
    "a boat, größer 灯\nNegative prompt: fog\n"
    "Steps: 4, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x48, Version: v1"
)
OURS: dict[str, Any] = {
    "prompt": "a boat",
    "negative_prompt": "",
    "seed": 3,
    "steps": 4,
    "guidance_scale": 7.5,
    "sampler": "euler",
    "clip_skip": 1,
    "width": 64,
    "height": 48,
}


def with_comment(path: Path, comment: bytes | str) -> Path:
    """A picture with EXIF's UserComment, as web UIs write JPEG and WebP."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    return path


def test_our_own_picture_is_read_from_its_exact_text(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", hidiff=json.dumps(OURS), parameters=WEB)
    read = hidiff_runtime.read_parameters(path)
    assert read.prompt == "a boat"
    names = ("negative_prompt", "seed", "steps", "width", "height", "guidance_scale", "sampler", "clip_skip")
    assert read.settings == {name: OURS[name] for name in names}
    assert read.facts == OURS


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_our_own_picture_of_another_format_is_read_from_its_exact_text(tmp_path: Path, name: FormatName) -> None:
    image = Image.new("RGB", (8, 8))
    image.info = {"hidiff": json.dumps({**OURS, "prompt": "größer 灯"}), "parameters": WEB}
    (tmp_path / "a").write_bytes(FileFormat(name, 50).encode(image))
    read = read_parameters(tmp_path / "a")
    assert (read.prompt, read.settings["clip_skip"]) == ("größer 灯", 1)
    assert read.infotext is not None


@pytest.mark.parametrize(
    "prompt", ["a\nNegative prompt: b", "a\nSteps: 1, Sampler: x, Seed: 2", "größer 灯 🌅", '"', "a, b: c"]
)
def test_any_prompt_survives_in_our_own_picture(tmp_path: Path, prompt: str) -> None:
    text = json.dumps({**OURS, "prompt": prompt}, ensure_ascii=False)
    read = read_parameters(png(tmp_path / "a.png", hidiff=text, parameters=f"{prompt}\nSteps: 4"))
    assert read.prompt == prompt


def test_sizes_that_are_the_pictures_own_are_left_to_the_bundle(tmp_path: Path) -> None:
    def sizes(own: list[float], negative: list[float]) -> dict[str, Any]:
        facts = {**OURS, "time_ids": own, "negative_time_ids": negative}
        settings = read_parameters(png(tmp_path / "a.png", hidiff=json.dumps(facts))).settings
        return {name: value for name, value in settings.items() if name not in OURS}

    usual = [48.0, 64.0, 0.0, 0.0, 48.0, 64.0]
    assert sizes(usual, usual) == {}
    assert sizes([9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4]) == {
        "original_size": (9, 8),
        "crops": (7, 6),
        "target_size": (5, 4),
        "negative_crops": (7, 6),
    }
    assert sizes(usual, [1, 2, 0, 0, 48, 64]) == {"negative_original_size": (1, 2)}
    assert sizes([9, 8, 7, 6, 48, 64], [9, 8, 0, 0, 48, 64])["negative_crops"] == (0, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: png(folder / "a.png", parameters=WEB),
        lambda folder: with_comment(folder / "a.jpg", b"UNICODE\0" + WEB.encode("utf-16-be")),
        lambda folder: with_comment(folder / "a.jpg", b"UNICODE\0" + WEB.encode("utf-16-le")),
        lambda folder: with_comment(folder / "a.webp", b"UNICODE\0" + WEB.encode("utf-16-be")),
        lambda folder: with_comment(folder / "a.jpg", b"ASCII\0\0\0" + WEB.encode()),
        lambda folder: with_comment(folder / "a.jpg", WEB.encode()),
    ],
)
def test_a_web_uis_picture_is_read(tmp_path: Path, make: Any) -> None:
    read = read_parameters(make(tmp_path))
    assert read.prompt == "a boat, größer 灯"
    assert read.settings == {"negative_prompt": "fog", "steps": 4, "guidance_scale": 7.0, "seed": 5}
    assert read.infotext is not None
    assert read.infotext.settings["Sampler"] == "Euler a"
    assert read.infotext.settings["Version"] == "v1"
    assert read.facts == {}


def test_a_cameras_maker_note_is_not_taken_for_ours(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0x927C: b"Nikon\0{}", 0x9286: b"ASCII\0\0\0" + WEB.encode()})
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert read_parameters(tmp_path / "a.jpg").settings["seed"] == 5


def test_text_after_the_pixels_is_found(tmp_path: Path) -> None:
    chunk = png(tmp_path / "with.png", parameters="a boat\nSteps: 4, Sampler: Euler, Seed: 5").read_bytes()
    start = chunk.index(b"tEXt") - 4
    length = int.from_bytes(chunk[start : start + 4], "big") + 12
    plain = png(tmp_path / "plain.png").read_bytes()
    end = plain.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(plain[:end] + chunk[start : start + length] + plain[end:])
    assert read_parameters(tmp_path / "a.png").prompt == "a boat"


FOREIGN: dict[str, tuple[dict[str, str], str]] = {
    "ComfyUI": (
        {"prompt": '{"3": {}}', "workflow": "{}"},
        "made by ComfyUI: its workflow is a graph of nodes",
    ),
    "InvokeAI": ({"invokeai_metadata": "{}"}, "made by InvokeAI"),
    "NovelAI": ({"Software": "NovelAI", "Comment": "{}"}, "made by NovelAI"),
    "SwarmUI": ({"parameters": '{"sui_image_params": {}}'}, "made by SwarmUI"),
    "Fooocus": ({"parameters": "{}", "fooocus_scheme": "fooocus"}, "made by Fooocus"),
    "other JSON": ({"parameters": '{"a": 1}'}, "made by another program"),
    "nothing": ({}, "it has no text at all"),
    "an editor": ({"Software": "editor"}, "its text is Software"),
    "a prompt alone": ({"parameters": "a boat"}, "the last line is 'a boat'"),
    "no number": ({"parameters": "a\nSteps: many, Sampler: x, Seed: 2"}, "Steps: many"),
    "no JSON": ({"hidiff": "{"}, "in the chunk hidiff, it is not JSON"),
    "no object": ({"hidiff": "[1]"}, "it is no object: '[1]'"),
    "no prompt": ({"hidiff": "{}"}, "prompt is None, expected text"),
    "a seed of text": ({"hidiff": json.dumps({**OURS, "seed": "3"})}, "seed is '3', expected a whole number"),
    "a seed that is true": ({"hidiff": json.dumps({**OURS, "seed": True})}, "seed is True, expected a whole number"),
    "a list of samplers": ({"hidiff": json.dumps({**OURS, "sampler": []})}, "sampler is [], expected text"),
    "a width of text": ({"hidiff": json.dumps({**OURS, "width": "64"})}, "width is '64'"),
    "a schedule that is no text": ({"hidiff": json.dumps({**OURS, "schedule": 1})}, "schedule is 1, expected text"),
    "five sizes": ({"hidiff": json.dumps({**OURS, "time_ids": [1] * 5})}, "time_ids is [1, 1, 1, 1, 1], expected 6"),
    "sizes that are no numbers": ({"hidiff": json.dumps({**OURS, "time_ids": [float("nan")] * 6})}, "time_ids is [nan"),
    "phases as a list": ({"hidiff": json.dumps({**OURS, "phases": []})}, "phases is []"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_not_read_is_named_and_quoted(tmp_path: Path, case: str) -> None:
    texts, message = FOREIGN[case]
    path = png(tmp_path / "a.png", **texts)
    with pytest.raises(InputError) as caught:
        read_parameters(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_comfy_picture_that_tells_its_settings_besides_is_read(tmp_path: Path) -> None:
    assert read_parameters(png(tmp_path / "a.png", prompt="{}", workflow="{}", parameters=WEB)).settings["seed"] == 5


def test_files_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="picture cannot be read"):
        read_parameters(tmp_path / "none.png")
    (tmp_path / "text.png").write_text(WEB)
    with pytest.raises(InputError, match="no picture that can be read"):
        read_parameters(tmp_path / "text.png")
    cut = png(tmp_path / "cut.png").read_bytes()[:45]
    (tmp_path / "cut.png").write_bytes(cut)
    with pytest.raises(InputError, match="broken or cut short"):
        read_parameters(tmp_path / "cut.png")
