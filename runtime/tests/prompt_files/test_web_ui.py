"""Lines of web UIs: refused, and said as JSON that means the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hidiff_runtime.errors import InputError
from hidiff_runtime.prompt_files.lines import json_line
from hidiff_runtime.prompt_files.web_ui import refuse_web_ui


def refused(line: str) -> tuple[dict[str, Any], str]:
    """The JSON that is advised, and what is said to have no equal."""
    with pytest.raises(InputError) as caught:
        refuse_web_ui(line)
    start = caught.value.advice.index("{")
    values, end = json.JSONDecoder().raw_decode(caught.value.advice[start:])
    assert json_line(caught.value.advice[start : start + end]) == values
    return values, caught.value.advice[start + end :].strip()


LINES: dict[str, tuple[str, dict[str, Any], str]] = {
    "all": (
        '--prompt "a boat at dusk" --negative_prompt "fog, rain" --seed 5 --steps 20 --cfg_scale 7.5 '
        '--sampler_name "DPM++ 2M Karras" --denoising_strength 0.6',
        {
            "prompt": "a boat at dusk",
            "negative_prompt": "fog, rain",
            "seed": 5,
            "steps": 20,
            "guidance_scale": 7.5,
            "sampler": "dpmpp_2m_karras",
            "strength": 0.6,
        },
        "",
    ),
    "words without quotes": ("--prompt a boat --steps 4", {"prompt": "a boat", "steps": 4}, ""),
    "an apostrophe": ("a cat's tail --steps 4", {"prompt": "a cat's tail", "steps": 4}, ""),
    "options behind the text": ("a boat, at sea --seed 5", {"prompt": "a boat, at sea", "seed": 5}, ""),
    "an option alone": ("--seed 5", {"prompt": "…", "seed": 5}, ""),
    "equals": ("--prompt=boat --seed=5", {"prompt": "boat", "seed": 5}, ""),
    "hyphens": ("--prompt x --negative-prompt fog", {"prompt": "x", "negative_prompt": "fog"}, ""),
    "another UI": ("a boat --no fog --ar 16:9", {"prompt": "a boat", "negative_prompt": "fog"}, "--ar 16:9"),
    "sizes": ("--prompt x --width 512 --height 768", {"prompt": "x"}, "--width 512, --height 768"),
    "an unknown one": ("--colour red", {"prompt": "…"}, "--colour red"),
    "a flag": ("--prompt x --do_not_save_grid", {"prompt": "x"}, "--do_not_save_grid"),
    "another seed each time": ("--prompt x --seed -1", {"prompt": "x"}, "--seed -1"),
    "a sampler that is none": ("--prompt x --sampler_name Brush", {"prompt": "x"}, "--sampler_name Brush"),
    "no number": ("--prompt x --steps many --cfg_scale nan", {"prompt": "x"}, "--steps many, --cfg_scale nan"),
    "no layer": ("--prompt x --clip_skip 1", {"prompt": "x", "clip_skip": 0}, ""),
    "half a pair": ("--prompt \ud800", {"prompt": "\ud800"}, ""),
    "a line of a picture's text": ("Negative prompt: fog, rain", {"prompt": "…", "negative_prompt": "fog, rain"}, ""),
    "settings of a picture's text": (
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x512, Denoising strength: 0.5",
        {"prompt": "…", "steps": 20, "sampler": "euler_ancestral", "guidance_scale": 7.0, "seed": 5, "strength": 0.5},
        "",
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_a_line_is_said_as_json(case: str) -> None:
    line, values, left = LINES[case]
    assert refused(line) == (values, f"There is no equal here for {left}." if left else "")


@pytest.mark.parametrize(("layer", "skipped"), [(2, 1), (3, 2), (-2, 1)])
def test_layers_are_counted_from_the_last_and_otherwise_by_sdxl(layer: int, skipped: int) -> None:
    note = "This clip_skip is for SD: for SDXL give one less."
    assert refused(f"--prompt x --clip_skip {layer}") == ({"prompt": "x", "clip_skip": skipped}, note)


@pytest.mark.parametrize("line", ["a boat", "a boat -- at sea", "a--seed pod", "-s 5", "--", "---", "well--known"])
def test_other_lines_are_prompts(line: str) -> None:
    refuse_web_ui(line)
