"""What a run is conditioned on: checked against the graphs, and stacked negative first where guidance is on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.errors import InputError
from hidiff_runtime.finite_values import count_nonfinite, is_finite
from hidiff_runtime.format.manifest import Manifest, TensorSpec

Array = NDArray[np.float32]

EMBEDDINGS = ("prompt_embeds", "text_embeds", "time_ids")
"""Graph inputs that a run is given once; each has a ``negative_`` counterpart where guidance is on."""

INPAINTING = ("mask", "masked_image_latents")
"""Channels that an inpainting UNet takes behind the latents, in this order."""

MOST_SCALE = 1000.0
"""The largest magnitude of a scale: pictures are noise long before it, and float32 sums still hold what it multiplies.

A number that a Python float holds may be beyond float32, and gives NaN that no engine is to blame for.
"""


@dataclass(frozen=True)
class Conditioning:
    """What every evaluation of a run is given alike.

    Args:
        inputs: graph inputs, float32, at the graphs' batch.
        channels: float32 ``[graph batch, 1 + 4, height, width]``, put behind the latents' channels; ``None``
            unless the UNet is an inpainting one.
    """

    inputs: Mapping[str, Array]
    channels: Array | None

    @classmethod
    def of(cls, manifest: Manifest, given: Mapping[str, Array | None]) -> Conditioning:
        """Checks and stacks what the caller gave under the denoiser's own argument names.

        Raises:
            InputError: an array is missing, not wanted, of a wrong shape or type, or not finite.
        """
        left = {name: value for name, value in given.items() if value is not None}
        inputs = {}
        for name in EMBEDDINGS:
            spec = manifest.phases[0].input(name)
            if spec is not None:
                inputs[name] = _stacked(manifest, spec, left)
        channels = _channels(manifest, left)
        for name in left:
            reason = "was built without guidance" if name.startswith("negative_") else "is of another kind"
            raise InputError(
                f"This bundle takes no {name}: it {reason}.",
                given=f"{manifest.family}, {manifest.task}, guidance {'on' if manifest.guidance else 'off'}",
                advice=f"Leave {name} out.",
            )
        return cls(inputs, channels)

    def last(self, rows: int) -> Conditioning:
        """Returns the same for a graph's batch of ``rows``: without guidance the prompts' half, which comes last."""
        inputs = {name: array[-rows:] for name, array in self.inputs.items()}
        return Conditioning(inputs, None if self.channels is None else self.channels[-rows:])

    def model_input(self, latents: Array, rows: int) -> Array:
        """Returns a graph's ``latents``: the pictures', again for guidance, with inpainting channels behind.

        Args:
            latents: ``[batch, channels, height, width]``, scaled.
            rows: of the graph's batch, which is also that of the conditioning.
        """
        stacked = np.concatenate([latents] * (rows // len(latents)))
        return stacked if self.channels is None else np.concatenate([stacked, self.channels], axis=1)


def takes_channels(manifest: Manifest) -> bool:
    """Returns whether the UNet is an inpainting one, which takes mask and picture as channels behind the latents."""
    spec = manifest.phases[0].input("latents")
    return spec is not None and spec.shape[1] != manifest.latent[0]


def check_array(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """Returns ``value`` if it is a finite float32 array of ``shape``.

    Raises:
        InputError: it is not; says what is due.
    """
    due = f"{name} must be a float32 numpy array of shape {list(shape)}."
    if not isinstance(value, np.ndarray):
        raise InputError(due, given=type(value).__name__, advice="Convert a tensor by .float().cpu().numpy().")
    if value.dtype != np.float32:
        raise InputError(due, given=f"dtype {value.dtype}", advice=f"Convert it by {name}.astype('float32').")
    if value.shape != shape:
        raise InputError(
            due, given=f"shape {list(value.shape)}", advice="A bundle's shapes are fixed when it is built."
        )
    if bad := count_nonfinite(value):
        raise InputError(
            f"{name} holds NaN or infinite values.", given=f"{bad} of {value.size}", advice="Check its source."
        )
    return value


def check_scale(name: str, scale: Any, example: str) -> float:
    """Returns a scale that outputs of networks are multiplied by; ``name`` and ``example`` are for messages.

    Raises:
        InputError: it is no finite number, or beyond what float32 sums can take.
    """
    if not is_finite(scale):
        raise InputError(f"{name} must be a finite number.", given=repr(scale), advice=f"Give {example}, say.")
    if abs(scale) > MOST_SCALE:
        raise InputError(
            f"{name} must be a number from {-MOST_SCALE:g} to {MOST_SCALE:g}.",
            given=f"{float(scale):g}",
            advice=f"Give {example}, say.",
        )
    return float(scale)


def is_whole(value: Any) -> bool:
    """Returns whether it is a whole number, Python's or numpy's."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_steps(steps: Any) -> int:
    """Returns the number of steps if it is a whole number; which of them there are is for the sampler's table to say.

    Raises:
        InputError: it is not.
    """
    if not is_whole(steps):
        raise InputError("steps must be a whole number.", given=repr(steps), advice="Give 50, say.")
    return int(steps)


