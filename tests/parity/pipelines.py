"""Tiny diffusers pipelines of every kind that HiDiffusion serves: real classes, real schedulers, made-up weights.

Every call of :func:`build` makes a pipeline of the same weights, so that one can be changed by this project and another
by the published package.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import diffusers
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.synthetic import synthesize
from hidiff_export.families.family import Family, Task, Width, default_scheduler

SD15_NAME = "runwayml/stable-diffusion-v1-5"
SDXL_NAME = "stabilityai/stable-diffusion-xl-base-1.0"
TURBO_NAME = "stabilityai/sdxl-turbo"
SDXL_INPAINTING_NAME = "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"
PLAYGROUND_NAME = "playgroundai/playground-v2-1024px-aesthetic"

PROMPT_TOKENS = 5
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Case:
    """One kind of pipeline and one way to call it.

    Args:
        pipeline: name of the diffusers class.
        name: of the checkpoint, as the published package knows it.
        scheduler: name of the diffusers class, if not the family's own.
        height: of the latents; ``width`` likewise.
        call: arguments of the pipeline beyond the prompt's embeddings, the pictures and the size.
    """

    pipeline: str
    family: Family
    task: Task = Task.TEXT_TO_IMAGE
    name: str = SDXL_NAME
    scheduler: str | None = None
    steps: int = 5
    height: int = 16
    width: int = 16
    call: Mapping[str, Any] = field(default_factory=lambda: NOTHING, hash=False)

    @property
    def takes_picture(self) -> bool:
        """Whether the pipeline starts from a picture."""
        return "Img2Img" in self.pipeline or "Inpaint" in self.pipeline


@functools.cache
def _network(component: Component, family: Family, task: Task, seed: int) -> Any:
    config = component.config(family, task, Width.TINY)
    model = component.empty(config).to_empty(device="cpu")
    model.load_state_dict(dict(synthesize(component, config, seed)))
    return model


def network(component: Component, family: Family, task: Task = Task.TEXT_TO_IMAGE, seed: int = 0) -> Any:
    """A tiny UNet or ControlNet with weights of its own, the same ones for the same seed."""
    return copy.deepcopy(_network(component, family, task, seed))


def scheduler_of(family: Family, name: str | None = None) -> Any:
    """The family's scheduler, or another one with the family's noise schedule."""
    own, config = default_scheduler(family)
    return getattr(diffusers, name or own).from_config(dict(config))


def build(case: Case) -> Any:
    """A pipeline without text encoders; prompts are embeddings."""
    parts: dict[str, Any] = {
        "vae": _vae(),
        "unet": network(Component.UNET, case.family, case.task),
        "scheduler": scheduler_of(case.family, case.scheduler),
        "text_encoder": None,
        "tokenizer": None,
    }
    if case.family.is_sdxl:
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if case.task.has_control:
        parts["controlnet"] = network(Component.CONTROLNET, case.family, seed=1)
    pipe = getattr(diffusers, case.pipeline)(**parts)
    pipe.register_to_config(_name_or_path=case.name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(case: Case, seed: int = 7) -> dict[str, Any]:
    """What to call ``build(case)`` with, for latents to come out; the noise is the caller's ``generator``'s."""
    generator = torch.Generator().manual_seed(seed)
    pixels = (8 * case.height, 8 * case.width)
    unet = Component.UNET.config(case.family, case.task, Width.TINY)
    prompt = torch.randn(2, PROMPT_TOKENS, unet["cross_attention_dim"], generator=generator)
    given: dict[str, Any] = {
        "prompt_embeds": prompt[:1],
        "negative_prompt_embeds": prompt[1:],
        "num_inference_steps": case.steps,
        "output_type": "latent",
    }
    if case.family.is_sdxl:
        pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        embeds = torch.randn(2, pooled, generator=generator)
        given |= {"pooled_prompt_embeds": embeds[:1], "negative_pooled_prompt_embeds": embeds[1:]}
    picture = torch.rand(1, 3, *pixels, generator=generator)
    if case.takes_picture:
        given["image"] = picture
    if case.task.has_control:
        control = torch.rand(1, 3, *pixels, generator=generator)
        given["control_image" if case.takes_picture else "image"] = control
    if "Inpaint" in case.pipeline:
        given["mask_image"] = (torch.rand(1, 1, *pixels, generator=generator) > 0.5).float()
    if "Img2Img" not in case.pipeline:
        given |= {"height": pixels[0], "width": pixels[1]}
    return {**given, **case.call}


def trajectory(pipe: Any, call: Mapping[str, Any], seed: int = 1, generator: Any = None) -> list[torch.Tensor]:
    """The latents after each step. The global generator starts from ``seed`` too, for whoever draws from it."""
    latents: list[torch.Tensor] = []

    def record(_pipe: Any, _step: int, _timestep: Any, given: dict[str, torch.Tensor]) -> dict[str, Any]:
        latents.append(given["latents"].clone())
        return {}

    torch.manual_seed(seed)
    pipe(**call, generator=generator or torch.Generator().manual_seed(seed), callback_on_step_end=record)
    return latents


@functools.cache
def _vae() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
        force_upcast=False,
    )
    return vae.requires_grad_(False).eval()
