"""Lines as web UIs take them, translated: options such as ``--seed 5``, and the text that they write into pictures."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable

from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.infotext import from_web_clip_skip
from hidiff_runtime.pipeline.webui_names import NAMES
from hidiff_runtime.text_safety import json_text

_SAMPLERS = {name.lower(): sampler for sampler, name in NAMES.items() if sampler != "dpmpp_2m_karras"} | {
    "dpm++ 2m karras": "dpmpp_2m_karras"
}
"""Samplers by the names of web UIs, in lower case; the schedule at a name's end."""


def _text(value: str) -> str:
    if not value:
        raise ValueError(value)
    return value


def _number(value: str) -> float:
    if not math.isfinite(float(value)):
        raise ValueError(value)
    return float(value)


def _seed(value: str) -> int:
    if int(value) < 0:  # -1 asks for another seed each time
        raise ValueError(value)
    return int(value)


def _sampler(value: str) -> str:
    return _SAMPLERS[value.lower()]


_EQUALS: dict[str, tuple[str, Callable[[str], str | int | float]]] = {
    "prompt": ("prompt", _text),
    "negative_prompt": ("negative_prompt", _text),
    "no": ("negative_prompt", _text),
    "seed": ("seed", _seed),
    "steps": ("steps", int),
    "cfg_scale": ("guidance_scale", _number),
    "guidance_scale": ("guidance_scale", _number),
    "sampler_name": ("sampler", _sampler),
    "sampler": ("sampler", _sampler),
    "denoising_strength": ("strength", _number),
    "clip_skip": ("clip_skip", lambda value: from_web_clip_skip(int(value), sdxl=False)),
    "eta": ("eta", _number),
}
"""Options that have an equal: its field, and what reads the value."""

_WITHOUT = frozenset(
    (
        *("width", "height", "batch_size", "n_iter", "styles", "subseed", "subseed_strength", "sd_model"),
        *("seed_resize_from_h", "seed_resize_from_w", "sampler_index", "restore_faces", "tiling", "outpath_samples"),
        *("outpath_grids", "prompt_for_display", "do_not_save_samples", "do_not_save_grid"),
        *("ar", "aspect", "chaos", "niji", "stylize", "style", "tile", "iw", "v", "q"),
    )
)
"""Options that have none."""

_OPTION = re.compile(r"--([A-Za-z][\w-]*)")
_PAIR = re.compile(r"([A-Z][\w ]*): ([^,]*)")
_INFOTEXT = re.compile(r"(Negative prompt:\s*(?P<negative>.*)|Steps: [0-9]+, (Sampler|Seed|CFG scale|Size|Model).*)")


def refuse_web_ui(line: str) -> None:
    """Refuses a line that is not a prompt but a web UI's, and says it as JSON.

    Raises:
        InputError: it has options, or is a line of what web UIs write into their pictures.
    """
    written = _INFOTEXT.fullmatch(line)
    if written:
        negative = [("negative_prompt", written["negative"])] if written["negative"] is not None else []
        pairs = [(name.lower().replace(" ", "_"), value) for name, value in _PAIR.findall(line)]
        found, _ = _translated([("prompt", "…"), *(negative or pairs)])
        raise InputError(
            "The line is a part of the text that a web UI writes into a picture, and would be drawn as words.",
            given=repr(line[:80]),
            advice=f"Write each prompt as one line of JSON: {json_text(found)}",
        )
    if not _has_options(line):
        return
    found, left = _translated(_options(line))
    rest = f" There is no equal here for {', '.join(left)}." if left else ""
    if found.get("clip_skip"):
        rest = f" This clip_skip is for SD: for SDXL give one less.{rest}"
    raise InputError(
        "The line has options of a web UI, which would be drawn as words.",
        given=repr(line[:80]),
        advice=f"Write it as JSON: {json_text(found)}{rest}",
    )


def _has_options(line: str) -> bool:
    """Returns whether it begins with an option, or has one of a name that web UIs know."""
    if _OPTION.match(line):
        return True
    names = (_OPTION.fullmatch(word.partition("=")[0]) for word in line.split())
    return any(name[1].replace("-", "_") in (*_EQUALS, *_WITHOUT) for name in names if name)


def _options(line: str) -> list[tuple[str, str]]:
    """Returns options with their values, each all up to the next option; what stands before them is the prompt."""
    try:
        words = shlex.split(line)
    except ValueError:  # an apostrophe, which opens no quotation
        words = line.split()
    given: list[tuple[str, list[str]]] = [("prompt", [])]
    for word in words:
        name, equals, value = word.partition("=")
        if _OPTION.fullmatch(name):
            given.append((name[2:].replace("-", "_"), [value] if equals else []))
        else:
            given[-1][1].append(word)
    return [(name, " ".join(parts)) for name, parts in given[0 if given[0][1] else 1 :]]


def _translated(options: list[tuple[str, str]]) -> tuple[dict[str, str | int | float], list[str]]:
    """Returns fields by name, and the options that have no equal."""
    found: dict[str, str | int | float] = {"prompt": "…"}
    left = []
    for name, value in options:
        field, read = _EQUALS.get(name, ("", _text))
        try:
            found |= {field: read(value)} if field else {}
        except (ValueError, KeyError, OverflowError):
            field = ""
        if not field:
            left.append(f"--{name} {value}".rstrip())
    return found, left
