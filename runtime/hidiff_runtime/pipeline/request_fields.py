"""The one table of a request's fields, from which Python, commands, prompts' files, servers and bulk jobs take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

Kind = Literal["text", "whole", "number", "flag", "picture", "size", "place"]
Size = tuple[int, int]
Value = TypeVar("Value")

TYPES: dict[Kind, tuple[type, ...]]
TYPES = {"text": (str,), "whole": (int,), "number": (int, float), "flag": (bool,), "picture": (str, bytes)}
"""Python's types of a value, by its kind; a size and a place are two whole numbers."""

CALLED: dict[Kind, str] = {"text": "text", "whole": "a whole number", "number": "a number", "flag": "true or false"}
"""What messages call a value, by its kind; what is said of pictures is for each reader to say."""

ORDERS: dict[Kind, str] = {"size": "height and width", "place": "top and left"}
"""What the two numbers of a pair are."""

STEPS = 50
"""Steps of diffusers' pipelines, or the nearest number that is tabulated."""

LONG_PROMPTS = ("truncate", "chunk")
"""What may become of a prompt that is longer than the text encoder has places."""


@dataclass(frozen=True)
class Field:
    """A field of a request.

    Args:
        name: of `Settings`, but for ``prompt``; on the wire too.
        kind: ``picture`` is the bytes of a PNG, JPEG or WebP file, or a ``data:`` URL of one; ``size`` and ``place``
            are pairs of `ORDERS`, for SDXL alone, which no server takes.
        help: what it is, and what is taken where it is left out, in a few words.
        default: None where the bundle and the task decide.
        bounds: the least and the most that any bundle takes, from outside Python; empty where there are none.
        choices: the texts that it may be; empty where it may be any.
        many: whether it may be texts, one for each picture of the batch.
        group: of options of ``hidiff-run generate``; empty where it has no option.
        option: its names on the command line, with a blank between; empty for its own.
        metavar: what stands for its value there; empty for what is usual with its kind.
    """

    name: str
    kind: Kind
    help: str
    default: Any = None
    bounds: tuple[float, ...] = ()
    choices: tuple[str, ...] = ()
    many: bool = False
    group: Literal["prompts", "run", "pictures", ""] = "run"
    option: str = ""
    metavar: str = ""

    @property
    def flags(self) -> list[str]:
        """The option's names, the longest last."""
        return self.option.split() or [f"--{self.name.replace('_', '-')}"]


def fits(kind: Kind, value: object) -> bool:
    """Says whether a value's type is one of the kind's; for Python, true and false are whole numbers too."""
    return isinstance(value, TYPES[kind]) and (kind == "flag" or not isinstance(value, bool))


def _setting(default: Value, kind: Kind, told: str, **more: Any) -> Value:
    """Returns a dataclass field with its default and, by the names of `Field`, what else the table holds of it."""
    return field(default=default, metadata={"kind": kind, "help": told, **more})


@dataclass(frozen=True)
class Settings:
    """What is asked beside the prompt. Pictures are Pillow's; they and texts may be lists, one each of the batch."""

    # fmt: off
    negative_prompt: str | Sequence[str] | None = _setting(
        None, "text", "what it must not show; only with guidance", many=True, group="prompts",
        option="-n --negative-prompt", metavar="TEXT")
    seed: int = _setting(
        0, "whole", "of everything random; -1 is a random one but in Python (default: 0, and random where OpenAI's "
        "clients leave it out)", bounds=(-1, 2**64 - 1))
    steps: int | None = _setting(
        None, "whole", f"denoising steps (default: {STEPS}, or the nearest the bundle has)", bounds=(1, math.inf))
    width: int | None = _setting(
        None, "whole", "of the picture in pixels, one that the bundle has (default: its first)",
        group="")
    height: int | None = _setting(
        None, "whole", "of the picture in pixels, one that the bundle has (default: its first)",
        group="")
    guidance_scale: float | None = _setting(
        None, "number", "how strongly the prompt is followed (default: 7.5; 5 for SDXL, but for inpainting without a "
        "ControlNet)", bounds=(-1000, 1000), option="--guidance", metavar="SCALE")
    guidance_rescale: float | None = _setting(
        None, "number", "against overexposure by guidance, 0 to 1 (default: the bundle's own)", bounds=(0, 1),
        metavar="SHARE")
    full_run: bool = _setting(False, "flag", "leave nothing out, where the bundle would forecast, not guide or reuse")
    sampler: str | None = _setting(None, "text", "one of the bundle's (default: its own)", metavar="NAME")
    eta: float = _setting(0.0, "number", "of DDIM, 0 to 1 (default: 0)", bounds=(0, 1))
    image: Any = _setting(None, "picture", "what to start from, or with a mask to paint in", group="pictures")
    mask: Any = _setting(None, "picture", "white where to paint in the image, black where to keep it", group="pictures")
    control_image: Any = _setting(
        None, "picture", "what the bundle's ControlNet sees", group="pictures", option="--control")
    strength: float | None = _setting(
        None, "number", "how much of the image is replaced, above 0 to 1 (default: 0.8, 0.3 for SDXL without a "
        "ControlNet; with a mask 1, 0.9999 for SDXL)", bounds=(0, 1), group="pictures")
    conditioning_scale: float = _setting(
        1.0, "number", "of the ControlNet (default: 1)", bounds=(-1000, 1000), group="pictures", metavar="SCALE")
    clip_skip: int = _setting(
        0, "whole", "layers of the text encoders to leave out, counted from the one that is usual (default: 0)",
        bounds=(0, math.inf), group="prompts", metavar="N")
    long_prompt: str = _setting(
        LONG_PROMPTS[0], "text", "truncate cuts what is over 75 tokens, chunk spreads it over the bundle's chunks "
        f"(default: {LONG_PROMPTS[0]})", choices=LONG_PROMPTS, group="prompts")
    original_size: Size | None = _setting(None, "size", "the original's size, as SDXL is told (default: the picture's)")
    crops: Size = _setting((0, 0), "place", "the crop's corner, as SDXL is told (default: 0,0)", option="--crop")
    target_size: Size | None = _setting(None, "size", "the bucket's size, as SDXL is told (default: the picture's)")
    negative_original_size: Size | None = _setting(
        None, "size", "for the negative prompt (default: the same)", group="")
    negative_crops: Size | None = _setting(
        None, "place", "for the negative prompt (default: 0,0 from an image without both mask and ControlNet, and "
        "where both negative sizes are given; else the same)", group="")
    negative_target_size: Size | None = _setting(None, "size", "for the negative prompt (default: the same)", group="")
    resize: bool = _setting(False, "flag", "fit pictures of another size with Lanczos", group="pictures")
    # fmt: on


PROMPT = Field("prompt", "text", "what the picture shows", many=True, option="-p --prompt", metavar="TEXT")

SETTINGS = {each.name: Field(name=each.name, default=each.default, **each.metadata) for each in fields(Settings)}
"""The fields of `Settings` by their names."""

FIELDS = (PROMPT, *(each for each in SETTINGS.values() if each.kind not in ORDERS))
"""Every field that servers and bulk jobs take, the one that is always needed first."""

BY_NAME = {each.name: each for each in FIELDS}

PICTURES = tuple(each.name for each in FIELDS if each.kind == "picture")
"""What a run may be given beside prompts."""

Settings.__doc__ = f"{Settings.__doc__}\n\nArgs:\n" + "\n".join(
    f"    {each.name}: {each.help}" + (f"; {ORDERS[each.kind]} in pixels." if each.kind in ORDERS else ".")
    for each in SETTINGS.values()
)
