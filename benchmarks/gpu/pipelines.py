"""Whole runs of diffusers: stock, under our HiDiffusion, and under the published package; and the decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.cases import extreme
from benchmarks.gpu.networks import EAGER, PUBLISHED, STOCK, unet_of
from hidiff_export.diffusers_api.apply_hidiffusion import apply_hidiffusion
from hidiff_export.families.family import LATENT_CHANNELS
from hidiff_export.recipe import Recipe
from hidiff_export.reference.diffusers_run import RunInputs
from hidiff_export.reference.random_inputs import arrays
from hidiff_export.scheduler_tables.diffusers_schedulers import build_scheduler
from hidiff_export.scheduler_tables.noise_schedule import resolve_noise_schedule
from tests.parity import published

Array = NDArray[Any]
Run = Callable[[int, int], Array]
"""``run(steps, seed)``: the final latents, float32."""

WAYS = (PUBLISHED, EAGER, STOCK)
_DECODED_AT_ONCE = 256


@contextmanager
def run_of(
    way: str,
    recipe: Recipe,
    case: str,
    device: str,
    *,
    rehearse: bool,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Iterator[Run]:
    """A pipeline whose prompt is random embeddings.

    Args:
        way: one of `WAYS`.
        dtype: of the arithmetic; the recipe's precision if left out.
        options: of `apply_hidiffusion`, where that is the way.
    """
    unet = unet_of(recipe, device, dtype)
    config = resolve_noise_schedule(recipe).config
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    parts |= {"unet": unet, "scheduler": build_scheduler(recipe.sampler[0].value, config)}
    if recipe.family.is_sdxl:
        parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, f"StableDiffusion{'XL' if recipe.family.is_sdxl else ''}Pipeline")(**parts)
    pipe.register_to_config(_name_or_path=published.checkpoint_name(recipe.family, recipe.task))
    pipe.set_progress_bar_config(disable=True)
    arguments = _arguments(recipe, unet, device)

    def run(steps: int, seed: int) -> Array:
        torch.manual_seed(seed)  # the published package draws its shifts from the global generator
        made = pipe(**arguments, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed))
        latents: Array = made[0].to("cpu", torch.float32).numpy()
        return latents

    if way == STOCK:
        yield run
    elif way == EAGER:
        rule = {"rule": recipe.phase_rule()}
        with apply_hidiffusion(pipe, family=recipe.family, task=recipe.task, **{**rule, **options}):
            yield run
    else:
        with published.applied(pipe, extreme=rehearse and extreme(case)):
            yield run


def _arguments(recipe: Recipe, unet: Any, device: str) -> dict[str, Any]:
    given = RunInputs.of(recipe, unet.config)
    renamed = {"text_embeds": "pooled_prompt_embeds", "negative_text_embeds": "negative_pooled_prompt_embeds"}
    call: dict[str, Any] = {
        renamed.get(name, name): torch.from_numpy(array).to(device, unet.dtype)
        for name, array in arrays(given.arrays).items()
    }
    call |= {"height": recipe.height, "width": recipe.width, "guidance_scale": given.guidance_scale}
    return {**call, "output_type": "latent", "return_dict": False}


class Decoder:
    """diffusers' AutoencoderKL with random weights, the same everywhere.

    Args:
        widths: channels of its levels, the published ones at full size.
        device: torch's name.
    """

    def __init__(self, widths: tuple[int, ...], device: str) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vae = diffusers.AutoencoderKL(
                block_out_channels=widths,
                down_block_types=("DownEncoderBlock2D",) * len(widths),
                up_block_types=("UpDecoderBlock2D",) * len(widths),
                latent_channels=LATENT_CHANNELS,
                layers_per_block=2,
                norm_num_groups=min(32, widths[0]),
            )
        self._vae = vae.requires_grad_(False).eval().to(device)
        self._device = device

    def __call__(self, latents: Array, scaling: float) -> Array:
        """The picture, float32; by tiles where it is large.

        Args:
            latents: as the denoiser leaves them, float32.
            scaling: the checkpoint's ``scaling_factor``.
        """
        if max(latents.shape[-2:]) > _DECODED_AT_ONCE:
            self._vae.enable_tiling()
        with torch.inference_mode():
            picture: Array = self._vae.decode(torch.from_numpy(latents).to(self._device) / scaling)[0].cpu().numpy()
        return picture


def psnr_db(reference: Array, candidate: Array) -> float:
    """Peak signal-to-noise ratio. Random weights give no picture of 0 to 1, so the peak is four standard deviations of
    the reference, as it is of a photograph. Not a number where a picture is not finite.
    """
    expected, found = (np.asarray(picture, dtype=np.float64) for picture in (reference, candidate))
    error = float(np.mean((found - expected) ** 2))
    if not math.isfinite(error):
        return math.nan
    peak = 4 * float(expected.std())
    return 10 * math.log10(peak**2 / error) if error else math.inf
