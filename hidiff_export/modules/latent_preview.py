"""A picture of latents for next to nothing: a linear map from a latent to a colour, fitted to the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from hidiff_export.families.family import LATENT_CHANNELS, PIXELS_PER_LATENT

_SIDE = 32
_PICTURES = 2
_OCTAVES = 4


def fit_preview(vae: Any) -> list[list[float]]:
    """Returns factors for red, green and blue, -1 to 1: a row for each channel of a scaled latent, and a row to add.

    Least squares over what the checkpoint's own decoder makes of smooth random latents, averaged over the pixels of
    each latent. The same VAE gives the same factors.

    Args:
        vae: diffusers' ``AutoencoderKL``.
    """
    latents = _smooth_noise()
    with torch.inference_mode():
        scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
        pictures = torch.cat([vae.decode(one, return_dict=False)[0].float() for one in scaled.split(1)])
    colours = functional.avg_pool2d(pictures.clamp(-1, 1), PIXELS_PER_LATENT)
    known = functional.pad(_by_pixel(latents), (0, 1), value=1.0)
    rows = torch.linalg.lstsq(known.double(), _by_pixel(colours).double()).solution.tolist()
    # The last digits are the machine's; these are a hundredth of what a byte tells apart.
    return [[round(value, 4) for value in row] for row in rows]


def _smooth_noise() -> torch.Tensor:
    """Returns normal latents with details of every size, as pictures have: float32 [pictures, 4, side, side]."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(_PICTURES, LATENT_CHANNELS, _SIDE, _SIDE)
    for octave in range(_OCTAVES):
        side = _SIDE >> octave
        noise = torch.randn(_PICTURES, LATENT_CHANNELS, side, side, generator=generator)
        total += functional.interpolate(noise, size=(_SIDE, _SIDE), mode="bilinear")
    return total / total.std()


def _by_pixel(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.movedim(1, -1).flatten(0, -2)
