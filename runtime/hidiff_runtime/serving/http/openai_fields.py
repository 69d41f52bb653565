"""OpenAI's own fields: which of their values can be obeyed here, and what to do instead of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hidiff_runtime.pipeline.image_metadata import FORMAT_NAMES
from hidiff_runtime.serving.http.errors import ApiError

UNSUPPORTED = {
    "style": (
        "for the retired DALL-E 3; this server's pictures follow the prompt alone",
        "describe the style in the prompt, and leave style out",
    ),
    "input_fidelity": (
        "for how closely an image's details are kept; this server has strength for that, and a smaller one keeps more",
        "give strength, and leave input_fidelity out",
    ),
    "complexity": (
        "for how long its models plan a picture; this server's work is counted in steps",
        "give steps, and leave complexity out",
    ),
    "markup": (
        "for drawings over an image that guide the edit; this server reads none",
        "give a mask that says where to paint, and leave markup out",
    ),
    "frame_count": ("for animated GIFs; this server makes still pictures", "leave frame_count out"),
    "frame_duration_ms": ("for animated GIFs; this server makes still pictures", "leave frame_duration_ms out"),
    "svg": ("for SVG drawings; this server makes pictures of pixels", "leave svg out"),
}
"""Fields that no value of can be obeyed: what they are OpenAI's for and why not here, and what to do."""


@dataclass(frozen=True)
class Choice:
    """A field whose values are among a few.

    Args:
        taken: values that are obeyed.
        others: OpenAI's values that cannot be.
        reason: why not.
    """

    taken: tuple[str, ...]
    others: tuple[str, ...] = ()
    reason: str = ""


CHOICES = {
    "response_format": Choice(("b64_json",), ("url",), "keeps no pictures that a URL could lead to"),
    "output_format": Choice(FORMAT_NAMES, ("gif", "svg"), "makes still pictures of pixels"),
    "background": Choice(("auto", "opaque"), ("transparent",), "makes opaque pictures"),
    "quality": Choice(
        ("auto", "standard"),
        ("low", "medium", "high", "xhigh", "max", "hd"),
        "has steps for that, and more of them cost as much more time",
    ),
    "moderation": Choice(("auto", "low")),
}
"""Fields that some values of can be obeyed. ``standard`` was DALL-E's name for the quality that is usual."""


def refuse_unsupported(values: Mapping[str, object]) -> None:
    """Refuses what is OpenAI's and cannot be obeyed here; None is as good as leaving out.

    Raises:
        ApiError: says so, and what to do instead.
    """
    for name, value in values.items():
        if value is None:
            continue
        if name in UNSUPPORTED:
            why, advice = UNSUPPORTED[name]
            raise ApiError(400, f"{name} is OpenAI's {why}: {advice}.", code="unsupported_parameter", param=name)
        if name in CHOICES and value not in CHOICES[name].taken:
            raise _refused_value(name, value, CHOICES[name])


def _refused_value(name: str, value: object, choice: Choice) -> ApiError:
    known = " or ".join(repr(each) for each in choice.taken)
    if value in choice.others:
        told = f"{name} {value!r} is OpenAI's; this server {choice.reason}: give {known}, or leave {name} out."
        return ApiError(400, told, code="unsupported_value", param=name)
    return ApiError(
        400, f"{name} must be {known}: give one of these, or leave {name} out.", code="invalid_value", param=name
    )
