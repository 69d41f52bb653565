"""How a picture was made, read from its file: our own pictures, and those of web UIs for Stable Diffusion.

A PNG has it in text chunks, a JPEG or WebP in EXIF's ``UserComment``, and what is exact of ours in its ``MakerNote``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.image_metadata import HIDIFF, PARAMETERS
from hidiff_runtime.pipeline.image_processing import picture_texts
from hidiff_runtime.pipeline.infotext import Infotext, read_infotext
from hidiff_runtime.pipeline.request_fields import ORDERS, SETTINGS, TYPES

_UTF16, _ASCII, _UNDEFINED = b"UNICODE\0", b"ASCII\0\0\0", b"\0" * 8
"""What an EXIF comment begins with, by its encoding."""

_OTHERS = {
    "workflow": ("ComfyUI", "its workflow is a graph of nodes, not a list of settings"),
    "prompt": ("ComfyUI", "its workflow is a graph of nodes, not a list of settings"),
    "invokeai_metadata": ("InvokeAI", "its settings are JSON of its own"),
    "invokeai_graph": ("InvokeAI", "its settings are JSON of its own"),
    "sd-metadata": ("InvokeAI", "its settings are JSON of its own"),
    "Dream": ("InvokeAI", "its settings are a command line of its own"),
    "fooocus_scheme": ("Fooocus", "its settings are JSON of its own"),
}
"""Text chunks of other programs: whose they are, and why they are not read."""

_WHAT = {str: "text", int: "a whole number", float: "a number"}

_SIZES = tuple(name for name, field in SETTINGS.items() if field.kind in ORDERS and not name.startswith("negative_"))
"""Settings in the order of `time_ids`, two numbers each."""


@dataclass(frozen=True)
class PictureParameters:
    """How a picture says that it was made.

    Args:
        prompt: may be empty.
        settings: by the names of `Settings`, those that mean the same in every program; all of them in our pictures.
        facts: what our pictures say; empty for others.
        infotext: what a web UI, or a viewer of ours, is told; None where only ``facts`` are there.
    """

    prompt: str
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    infotext: Infotext | None


def read_parameters(path: str | Path) -> PictureParameters:
    """Returns how the picture in a PNG, JPEG or WebP file was made, as it says itself.

    The chunk ``hidiff`` of our pictures is exact, and taken where it is there; else the text that web UIs write.

    Raises:
        InputError: there is no such file, it is no picture, it says nothing, is a program's whose settings are not
            read, or what it says is malformed; the message quotes what was found.
        EngineError: Pillow is not installed.
    """
    texts, comment, note = picture_texts(path, (HIDIFF, PARAMETERS))
    try:
        if HIDIFF in texts:
            return _ours(texts[HIDIFF], texts.get(PARAMETERS))
        if isinstance(note, bytes) and note.startswith(b"{"):  # a camera's begins with its maker's name
            return _ours(note.decode(errors="replace"), _decoded(comment))
        return _of_web_ui(texts, _decoded(comment))
    except InputError as error:
        given = f"{path}: {error.given}" if error.given is not None else path
        raise InputError(error.summary, given=given, advice=error.advice) from error


def _ours(text: str, infotext: str | None) -> PictureParameters:
    """Returns what the chunk ``hidiff`` says; the other chunk is only kept."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"it is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise _malformed(f"it is no object: {text[:60]!r}")
    settings: dict[str, Any] = {}
    for name, field in SETTINGS.items():
        if name in facts and field.kind in ("text", "whole", "number"):
            settings[name] = _typed(facts, name, TYPES[field.kind][-1])
    settings |= _sizes(facts)
    _check_facts(facts)
    try:
        read = None if infotext is None else read_infotext(infotext)
    except InputError:
        read = None  # somebody changed it, and nothing is taken from it
    return PictureParameters(_typed(facts, "prompt", str), settings, facts, read)


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Refuses facts beside the settings that a bundle cannot be compared with."""
    kinds = {
        str: ("schedule", "model", "model_sha256", "family", "precision"),
        int: ("width", "height", "batch", "index"),
    }
    for kind, names in kinds.items():
        for name in facts.keys() & set(names):
            _typed(facts, name, kind)
    for name, kind in (("given", list), ("lora", list), ("phases", dict), ("weights", dict)):
        if not isinstance(facts.get(name, kind()), kind):
            raise _malformed(f"{name} is {facts[name]!r}")


def _sizes(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns SDXL's sizes and crops, those left out that would be filled in alike."""
    own, negative = (_time_ids(facts, name) for name in ("time_ids", "negative_time_ids"))
    size = (facts.get("height"), facts.get("width"))
    found = {name: pair for name, pair in own.items() if pair != ((0, 0) if name == "crops" else size)}
    for name, pair in negative.items():
        if pair != own.get(name) or (name == "crops" and pair != (0, 0)):
            found[f"negative_{name}"] = pair
    return found


