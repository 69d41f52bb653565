"""Prompts from a file: one a line, as text or as JSON with settings of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hidiff_runtime.errors import InputError

_NUMBER = (int, float)
KINDS: dict[str, tuple[type, ...]] = {
    "negative_prompt": (str, list),
    "seed": (int,),
    "steps": (int,),
    "guidance_scale": _NUMBER,
    "guidance_rescale": _NUMBER,
    "sampler": (str,),
    "eta": _NUMBER,
    "strength": _NUMBER,
    "conditioning_scale": _NUMBER,
    "clip_skip": (int,),
    "long_prompt": (str,),
    "original_size": (list,),
    "crops": (list,),
    "target_size": (list,),
    "negative_original_size": (list,),
    "negative_crops": (list,),
    "negative_target_size": (list,),
    "image": (str,),
    "mask": (str,),
    "control_image": (str,),
}
"""What a JSON line may set beside ``prompt``, and of which type; pictures are paths from the file's folder."""

PICTURES = ("image", "mask", "control_image")


@dataclass(frozen=True)
class Prompt:
    """A prompt with what it settles for itself.

    Args:
        text: the prompt; several for a batch.
        settings: by the names of `KINDS`.
        line: of the file, from 1; 0 where it comes from the command line.
    """

    text: str | tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    line: int = 0


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """The prompts in a UTF-8 file; a line that begins with ``{`` is JSON, blank lines are passed over.

    Raises:
        InputError: it cannot be read, has no prompt, or a line is not one; the line is named.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        told = (error.strerror if isinstance(error, OSError) else "") or str(error)
        raise InputError(
            "The prompts cannot be read.", given=f"{path}: {told}", advice="Give a text file in UTF-8."
        ) from error
    lines = enumerate(text.split("\n"), 1)
    found = tuple(_prompt(path, number, line.strip()) for number, line in lines if line.strip())
    if not found:
        raise InputError("There are no prompts in the file.", given=path, advice="Write one prompt a line.")
    return found


def _prompt(path: Path, number: int, line: str) -> Prompt:
    if not line.startswith("{"):
        return Prompt(line, line=number)
    try:
        given: dict[str, Any] = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _wrong(path, number, f"is not JSON: {error}") from error
    text = given.pop("prompt", None)
    many = isinstance(text, list) and all(isinstance(part, str) for part in text)
    if not isinstance(text, str) and not many:
        raise _wrong(path, number, f"has no prompt that is text: {text!r}")
    settings: dict[str, Any] = {}
    for name, value in given.items():
        if name not in KINDS:
            raise _wrong(path, number, f"has {name!r}, which is none of prompt, {', '.join(KINDS)}")
        if not isinstance(value, KINDS[name]) or isinstance(value, bool):
            raise _wrong(path, number, f"has {name}: {value!r}, of the wrong type")
        settings[name] = path.parent / str(value) if name in PICTURES else value
    return Prompt(text if isinstance(text, str) else tuple(text), settings, number)


def _wrong(path: Path, number: int, reason: str) -> InputError:
    return InputError(
        "A line of the prompts is wrong.",
        given=f"{path}, line {number}: it {reason}",
        advice='Write a prompt, or JSON such as {"prompt": "a lighthouse", "seed": 3}.',
    )
