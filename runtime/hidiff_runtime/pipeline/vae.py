"""Latents to pictures and back by the bundle's VAE, tile by tile; and cheap previews without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.backends.protocol import Session
from hidiff_runtime.bundle import Bundle
from hidiff_runtime.denoising.conditioning import Array
from hidiff_runtime.errors import BundleError, EngineError, InputError
from hidiff_runtime.finite_values import count_nonfinite
from hidiff_runtime.format.specs import VaeRecord
from hidiff_runtime.pipeline.tiling import TilePlan
from hidiff_runtime.sampling.torch_rng import RandomStream

Progress = Callable[[int, int], None]
"""Called after each tile with the tiles done and the tiles in all; what it raises ends the work."""

PIXELS = 8
"""Pixels of a picture for each of its latents, along either side."""

_SMALLEST_LOGVAR, _LARGEST_LOGVAR = -30.0, 20.0


def decode(bundle: Bundle, latents: Array, *, progress: Progress | None = None) -> Array:
    """Returns the pictures of latents, float32 [batch, 3, 8 * height, 8 * width], from about -1 to 1 and not clipped.

    Beside what it gives, it holds one tile at a time.

    Args:
        bundle: its VAE decodes; the engine is open only meanwhile, unless the bundle keeps all engines.
        latents: [batch, 4, height, width], as the denoiser gives them: times the scaling factor.
        progress: told of each tile.

    Raises:
        BundleError: the bundle has no VAE.
        EngineError: the engine does not load or fails, or gives values that are no numbers.
        InputError: the latents have another shape, or are smaller than a tile.
    """
    record = vae_of(bundle)
    with bundle.network("vae_decoder") as session:
        return decode_tiles(session, record, latents, progress)


def encode(bundle: Bundle, images: Array, generator: RandomStream) -> Array:
    """Returns the latents of pictures, float32 [batch, 4, height / 8, width / 8], times the scaling factor.

    They are drawn from the encoder's distribution as diffusers' image-to-image pipelines do: the whole batch's noise
    at once, or each picture's from a stream of its own.

    Args:
        images: [batch, 3, height, width], -1 to 1.
        generator: the run's; it is drawn from once.

    Raises:
        BundleError: the bundle has no VAE.
        EngineError: the engine does not load or fails, or gives values that are no numbers.
        InputError: the pictures have another shape, or are smaller than a tile.
    """
    record = vae_of(bundle)
    with bundle.network("vae_encoder") as session:
        moments = encode_tiles(session, record, images)
    return np.asarray(sample(moments, generator) * np.float32(record.scaling_factor), np.float32)


def vae_of(bundle: Bundle) -> VaeRecord:
    """Returns the record of the bundle's VAE. Raises BundleError when it has none."""
    if bundle.manifest.vae is None:
        raise BundleError(
            "The bundle has no VAE.",
            given=bundle.root,
            advice="Take latents, or build it with vae: true in the recipe.",
        )
    return bundle.manifest.vae


def preview(record: VaeRecord, latents: Array) -> NDArray[np.uint8]:
    """Makes small pictures of latents without the decoder, uint8 [batch, height, width, 3]: one pixel for each latent.

    A linear map from the latent channels to red, green and blue, fitted to the decoder when the bundle was built.

    Args:
        latents: [batch, 4, height, width], as the denoiser gives them: times the scaling factor.
    """
    rows = np.asarray(record.preview, np.float32)
    colours = np.moveaxis(latents, 1, -1) @ rows[:-1] + rows[-1]
    return np.asarray(np.rint((np.clip(colours, -1, 1) + 1) * 127.5), np.uint8)


def sample(moments: Array, generator: RandomStream) -> Array:
    """Returns a draw from the encoder's distribution, [batch, 4, height, width] from moments [batch, 8, height, width].

    As diffusers' ``DiagonalGaussianDistribution`` draws it: mean plus deviation times a normal, the logarithm of the
    variance clamped to -30 and 20.
    """
    mean, logvar = np.split(moments, 2, axis=1)
    deviation = np.exp(np.float32(0.5) * np.clip(logvar, _SMALLEST_LOGVAR, _LARGEST_LOGVAR))
    return np.asarray(mean + deviation * generator.randn(mean.shape), np.float32)


def decode_tiles(session: Session, record: VaeRecord, latents: Array, progress: Progress | None = None) -> Array:
    """Returns what `decode` gives, by an open session of the decoder."""
    channels = record.decoder.inputs[0].shape[1]
    plan = _plan(record, latents, channels, latents.shape[-2:])
    scaled = np.asarray(latents, np.float32) / np.float32(record.scaling_factor)
    return _blended(session, plan, (scaled, "latents", 1), ("image", 3, PIXELS), progress)


def encode_tiles(session: Session, record: VaeRecord, images: Array, progress: Progress | None = None) -> Array:
    """Encodes to moments, [batch, 8, height / 8, width / 8], by an open session of the encoder."""
    height, width = images.shape[-2:]
    if height % PIXELS or width % PIXELS:
        given, advice = f"{width}x{height}", f"Scale or crop it to multiples of {PIXELS}."
        raise InputError("A picture's sides are not multiples of 8 pixels.", given=given, advice=advice)
    plan = _plan(record, images, 3, (height // PIXELS, width // PIXELS))
    channels = record.encoder.outputs[0].shape[1]
    return _blended(session, plan, (images, "image", PIXELS), ("moments", channels, 1), progress)


def _plan(record: VaeRecord, array: Array, channels: int, size: tuple[int, ...]) -> TilePlan:
    if array.ndim != 4 or array.shape[1] != channels:
        raise InputError(
            f"The VAE takes [batch, {channels}, height, width].",
            given=list(array.shape),
            advice="Give one or more pictures of the bundle's size.",
        )
    height, width = record.decoder.inputs[0].shape[-2:]
    return TilePlan.of((size[0], size[1]), (height, width), record.overlap // PIXELS)


def _blended(
    session: Session,
    plan: TilePlan,
    source: tuple[Array, str, int],
    target: tuple[str, int, int],
    progress: Progress | None,
) -> Array:
    """Returns the session's results for every tile of every picture, blended into one array.

    Args:
        source: what tiles are cut from, the input it is for, and its places for each latent.
        target: the output, its channels, and its places for each latent.
    """
    array, given, coarse = source
    wanted, channels, fine = target
    size = (plan.rows.length * fine, plan.columns.length * fine)
    blended = np.zeros((len(array), channels, *size), np.float32)
    total = len(array) * len(plan)
    done = 0
    for index in range(len(array)):
        places = zip(plan.places(coarse), plan.places(fine), plan.shares(fine), strict=True)
        for (rows, columns), (tall, wide), shares in places:
            tile = np.ascontiguousarray(array[index : index + 1, :, rows, columns], np.float32)
            result = session.run({given: tile})[wanted]
            _check(result, wanted)
            blended[index, :, tall, wide] += result[0] * shares
            done += 1
            if progress is not None:
                progress(done, total)
    return blended


def _check(result: NDArray[Any], name: str) -> None:
    if bad := count_nonfinite(result):
        raise EngineError(
            "The VAE gave values that are no numbers.",
            given=f"{bad} of {result.size} in {name}",
            advice="Look whether the latents are finite; 'hidiff-run check' tells whether engines compute as built.",
        )
