"""What is transparent in the pictures of an edit: where to paint, as OpenAI has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.image_processing import fitted_pictures, latent_mask, mask_array

if TYPE_CHECKING:
    from PIL.Image import Image

    from hidiff_runtime.format.manifest import Manifest

OPAQUE = 250
"""Alpha from here on is opaque: some programs export 254 where nothing was erased."""

HALF = 128
"""Alpha below this is a hole, as a mask that is at least half white paints."""


def white_where_transparent(mask: Image) -> Image:
    """Returns a mask as a bundle takes it: OpenAI's is transparent where to paint; an opaque one is white there."""
    if not mask.has_transparency_data:
        return mask
    return mask.convert("RGB") if _least_alpha(mask) >= OPAQUE else _inverted_alpha(mask)


def split_hole(image: Image, manifest: Manifest) -> tuple[Image, Image | None]:
    """Returns the picture without transparency, and a mask that is white where it was transparent.

    Less than half transparent is kept with its colors, so that the soft edge of a hole may be anything.

    Returns:
        The picture, and None for a mask where it is opaque.

    Raises:
        InputError: it is transparent everywhere, or in places that are no hole that can be painted in.
    """
    if not image.has_transparency_data:
        return image, None
    picture, least = image.convert("RGBA").convert("RGB"), _least_alpha(image)
    if least >= OPAQUE:
        return picture, None
    mask = _inverted_alpha(image)
    if np.asarray(mask).min() > 255 - HALF:
        raise InputError(
            "The image is transparent everywhere.",
            given="no pixel that is at least half opaque",
            advice="Keep a part of it opaque, or ask for a new picture without an image.",
        )
    bundle = mask_array(fitted_pictures(mask, (manifest.width, manifest.height), "mask", resize=True))
    if not latent_mask(bundle, manifest.latent).any():
        raise InputError(
            "The image is transparent in places, but has no hole that is large enough to paint in.",
            given=f"alpha from {least}",
            advice="Erase at least 8 x 8 pixels (alpha 0), or save the image without transparency.",
        )
    return picture, mask


def without_transparency(image: Image) -> Image:
    """Returns the picture that comes with a mask. Raises InputError where it has a hole of its own."""
    if not image.has_transparency_data:
        return image
    least = _least_alpha(image)
    if least < OPAQUE:
        raise InputError(
            "The image is transparent in places, and there is a mask too.",
            given=f"alpha from {least}",
            advice="Leave the mask out to paint where it is transparent, or save the image without transparency.",
        )
    return image.convert("RGBA").convert("RGB")


def _least_alpha(image: Image) -> int:
    return int(np.asarray(image.convert("RGBA").getchannel("A")).min())


def _inverted_alpha(image: Image) -> Image:
    found: Image = image.convert("RGBA").getchannel("A").point(lambda value: 255 - value)
    return found
