"""The text that web UIs for Stable Diffusion write into pictures: prompt, negative prompt, and a line of settings.

```
a lighthouse at dusk
Negative prompt: fog
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x768, Version: v1.10.1
```

A value with a comma, a colon or a line end is in JSON's quotes. Nothing marks where a prompt ends: a prompt with such
lines of its own is read back wrong, which is why our pictures carry their settings as JSON too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hidiff_runtime.errors import InputError
from hidiff_runtime.format.left_out import left_out_lines
from hidiff_runtime.pipeline.webui_names import NAMES
from hidiff_runtime.version import __version__

NEGATIVE = "Negative prompt:"
VERSION = "hidiff-runtime"
"""What ``Version`` begins with in our own pictures."""

_KEY = re.compile(r"\s*(\w[\w \-/.+]*):\s*")
_LEAST = 3
"""Settings that a line must have to be one of settings, as web UIs count."""


@dataclass(frozen=True)
class Infotext:
    """The text's parts.

    Args:
        prompt: with the web UIs' markup, if it has any; may be empty.
        negative_prompt: None where there is none.
        settings: by the web UIs' names, as they are written there.
    """

    prompt: str
    negative_prompt: str | None
    settings: Mapping[str, str]

    @property
    def ours(self) -> bool:
        """Whether this package wrote it."""
        return self.settings.get("Version", "").startswith(VERSION)


def write_infotext(facts: Mapping[str, Any], sampler: str | None = None) -> str:
    """Returns the text for a picture.

    Args:
        facts: as the chunk ``hidiff`` has them.
        sampler: its name in web UIs, where that is not to be found by its name here.
    """
    size = f"{facts['width']}x{facts['height']}"
    settings = {
        "Steps": facts["steps"],
        "Sampler": sampler or NAMES.get(facts["sampler"], facts["sampler"]),
        "Schedule type": facts.get("schedule"),
        "CFG scale": facts.get("guidance_scale"),
        "CFG rescale": facts.get("guidance_rescale"),
        **{name.capitalize(): line for name, line in left_out_lines(facts).items()},
        "Seed": facts["seed"],
        "Size": size,
        "Model hash": facts["model_sha256"][:10],
        "Model": facts["model"],
        "Denoising strength": facts.get("strength"),
        "Clip skip": to_web_clip_skip(facts.get("clip_skip", 0), sdxl="time_ids" in facts),
        "Eta DDIM": facts.get("eta"),
        "Version": f"{VERSION} {__version__}",
    }
    lines = [facts["prompt"]]
    if facts.get("negative_prompt"):
        lines.append(f"{NEGATIVE} {facts['negative_prompt']}")
    told = [f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None]
    return "\n".join([*lines, ", ".join(told)])


def read_infotext(text: str) -> Infotext:
    """Returns the parts of the text.

    Raises:
        InputError: it has no line of settings.
    """
    lines = text.strip().split("\n")
    place = _settings_line(lines)
    settings = dict(_pairs(lines[place]))
    before = [line.strip() for line in lines[:place]]
    start = next((number for number, line in enumerate(before) if line.startswith(NEGATIVE)), None)
    negative = None if start is None else "\n".join(before[start:]).removeprefix(NEGATIVE).strip()
    return Infotext("\n".join(before[:start]).strip(), negative or None, settings)


def to_web_clip_skip(skipped: int, *, sdxl: bool) -> int | None:
    """Returns the web UIs' ``Clip skip`` for layers that are skipped here; None where none is.

    Web UIs count the layer from the last, 1. SD takes the last, so that 2 skips one. SDXL takes the last but one, which
    is their 2 (and 1 too, which they lift), so that 3 skips one. SD2.1's text encoder comes without its last layer, and
    counts as SD does.
    """
    return None if not skipped else skipped + (2 if sdxl else 1)


def from_web_clip_skip(layer: int, *, sdxl: bool) -> int:
    """Returns how many layers are skipped here for the web UIs' ``Clip skip``, which some programs write below 0."""
    return max(abs(layer) - (2 if sdxl else 1), 0)


def _settings_line(lines: list[str]) -> int:
    """Returns which line has the settings: the last, or where an extension wrote more an earlier one from ``Steps``."""
    for number in range(len(lines) - 1, -1, -1):
        pairs = dict(_pairs(lines[number]))
        if len(pairs) >= _LEAST and (number == len(lines) - 1 or next(iter(pairs)) == "Steps"):
            return number
    raise InputError(
        "The picture's parameters have no line of settings, such as Steps: 20, Sampler: Euler a, Seed: 1.",
        given=f"the last line is {lines[-1][:200]!r}",
        advice="Give the prompt and the settings as options.",
    )


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """Names and values of a line of settings; what is between commas and has no name is passed over."""
    place = 0
    while place < len(line):
        key = _KEY.match(line, place)
        if key is None:
            place = _after_comma(line, place)
            continue
        value, place = _value(line, key.end())
        yield key[1].strip(), value


def _value(line: str, place: int) -> tuple[str, int]:
    """Returns the value that begins here, and where the next setting does: JSON, or what is before the next comma."""
    if line[place : place + 1] in tuple('"[{'):
        try:
            value, end = json.JSONDecoder().raw_decode(line, place)
        except (ValueError, RecursionError):
            pass
        else:
            if not line[end:].lstrip() or line[end:].lstrip().startswith(","):
                return value if isinstance(value, str) else line[place:end], _after_comma(line, end)
    end = _after_comma(line, place)
    return line[place:end].rstrip().removesuffix(",").strip(), end


def _after_comma(line: str, place: int) -> int:
    found = line.find(",", place)
    return len(line) if found < 0 else found + 1


def _quoted(value: Any) -> str:
    """Returns as the web UIs write a value: in JSON's quotes where it would end early, or seem to be in quotes."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if text[:1] in '"[{' or any(mark in text for mark in ",:\n") else text
