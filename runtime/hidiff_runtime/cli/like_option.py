"""``--like``: a picture's settings for a command, below those of its options."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hidiff_runtime.console.printing import write
from hidiff_runtime.pipeline.image_settings import Likeness, settings_like

if TYPE_CHECKING:
    from hidiff_runtime.bundle import Bundle
    from hidiff_runtime.pipeline.image_parameters import PictureParameters


def likeness(
    bundle: Bundle, parameters: PictureParameters | None, given: Mapping[str, Any], *, with_prompt: bool
) -> Likeness:
    """Returns what a command asks of a bundle; says on standard error what will not be as in the picture.

    Args:
        parameters: what the picture says; None without one.
        given: the settings of the options.
        with_prompt: whether the picture's prompt is to be drawn.

    Raises:
        InputError: the picture cannot be drawn again with this bundle.
    """
    if parameters is None:
        return Likeness("", given, ())
    like = settings_like(bundle, parameters, given, with_prompt=with_prompt)
    for warning in like.warnings:
        write(f"warning: {warning}\n", sys.stderr)
    return like
