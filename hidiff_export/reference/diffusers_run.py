"""A whole run of a real diffusers pipeline with HiDiffusion in force, and what its UNet was given and gave.

The pipeline is diffusers' own for the recipe's task, with its own scheduler and loop. Its prompt is a prompt's
embeddings, or random ones where the bundle has no text encoder. Where the recipe takes residuals but has no ControlNet
of its own, one stands in that gives the same residuals at every step.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from numpy.typing import NDArray
from torch import nn

from hidiff_export.diffusers_api.apply_hidiffusion import apply_hidiffusion
from hidiff_export.families.family import LATENT_CHANNELS, PIXELS_PER_LATENT, Task, Width, controlnet_config
from hidiff_export.families.geometry import UNetGeometry, WindowShape
from hidiff_export.families.graph_io import control_residuals, phase_inputs
from hidiff_export.recipe import Recipe
from hidiff_export.reference.evaluation_plan import RunSchedule
from hidiff_export.reference.random_inputs import Given, arrays, drawn
from hidiff_export.reference.text_vae_reference import PictureNetworks, PromptInputs
from hidiff_export.reference.unet_recorder import RecordedEvaluation, recorded_evaluations
from hidiff_runtime.denoising.conditioning import EMBEDDINGS, INPAINTING
from hidiff_runtime.format.manifest import TensorSpec
from hidiff_runtime.format.validation import CONTROL_IMAGE
from hidiff_runtime.verification.reference_samples import Drawn

Array = NDArray[Any]

GUIDANCE_SCALE = 5.0
SEED = 0
_NO_GUIDANCE = 1.0


@dataclass(frozen=True)
class Networks:
    """What computes the reference, float32.

    Args:
        unet: diffusers' ``UNet2DConditionModel``.
        controlnet: diffusers' ``ControlNetModel`` where the recipe has one.
        pictures: the text encoders and the VAE, where the bundle has any.
    """

    unet: nn.Module
    controlnet: nn.Module | None = None
    pictures: PictureNetworks | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The UNet's."""
        config: Mapping[str, Any] = self.unet.config  # type: ignore[assignment]  # nn.Module types it as a tensor
        return config


@dataclass(frozen=True)
class RunInputs:
    """What a run is given, under the denoiser's own names.

    Args:
        seed: of the random stream.
        guidance_scale: ``None`` where the recipe has no guidance.
        arrays: ``prompt_embeds`` and what else the family and the task take, for one batch; ``control_image`` where the
            recipe has a ControlNet.
        control: where it has none, the residuals by graph input name, at a ControlNet's sizes, the same at every step.
        prompt: what the embeddings are of; None where they are random.
        guidance_rescale: the recipe's.
    """

    seed: int
    guidance_scale: float | None
    arrays: Mapping[str, Given]
    control: Mapping[str, Drawn]
    prompt: PromptInputs | None = None
    guidance_rescale: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe, config: Mapping[str, Any], prompt: PromptInputs | None = None) -> RunInputs:
        """Returns random ones from `SEED`, but for a prompt's embeddings; an inpainting mask is the middle.

        Where the UNet takes several chunks of tokens, the others are the empty prompt's.
        """
        size = (recipe.latent_height, recipe.latent_width)
        phase = recipe.phase_rule().phases()[0]
        tokens = recipe.prompt_tokens
        inputs = phase_inputs(config, recipe.unet_layout, phase, *size, recipe.batch, prompt_tokens=tokens)
        specs = {spec.name: spec for spec in inputs}
        given: dict[str, Given] = {}
        for name in EMBEDDINGS:
            if name in specs and name != "time_ids":
                for sign in ("", "negative_")[: 1 + recipe.guidance]:
                    shape = specs[name].shape
                    own = prompt.fitted(sign + name, shape) if prompt else drawn(sign + name, shape, SEED)
                    given[sign + name] = own
        if recipe.task is Task.INPAINTING:
            mask, masked = INPAINTING
            given[mask] = _middle(recipe.batch, *size)
            given[masked] = drawn(masked, (recipe.batch, LATENT_CHANNELS, *size), SEED)
        residuals: Sequence[TensorSpec] = ()
        if recipe.controlnet is not None:
            given[CONTROL_IMAGE] = drawn(CONTROL_IMAGE, (recipe.batch, 3, recipe.height, recipe.width), SEED)
        elif recipe.task.has_control:
            residuals = control_residuals(config, recipe.unet_layout, *size, recipe.model_batch)
        control = {spec.name: drawn(spec.name, spec.shape, SEED) for spec in residuals}
        scale = GUIDANCE_SCALE if recipe.guidance else None
        return cls(SEED, scale, given, control, prompt, recipe.guidance_rescale or 0.0)