def _time_ids(facts: Mapping[str, Any], name: str) -> dict[str, tuple[int, int]]:
    values = facts.get(name)
    if values is None:
        return {}
    numbers = values if isinstance(values, list) else []
    whole = all(type(number) is int or (isinstance(number, float) and number.is_integer()) for number in numbers)
    if not whole or len(numbers) != 2 * len(_SIZES):
        raise _malformed(f"{name} is {values!r}, expected {2 * len(_SIZES)} whole numbers")
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return {size: (int(first), int(second)) for size, (first, second) in zip(_SIZES, pairs, strict=True)}


def _typed(facts: Mapping[str, Any], name: str, kind: type) -> Any:
    value = facts.get(name)
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
        raise _malformed(f"{name} is {value!r}, expected {_WHAT[kind]}")
    return value


def _of_web_ui(texts: Mapping[str, str], comment: str | None) -> PictureParameters:
    """Returns what a web UI's text says; other programs are refused by name."""
    text = texts.get(PARAMETERS, comment)
    if text is None or not text.strip():
        raise _foreign(texts)
    if text.lstrip().startswith("{"):
        name = (
            "SwarmUI" if "sui_image_params" in text else "Fooocus" if "fooocus_scheme" in texts else "another program"
        )
        raise _not_read(name, "its settings are JSON of its own", PARAMETERS)
    infotext = read_infotext(text)
    return PictureParameters(infotext.prompt, _web_settings(infotext), {}, infotext)


def _web_settings(infotext: Infotext) -> dict[str, Any]:
    """Returns the settings that are the same everywhere."""
    names = {
        "Steps": "steps",
        "CFG scale": "guidance_scale",
        "CFG rescale": "guidance_rescale",
        "Seed": "seed",
        "Denoising strength": "strength",
    }
    found: dict[str, Any] = {} if infotext.negative_prompt is None else {"negative_prompt": infotext.negative_prompt}
    for web, name in names.items():
        if web in infotext.settings:
            found[name] = web_number(infotext.settings, web, whole=SETTINGS[name].kind == "whole")
    return found


def web_number(settings: Mapping[str, str], name: str, *, whole: bool) -> Any:
    """Returns a web UI's setting as a number.

    Raises:
        InputError: it is none.
    """
    try:
        return int(settings[name]) if whole else float(settings[name])
    except ValueError as error:
        raise InputError(
            f"The picture's {name} is not {'a whole' if whole else 'a'} number.",
            given=f"{name}: {settings[name][:60]}",
            advice="Give the prompt and the settings as options.",
        ) from error


def _decoded(found: object) -> str | None:
    """EXIF's comment as text; None where there is none."""
    if isinstance(found, str):
        return found
    if not isinstance(found, bytes):
        return None
    encoding, text = found[:8], found[8:]
    if encoding == _UTF16:  # of either byte order: the zeros of its Latin letters tell
        text = text[: len(text) // 2 * 2]
        big = text[::2].count(0) >= text[1::2].count(0)
        return text.decode("utf-16-be" if big else "utf-16-le", "replace").strip("\0\ufeff")
    if encoding in (_ASCII, _UNDEFINED):
        return text.decode("utf-8", "replace").strip("\0")
    return found.decode("utf-8", "replace").strip("\0")


def _foreign(texts: Mapping[str, str]) -> InputError:
    """Returns what a picture without the text is: another program's, or one that says nothing."""
    if texts.get("Software") == "NovelAI":
        return _not_read("NovelAI", "its settings are JSON of its own", "Comment")
    for key, (program, reason) in _OTHERS.items():
        if key in texts:
            return _not_read(program, reason, key)
    kept = f"its text is {', '.join(sorted(texts))}" if texts else "it has no text at all"
    return InputError(
        "The picture does not say how it was made.",
        given=kept,
        advice="Give the file as hidiff or a web UI wrote it: sites and editors that save it again leave this out.",
    )


def _not_read(program: str, reason: str, chunk: str) -> InputError:
    return InputError(
        f"The picture was made by {program}: {reason}.",
        given=f"its text {chunk}",
        advice="Give the prompt and the settings as options.",
    )


def _malformed(reason: str) -> InputError:
    return InputError(
        "The picture's text about itself is malformed.",
        given=f"in the chunk {HIDIFF}, {reason}",
        advice="Give the file as it was written, or the prompt and the settings as options.",
    )
