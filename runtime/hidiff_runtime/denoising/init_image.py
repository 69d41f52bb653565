"""The picture that a run starts from, as latents, and how much of it stays.

Follows diffusers' pipelines. Image-to-image noises the picture as far as the run's first timestep. Inpainting does too,
except at strength 1, where it starts from noise alone; where the UNet has no channels for the mask, what lies outside
it is put back after each evaluation, with the same noise at every step and none after the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hidiff_runtime.denoising.conditioning import INPAINTING, Array, check_array, takes_channels
from hidiff_runtime.errors import InputError
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.sampling.scheduler_state import SamplerState, Schedule

MaskBlend = Callable[[Array, int], Array]
"""Puts the picture back outside the mask, in latents that come after so many evaluations."""


@dataclass(frozen=True)
class InitImage:
    """A picture to start from.

    Args:
        latents: float32 ``[batch, channels, height, width]``.
        mask: float32 ``[batch, 1, height, width]`` for the blend; None where all is painted, or the UNet sees the mask.
        from_noise: whether the run starts from noise alone.
    """

    latents: Array
    mask: Array | None
    from_noise: bool

    @classmethod
    def of(
        cls, manifest: Manifest, image_latents: Any, strength: float | None, conditions: dict[str, Any]
    ) -> InitImage | None:
        """Checks what the caller gave; None for a run from noise.

        Args:
            strength: how much of the run it goes through; its value is checked with the number of steps.
            conditions: the denoiser's arguments by name. A mask is taken out where it is not an input of the UNet.

        Raises:
            InputError: one of them is missing, or not one that this bundle takes.
        """
        inpainting = takes_channels(manifest)
        if image_latents is None:
            _check_no_strength(strength, conditions["mask"] if not inpainting else None)
            return None
        if strength is None:
            raise InputError(
                "strength is missing.", given="image_latents", advice="Give 0.6, say: 1 keeps least of the picture."
            )
        batch, (channels, *size) = manifest.batch, manifest.latent
        latents = check_array("image_latents", image_latents, (batch, channels, *size))
        if inpainting:
            return cls(latents, None, from_noise=strength == 1)
        mask = conditions["mask"]
        if mask is None:
            return cls(latents, None, from_noise=False)
        conditions["mask"] = None
        return cls(latents, _check_mask(mask, (batch, 1, *size)), from_noise=strength == 1)

    def start(self, schedule: Schedule, noise: Array) -> SamplerState:
        """Returns the run before its first evaluation."""
        return schedule.start(noise) if self.from_noise else schedule.start_from(self.latents, noise)

    def blend(self, schedule: Schedule, noise: Array) -> MaskBlend | None:
        """Returns what each evaluation is followed by, in float32 as in diffusers; None for nothing."""
        if self.mask is None:
            return None
        mask, picture = self.mask, self.latents

        def blended(latents: Array, done: int) -> Array:
            kept = schedule.noised(picture, noise, done) if done < len(schedule) else picture
            found: Array = (1 - mask) * kept + mask * latents
            return found

        return blended


def _check_no_strength(strength: float | None, mask: Any) -> None:
    if mask is not None:
        raise InputError(
            "A mask needs image_latents.",
            given="mask, and a UNet without inpainting channels",
            advice=f"Give image_latents and strength too, or use an inpainting bundle, which takes {INPAINTING[1]}.",
        )
    if strength is not None:
        raise InputError(
            "strength is for runs that start from a picture.",
            given=f"strength {strength}, and no image_latents",
            advice="Give image_latents too, or leave strength out.",
        )


def _check_mask(mask: Any, shape: tuple[int, ...]) -> Array:
    checked = check_array("mask", mask, shape)
    if checked.min() < 0 or checked.max() > 1:
        raise InputError(
            "mask must lie between 0 and 1.",
            given=f"{checked.min():g} to {checked.max():g}",
            advice="1 is where to paint, 0 is where the picture stays.",
        )
    return checked
