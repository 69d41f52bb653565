"""Conditioning for the command line: read from a file, or random to try a bundle out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.denoising.conditioning import EMBEDDINGS, INPAINTING, takes_channels
from hidiff_runtime.errors import BundleError, InputError
from hidiff_runtime.format.manifest import Manifest, TensorSpec
from hidiff_runtime.format.safetensors import SafetensorsFile
from hidiff_runtime.format.validation import CONTROL_IMAGE
from hidiff_runtime.sampling.torch_rng import TorchGenerator

Arrays = dict[str, NDArray[np.float32]]

NAMES = (*EMBEDDINGS, *(f"negative_{name}" for name in EMBEDDINGS), *INPAINTING, CONTROL_IMAGE, "latents")
"""The denoiser's array arguments."""


def read_embeddings(manifest: Manifest, path: Path) -> tuple[Arrays, Arrays]:
    """Returns the denoiser's array arguments and the ControlNet's residuals in a safetensors file.

    Raises:
        InputError: it is missing or broken, has no ``prompt_embeds``, or has a tensor that no bundle takes.
    """
    arrays = _read(path, "embeddings")
    residuals = {spec.name for spec in _residuals(manifest)}
    unknown = sorted(arrays.keys() - residuals - set(NAMES))
    if unknown or "prompt_embeds" not in arrays:
        raise InputError(
            "These are not embeddings for the denoiser.",
            given=f"{path}: {', '.join(sorted(arrays)) or 'nothing'}",
            advice=f"Name the tensors among {', '.join(NAMES)}; prompt_embeds must be there.",
        )
    given = {name: array for name, array in arrays.items() if name not in residuals}
    return given, {name: array for name, array in arrays.items() if name in residuals}


def read_control_image(path: Path) -> Arrays:
    """Returns the ``control_image`` in a safetensors file.

    Raises:
        InputError: it is missing or broken, or holds anything else.
    """
    arrays = _read(path, f"one {CONTROL_IMAGE}")
    if list(arrays) != [CONTROL_IMAGE]:
        raise InputError(
            f"This is not a {CONTROL_IMAGE}.",
            given=f"{path}: {', '.join(sorted(arrays)) or 'nothing'}",
            advice=f"Name the one tensor in it {CONTROL_IMAGE}.",
        )
    return arrays


def _read(path: Path, content: str) -> Arrays:
    try:
        with SafetensorsFile.open(path) as file:
            return file.arrays()
    except BundleError as error:
        raise InputError(error.summary, given=error.given, advice=f"Give a safetensors file of {content}.") from error


def random_embeddings(manifest: Manifest, seed: int) -> tuple[Arrays, Arrays]:
    """Draws normal noise for everything the bundle takes: the denoiser's array arguments, and the residuals.

    A bundle with a ControlNet gets a control image, uniform noise, in place of residuals.

    Raises:
        InputError: not a seed.
    """
    generator = TorchGenerator(seed)
    given: Arrays = {}
    for name in ("prompt_embeds", "text_embeds"):
        spec = manifest.phases[0].input(name)
        if spec is not None:
            for prefix in ("", "negative_") if manifest.guidance else ("",):
                given[prefix + name] = generator.randn((manifest.batch, *spec.shape[1:]))
    channels, height, width = manifest.latent
    if takes_channels(manifest):
        given["mask"] = np.ones((manifest.batch, 1, height, width), dtype=np.float32)
        given["masked_image_latents"] = generator.randn((manifest.batch, channels, height, width))
    if manifest.controlnet is not None:
        shape = (manifest.batch, 3, manifest.height, manifest.width)
        given[CONTROL_IMAGE] = generator.rand(shape)
        return given, {}
    return given, {spec.name: generator.randn(spec.shape) for spec in _residuals(manifest)}


def _residuals(manifest: Manifest) -> tuple[TensorSpec, ...]:
    return next((record.residuals for record in manifest.phases if record.phase.control), ())
