"""A request read from plain values, as servers and bulk jobs are sent them, within what they take at most."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.image_processing import decode_picture, fitted_pictures, pillow
from hidiff_runtime.pipeline.request_fields import BY_NAME, CALLED, PICTURES, Field, Settings, fits
from hidiff_runtime.sampling.torch_rng import SEED_MAX, SEED_MIN

if TYPE_CHECKING:
    from PIL.Image import Image

    from hidiff_runtime.pipeline.pipeline import Pipeline
    from hidiff_runtime.pipeline.request import Request

DATA = "data:"
"""How the URL of a picture begins that holds the picture itself."""

RANDOM = -1
"""The seed that asks for a random one, as in web UIs."""

DRAWN = 2**32
"""Seeds that are drawn are below this; a page's JavaScript holds them exactly."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; looked at before any work begins.

    Args:
        prompt_characters: of a prompt, and of a negative prompt.
        image_bytes: of an encoded picture that is sent.
        image_pixels: of that picture once it is decoded.
        steps: denoising steps of a run.
        pictures: runs that one request may ask for at once.

    Raises:
        InputError: one is not a positive whole number.
    """

    prompt_characters: int = 2000
    image_bytes: int = 16 * 2**20
    image_pixels: int = 32 * 2**20
    steps: int = 150
    pictures: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise InputError(
                    f"The limit {field.name} must be a positive whole number.",
                    given=repr(value),
                    advice=f"Leave it out for {field.default}.",
                )


def with_seed(values: Mapping[str, object]) -> Mapping[str, object]:
    """Draws the seed where it is `RANDOM`, among values by the names of `FIELDS`.

    Raises:
        InputError: it is beyond the last one, or negative otherwise: those are torch's other names of the largest.
    """
    seed = values.get("seed")
    if type(seed) is not int or 0 <= seed <= SEED_MAX:
        return values
    if seed != RANDOM:
        raise InputError(
            "seed must be a whole number from 0 to 2**64 - 1, or -1 for a random one.",
            given=seed,
            advice=f"{seed + 2**64} is the same seed." if SEED_MIN <= seed < 0 else "Give one of these.",
        )
    return {**values, "seed": secrets.randbelow(DRAWN)}


def read_request(pipeline: Pipeline, values: Mapping[str, object], limits: Limits) -> Request:
    """Returns the request that plain values ask for, within the limits, checked against the bundle. Opens no engine.

    Args:
        values: by the names of `FIELDS`: str, int, float, bool, and for pictures bytes, or what `read_picture` gives.
            None stands for left out.

    Raises:
        InputError: an unknown name, a value of the wrong type, beyond a limit, or not one the bundle takes.
    """
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        if name not in BY_NAME:
            raise InputError("There is no such field.", given=name[:60], advice=f"There are {', '.join(BY_NAME)}.")
        _check(BY_NAME[name], value, limits)
    if "prompt" not in given:
        raise InputError("The prompt is missing.", advice="Say what the picture is to show.")
    settings: dict[str, Any] = dict(given)
    sides = {side: value for side in ("width", "height") if type(value := given.get(side)) is int}
    bucket = pipeline.bundle.sized(**sides).manifest
    size = (bucket.width, bucket.height)
    for name in [name for name in given if name in PICTURES]:
        picture: Any = read_picture(name, given[name], limits)
        if given.get("resize"):  # now: all of them, decoded, may be many times as large
            picture = fitted_pictures(picture, size, name, resize=True)
        settings[name] = picture
    prompt = settings.pop("prompt")
    request = pipeline.request(prompt, Settings(**settings))
    if request.settings.steps is not None:  # the number that is usual where none is given
        _check_steps(request.settings.steps, limits)
    return request


def _check(field: Field, value: object, limits: Limits) -> None:
    """Refuses a value of the wrong type, or beyond a limit."""
    if not fits(field.kind, value) and not (field.kind == "picture" and isinstance(value, pillow().Image)):
        wanted = CALLED.get(field.kind, "the bytes of a picture file, or a data: URL of one")
        raise InputError(f"{field.name} must be {wanted}.", given=type(value).__name__)
    if isinstance(value, str) and field.kind == "text" and len(value) > limits.prompt_characters:
        raise InputError(
            f"{field.name} is too long.",
            given=f"{len(value)} characters",
            advice=f"This server takes up to {limits.prompt_characters}.",
        )
    if field.name == "steps" and isinstance(value, int):
        _check_steps(value, limits)


def _check_steps(steps: int, limits: Limits) -> None:
    if steps > limits.steps:
        raise InputError("These are too many steps.", given=steps, advice=f"This server takes up to {limits.steps}.")


def read_picture(name: str, value: Any, limits: Limits) -> Image:
    """Returns the picture in a file's bytes or in a ``data:`` URL; Pillow's own as it is.

    Raises:
        InputError: it is too large, broken, or not a picture.
    """
    if isinstance(value, pillow().Image):
        found: Image = value
        return found
    content = value.encode("ascii", "replace") if isinstance(value, str) else value  # "?" is not base64 either
    encoded = content.startswith(DATA.encode())
    if isinstance(value, str) and not encoded:
        raise InputError(f"{name} must be a data: URL where it is text.", given=repr(value[:20]))
    # Base64 takes four characters for three bytes; what is longer is refused without being decoded.
    if len(content) > (limits.image_bytes * 4 // 3 + 128 if encoded else limits.image_bytes):
        raise _too_large(name, len(content), limits)
    if encoded:
        head, comma, body = content.partition(b",")
        if not comma or not head.endswith(b";base64"):
            raise InputError(f"{name} must be a data: URL in base64.", given=repr(head[:40].decode(errors="replace")))
        try:
            content = base64.b64decode(body, validate=True)
        except binascii.Error as error:
            raise InputError(f"{name} is not base64.", given=error) from error
        if len(content) > limits.image_bytes:
            raise _too_large(name, len(content), limits)
    return decode_picture(content, name, pixels=limits.image_pixels)


def _too_large(name: str, size: int, limits: Limits) -> InputError:
    return InputError(
        f"{name} is too large.", given=f"{size} bytes", advice=f"This server takes up to {limits.image_bytes}."
    )
