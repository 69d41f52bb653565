"""Runs that begin too late: the UNet is told of a picture with little noise, and given noise alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hidiff_runtime.bundle import Bundle
    from hidiff_runtime.pipeline.request import Request

MOST_PICTURE = 0.7
"""The largest part of a picture, of the length of picture and noise, in what a run from noise may begin as. A run of 2
steps with leading timesteps begins at 0.53 and still draws; one of 1 step begins at 1, and gives noise."""


class LateStartWarning(UserWarning):
    """A run will give noise instead of a picture."""


def late_start(bundle: Bundle, request: Request) -> str | None:
    """Returns what is wrong with where a run begins, in a line; None where nothing is."""
    settings = request.settings
    if settings.strength is not None or settings.steps is None:
        return None
    first = bundle.sampler(settings.sampler).schedule(settings.steps, eta=settings.eta).evaluations[0]
    picture, noise = first.noising
    if picture <= MOST_PICTURE * math.hypot(picture, noise):
        return None
    return (
        f"{settings.steps} step{'s' * (settings.steps != 1)} of {settings.sampler} begin at timestep "
        f"{first.timestep:g}, where the UNet expects a picture, and give noise: take more steps, or a bundle built "
        "with timestep_spacing: trailing"
    )


def late_starts(bundle: Bundle, requests: Iterable[Request]) -> tuple[str, ...]:
    """Returns what is wrong with where runs begin, each thing once."""
    told = (late_start(bundle, request) for request in requests)
    return tuple(dict.fromkeys(text for text in told if text is not None))