def run_pipeline(
    networks: Networks,
    scheduler: Any,
    recipe: Recipe,
    course: RunSchedule,
    given: RunInputs,
    started: Callable[[int], None],
) -> tuple[list[RecordedEvaluation], list[Array]]:
    """Denoises with diffusers; returns the evaluations that are computed, and the latents after every one.

    Args:
        networks: as before when this returns or raises.
        scheduler: diffusers' own.
        recipe: task, size, phases and windows.
        course: steps asked of the scheduler, and the phases they should run in.
        given: inputs of the run.
        started: told the number of each evaluation, from 0, when it begins.

    Raises:
        ParityError: the UNet was not called in the course's phases.
    """
    unet = networks.unet
    pipe = _pipeline(networks, scheduler, recipe, given)
    pipe.set_progress_bar_config(disable=True)
    latents: list[Array] = []

    def keep(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents.append(tensors["latents"].numpy().copy())
        return {}

    patch = apply_hidiffusion(
        pipe,
        rule=recipe.phase_rule(),
        windows=recipe.hidiffusion.windows,
        forecast=recipe.forecast_record or False,
        family=recipe.family,
        task=recipe.task,
    )
    call = _arguments(recipe, given)
    rescale = given.guidance_rescale
    if "guidance_rescale" in inspect.signature(pipe.__call__).parameters:
        call["guidance_rescale"], rescale = rescale, 0.0
    watch = recorded_evaluations(
        unet, _windows(unet, recipe, course), started, lambda: patch.computed, lambda: patch.features_taken
    )
    with patch, watch as evaluations, _rescaling(scheduler, evaluations, rescale):
        pipe(
            **call,
            num_inference_steps=course.steps,
            generator=torch.Generator("cpu").manual_seed(given.seed),
            output_type="latent",
            callback_on_step_end=keep,
        )
    return evaluations, latents


@contextmanager
def _rescaling(scheduler: Any, evaluations: Sequence[RecordedEvaluation], guidance_rescale: float) -> Iterator[None]:
    """Rescales guided noise by diffusers' own function in the pipelines that do not take ``guidance_rescale``.

    Before each step of the scheduler, which is given the guided noise; the half for the prompt is what the UNet gave.
    """
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its parameters
    def rescaled(noise_pred: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        positive = torch.from_numpy(evaluations[-1].noise_pred)[-len(noise_pred) :]
        return step(rescale_noise_cfg(noise_pred, positive, guidance_rescale), *args, **kwargs)

    if guidance_rescale:
        scheduler.step = rescaled
    try:
        yield
    finally:
        scheduler.__dict__.pop("step", None)


def _windows(unet: Any, recipe: Recipe, course: RunSchedule) -> list[tuple[WindowShape, ...]]:
    """Returns the windows of each evaluation's phase."""
    size = (recipe.latent_height, recipe.latent_width)
    windows = {phase: UNetGeometry.of(unet.config, recipe.unet_layout, phase, *size).windows for phase in course.phases}
    return [windows[point.phase] for point in course.points]


def _pipeline(networks: Networks, scheduler: Any, recipe: Recipe, given: RunInputs) -> Any:
    sdxl, task = recipe.family.is_sdxl, recipe.task
    # Beside what is given here, these pipelines need no component for latents out of embeddings.
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    parts |= {"unet": networks.unet, "scheduler": scheduler}
    if sdxl:
        parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    kind = ""
    if task is Task.INPAINTING:
        kind, parts["vae"] = "Inpaint", _some_vae()
    elif task.has_control:
        kind = "ControlNet"
        parts["controlnet"] = networks.controlnet or _FixedControlNet(recipe, arrays(given.control))
    return getattr(diffusers, f"StableDiffusion{'XL' if sdxl else ''}{kind}Pipeline")(**parts)


def _arguments(recipe: Recipe, given: RunInputs) -> dict[str, Any]:
    tensors = {name: torch.from_numpy(array) for name, array in arrays(given.arrays).items()}
    renamed = {"text_embeds": "pooled_prompt_embeds", "negative_text_embeds": "negative_pooled_prompt_embeds"}
    call: dict[str, Any] = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
    call |= {"height": recipe.height, "width": recipe.width}
    call["guidance_scale"] = _NO_GUIDANCE if given.guidance_scale is None else given.guidance_scale
    if recipe.task is Task.INPAINTING:
        mask = call.pop("mask")
        call["mask_image"] = mask.repeat_interleave(PIXELS_PER_LATENT, 2).repeat_interleave(PIXELS_PER_LATENT, 3)
        call["image"] = torch.zeros(recipe.batch, *recipe.latent_shape)
        call["strength"] = 1.0
    if recipe.task.has_control:
        unseen = torch.zeros(recipe.batch, 3, recipe.height, recipe.width)
        call["image"] = call.pop(CONTROL_IMAGE, unseen)
    return call


def _middle(batch: int, height: int, width: int) -> NDArray[np.float32]:
    mask = np.zeros((batch, 1, height, width), dtype=np.float32)
    mask[:, :, height // 4 : -(height // 4), width // 4 : -(width // 4)] = 1
    return mask


def _some_vae() -> nn.Module:
    """Returns a VAE that inpainting pipelines ask for its configuration alone: the number of channels."""
    widths = [8] * (PIXELS_PER_LATENT.bit_length())
    with torch.random.fork_rng(devices=[]):
        vae: nn.Module = diffusers.AutoencoderKL(
            block_out_channels=widths,
            down_block_types=["DownEncoderBlock2D"] * len(widths),
            up_block_types=["UpDecoderBlock2D"] * len(widths),
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=8,
        )
    return vae


class _FixedControlNet(diffusers.ControlNetModel):  # type: ignore[misc]  # diffusers is untyped
    """A ControlNet whose residuals are given."""

    def __init__(self, recipe: Recipe, residuals: Mapping[str, Array]) -> None:
        with torch.random.fork_rng(devices=[]):
            super().__init__(**controlnet_config(recipe.family, Width.TINY))
        *down, mid = (torch.from_numpy(array) for array in residuals.values())
        self._residuals = (down, mid)

    def forward(
        self,
        sample: torch.Tensor,  # noqa: ARG002 - the names are those of the class's own forward
        timestep: torch.Tensor,  # noqa: ARG002
        encoder_hidden_states: torch.Tensor,  # noqa: ARG002
        controlnet_cond: torch.Tensor,  # noqa: ARG002
        **_: Any,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Returns the given residuals: one for each skip connection, and the middle block's."""
        return self._residuals
