"""The web UIs' text: written as they write it, read as they read it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from hidiff_runtime import __version__
from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.infotext import from_web_clip_skip, read_infotext, to_web_clip_skip, write_infotext

FACTS: dict[str, Any] = {
    "prompt": "a lighthouse",
    "negative_prompt": "fog",
    "steps": 20,
    "sampler": "dpmpp_2m_karras",
    "schedule": "Karras",
    "guidance_scale": 7.5,
    "seed": 3,
    "width": 64,
    "height": 48,
    "model": "sdxl: mine",
    "model_sha256": "0123456789abcdef",
}

FORGE = (
    "girl with a beret, (blue eyes:1.2)\nsecond line\nNegative prompt: ugly, fat\nblurry\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, "
    'Model hash: 45dee52b, Model: v1-5-pruned, Clip skip: 2, Lora hashes: "ink: 0123, oil: 4567", '
    'Template: "a \\"quoted\\", line\\nand another", Version: f2.0.1v1.10.1'
)


def web_ui(text: str) -> dict[str, str]:
    """The settings by the form's own rule: a value is in JSON's quotes, or ends before the next comma."""
    found = re.findall(r'(?:^|, )([A-Z][^:,"]*): ("(?:[^"\\]|\\.)*"|[^,]*)', text.split("\n")[-1])
    return {name: str(json.loads(value)) if value.startswith('"') else value for name, value in found}


def test_settings_are_written_as_web_uis_write_them() -> None:
    assert write_infotext(FACTS).split("\n") == [
        "a lighthouse",
        "Negative prompt: fog",
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 3, Size: 64x48, "
        f'Model hash: 0123456789, Model: "sdxl: mine", Version: hidiff-runtime {__version__}',
    ]
    more = {"negative_prompt": None, "schedule": None, "strength": 0.6, "clip_skip": 1, "eta": 0.5}
    text = write_infotext({**FACTS, "guidance_scale": None, **more})
    assert "Negative prompt" not in text
    assert "Schedule type" not in text
    assert "CFG scale" not in text
    assert "Denoising strength: 0.6, Clip skip: 2, Eta DDIM: 0.5, Version" in text


@pytest.mark.parametrize("model", ["plain", "a, b", "a: b", 'a "b"', '"a"', "[a]", "a\nb", "größer"])
def test_a_value_of_any_kind_is_read_back_and_hides_no_other(model: str) -> None:
    text = write_infotext({**FACTS, "model": model})
    read = read_infotext(text)
    assert read.settings["Model"] == model
    assert read.settings["Version"] == f"hidiff-runtime {__version__}"
    assert read.ours
    assert web_ui(text)["Version"] == f"hidiff-runtime {__version__}"  # nothing ends early for them either
    assert web_ui(text)["Size"] == "64x48"


def test_samplers_have_the_web_uis_names_and_others_keep_ours() -> None:
    for sampler, name in (("euler_ancestral", "Euler a"), ("pndm", "PLMS"), ("plain", "plain")):
        assert web_ui(write_infotext({**FACTS, "sampler": sampler}))["Sampler"] == name
    assert web_ui(write_infotext(FACTS, "DPM++ 2M SDE Heun"))["Sampler"] == "DPM++ 2M SDE Heun"


def test_a_web_uis_text_is_read() -> None:
    read = read_infotext(FORGE)
    assert read.prompt == "girl with a beret, (blue eyes:1.2)\nsecond line"
    assert read.negative_prompt == "ugly, fat\nblurry"
    assert not read.ours
    expected = {
        "Steps": "20",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "Size": "512x768",
        "Lora hashes": "ink: 0123, oil: 4567",
        "Template": 'a "quoted", line\nand another',
        "Version": "f2.0.1v1.10.1",
    }
    assert {name: read.settings[name] for name in expected} == expected


def test_json_and_items_without_a_name_hide_no_other_setting() -> None:
    line = 'Steps: 4, Civitai resources: [{"type":"checkpoint","id":1},{"b":2}], Hires, Broken: "a, Seed: 5, Meta: {}'
    read = read_infotext(f"a boat\n{line}")
    assert read.settings["Civitai resources"] == '[{"type":"checkpoint","id":1},{"b":2}]'
    assert (read.settings["Broken"], read.settings["Seed"], read.settings["Meta"]) == ('"a', "5", "{}")
    assert "Hires" not in read.settings


def test_lines_that_extensions_write_after_the_settings_are_passed_over() -> None:
    read = read_infotext("a boat\nSteps: 4, Sampler: Euler a, Seed: 5\nTemplate: a {boat|tree}\nNegative Template: fog")
    assert (read.prompt, read.settings["Seed"]) == ("a boat", "5")


def test_a_prompt_with_lines_like_the_texts_own_is_read_as_web_uis_do() -> None:
    read = read_infotext(write_infotext({**FACTS, "prompt": "Steps: 1, Seed: 2, Size: 3x4\nNegative prompt: none"}))
    assert read.settings["Seed"] == "3"
    assert (read.prompt, read.negative_prompt) == ("Steps: 1, Seed: 2, Size: 3x4", "none\nNegative prompt: fog")


@pytest.mark.parametrize("text", ["a boat", "a boat\nNegative prompt: fog", "Steps: 4, Seed: 5", ""])
def test_text_without_settings_is_refused_and_quoted(text: str) -> None:
    with pytest.raises(InputError, match="no line of settings") as caught:
        read_infotext(text)
    assert repr(text.split("\n")[-1]) in str(caught.value)


@pytest.mark.parametrize(
    ("sdxl", "skipped", "layer"), [(False, 1, 2), (False, 3, 4), (True, 1, 3), (True, 2, 4), (False, 0, None)]
)
def test_clip_skip_is_counted_from_the_layer_that_is_usual(sdxl: bool, skipped: int, layer: int | None) -> None:
    assert to_web_clip_skip(skipped, sdxl=sdxl) == layer
    if layer is not None:
        assert from_web_clip_skip(layer, sdxl=sdxl) == skipped
        assert from_web_clip_skip(-layer, sdxl=sdxl) == skipped
    times = {"time_ids": [1] * 6} if sdxl else {}
    written = web_ui(write_infotext({**FACTS, **times, "clip_skip": skipped}))
    assert written.get("Clip skip") == (None if layer is None else str(layer))


def test_web_uis_lift_clip_skip_1_to_sdxls_own_layer() -> None:
    assert [from_web_clip_skip(layer, sdxl=True) for layer in (1, 2, 3)] == [0, 0, 1]
    assert [from_web_clip_skip(layer, sdxl=False) for layer in (1, 2, 3)] == [0, 1, 2]