def guided(noise: Array, guidance_scale: float | None, guidance_rescale: float = 0.0) -> Array:
    """Returns the noise to step with, from a graph's output.

    Classifier-free guidance (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598) as diffusers computes it, in
    float32: ``negative + guidance_scale * (positive - negative)``, and the positive half alone up to a scale of 1.
    ``None`` returns ``noise``, which then has no negative half.

    ``guidance_rescale`` above 0 mixes in the same noise with the standard deviation of the positive half, picture by
    picture (Lin et al. 2023, https://arxiv.org/abs/2305.08891, section 3.4); up to a guidance scale of 1 it does
    nothing.
    """
    if guidance_scale is None:
        return noise
    negative, positive = np.split(noise, 2)
    if guidance_scale <= 1:
        return positive
    combined: Array = negative + np.float32(guidance_scale) * (positive - negative)
    return combined if guidance_rescale == 0 else _rescaled(combined, positive, guidance_rescale)


def _rescaled(combined: Array, positive: Array, guidance_rescale: float) -> Array:
    deviations = [
        np.std(half, axis=(1, 2, 3), ddof=1, dtype=np.float64, keepdims=True) for half in (positive, combined)
    ]
    ratio = (deviations[0] / deviations[1]).astype(np.float32)
    kept = np.float32(1 - guidance_rescale)
    rescaled: Array = np.float32(guidance_rescale) * (combined * ratio) + kept * combined
    return rescaled


def check_guidance(manifest: Manifest, guidance_scale: float | None) -> float | None:
    """Returns the scale for :func:`guided`; a bundle without guidance takes none (or, as in diffusers, at most 1).

    Raises:
        InputError: the scale is missing, not a number or beyond bounds, or asks a bundle without guidance for some.
    """
    if guidance_scale is not None:
        guidance_scale = check_scale("guidance_scale", guidance_scale, "7.5")
    if manifest.guidance:
        if guidance_scale is None:
            raise InputError("This bundle was built with guidance and needs a guidance_scale.", advice="Give 7.5, say.")
        return guidance_scale
    if guidance_scale is not None and guidance_scale > 1:
        raise InputError(
            "This bundle was built without guidance.",
            given=f"guidance_scale {guidance_scale}",
            advice="Leave guidance_scale out, or build a bundle with guidance on.",
        )
    return None


def check_rescale(manifest: Manifest, guidance_rescale: float | None) -> float:
    """Returns the rescale for :func:`guided`; the bundle's own where it is ``None``.

    Raises:
        InputError: it is not a number from 0 to 1, or is above 0 for a bundle without guidance.
    """
    if guidance_rescale is None:
        return manifest.guidance_rescale
    if not is_finite(guidance_rescale) or not 0 <= guidance_rescale <= 1:
        raise InputError(
            "guidance_rescale must be a number from 0 to 1.",
            given=repr(guidance_rescale),
            advice="Give 0.7, say; 0 leaves guidance as it is.",
        )
    if guidance_rescale > 0 and not manifest.guidance:
        raise InputError(
            "This bundle was built without guidance: there is nothing to rescale.",
            given=f"guidance_rescale {guidance_rescale}",
            advice="Leave guidance_rescale out, or build a bundle with guidance: true.",
        )
    return float(guidance_rescale)


def _stacked(manifest: Manifest, spec: TensorSpec, left: dict[str, Array]) -> Array:
    shape = (manifest.batch, *spec.shape[1:])
    positive = _taken(manifest, spec.name, shape, left)
    if not manifest.guidance:
        return positive
    name = f"negative_{spec.name}"
    if spec.name == "time_ids" and name not in left:
        return np.concatenate([positive, positive])
    return np.concatenate([_taken(manifest, name, shape, left), positive])


def _taken(manifest: Manifest, name: str, shape: tuple[int, ...], left: dict[str, Array]) -> Array:
    if name in left:
        return check_array(name, left.pop(name), shape)
    if name == "time_ids" and shape[1] == 6:
        size = (manifest.height, manifest.width)
        return np.tile(np.array([*size, 0, 0, *size], dtype=np.float32), (shape[0], 1))
    raise InputError(
        f"{name} is missing.",
        advice=f"This {manifest.family} bundle{' with guidance' if manifest.guidance else ''} needs it: "
        f"float32 of shape {list(shape)}.",
    )


def _channels(manifest: Manifest, left: dict[str, Array]) -> Array | None:
    if not takes_channels(manifest):
        return None
    channels, height, width = manifest.latent
    shapes = zip(INPAINTING, (1, channels), strict=True)
    parts = [_taken(manifest, name, (manifest.batch, depth, height, width), left) for name, depth in shapes]
    return np.concatenate([np.concatenate(parts, axis=1)] * (2 if manifest.guidance else 1))
