"""The published package ``hidiffusion`` 0.1.10 itself, made importable on today's diffusers and steered to any step.

The shims change what the package cannot do (be imported, recognize a tiny UNet, run beside PEFT); what it computes is
its own code all through.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from diffusers.models.controlnets import multicontrolnet

from hidiff_export.families.family import Family, Task
from tests.parity import pipelines

_SHIFT_EDGES = torch.tensor([0.25, 0.5, 0.75])


@cache
def package() -> ModuleType:
    """The package's one module; it looks for ControlNets where diffusers kept them until 0.35."""
    sys.modules.setdefault("diffusers.pipelines.controlnet.multicontrolnet", multicontrolnet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from hidiffusion import hidiffusion
    return hidiffusion


def checkpoint_name(family: Family, task: Task = Task.TEXT_TO_IMAGE) -> str:
    """A checkpoint's name from which the package concludes ``family`` and ``task``."""
    if family is Family.SDXL and task is Task.INPAINTING:
        return pipelines.SDXL_INPAINTING_NAME
    return {
        Family.SD15: pipelines.SD15_NAME,
        Family.SD21: "stabilityai/stable-diffusion-2-1-base",
        Family.SDXL: pipelines.SDXL_NAME,
        Family.SDXL_TURBO: pipelines.TURBO_NAME,
        Family.PLAYGROUND: pipelines.PLAYGROUND_NAME,
    }[family]


@contextmanager
def applied(pipe: Any, *, raunet: bool = True, windows: bool = True, extreme: bool = False) -> Iterator[Any]:
    """The package applied to ``pipe`` (anything that has a UNet and a name), and removed as the package removes itself.

    Args:
        extreme: use the thresholds of the extreme sizes (256 latents for SD, 512 for SDXL) at the smaller ones too.
            The package compares the latents' size with constants, but looks the thresholds up anew in every call.
    """
    hidiffusion = package()
    names = {name for name, _ in pipe.unet.named_modules()}
    with ExitStack() as patches:
        # Checkpoints of an unknown name are recognized by SDXL's module names; a tiny one has fewer transformer blocks.
        known = [name for name in hidiffusion.sdxl_module_key if name in names]
        patches.enter_context(mock.patch.object(hidiffusion, "sdxl_module_key", known))
        # With PEFT installed, its ControlNet path calls functions that it never imports. There is no LoRA here.
        patches.enter_context(mock.patch.object(hidiffusion, "USE_PEFT_BACKEND", False))
        if extreme:
            _use_extreme_thresholds(hidiffusion, patches)
        patches.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="HiDiffusion Warning")  # of odd sizes
        patches.callback(hidiffusion.remove_hidiffusion, pipe)
        yield hidiffusion.apply_hidiffusion(pipe, apply_raunet=raunet, apply_window_attn=windows)


def _use_extreme_thresholds(hidiffusion: ModuleType, patches: ExitStack) -> None:
    ratios: Mapping[str, Mapping[str, float]] = hidiffusion.switching_threshold_ratio_dict
    extreme = {**ratios, "sd15_1024": ratios["sd15_2048"], "sdxl_2048": ratios["sdxl_4096"]}
    patches.enter_context(mock.patch.object(hidiffusion, "switching_threshold_ratio_dict", extreme))
    control = {"sdxl_2048": ratios["sdxl_4096"]}
    name = "text_to_img_controlnet_switching_threshold_ratio_dict"
    patches.enter_context(mock.patch.object(hidiffusion, name, control))
    patches.enter_context(mock.patch.object(hidiffusion, "is_aggressive_raunet", False))


class DiffusionPipeline:
    """What the package asks of a pipeline, which it knows by this class's name."""

    def __init__(self, unet: Any, name_or_path: str, num_timesteps: int) -> None:
        self.unet = unet
        self.name_or_path = name_or_path
        self._num_timesteps = num_timesteps


class ControlNetPipeline(DiffusionPipeline):
    """The same with a ControlNet, for which the package changes the UNet's own forward too."""

    controlnet: Any = None


@dataclass(frozen=True)
class Evaluation:
    """One call of a UNet at a step of a run of ``steps``."""

    family: Family
    task: Task
    step: int
    steps: int = 50
    extreme: bool = False


def predict(unet: Any, evaluation: Evaluation, inputs: Mapping[str, torch.Tensor], seed: int) -> torch.Tensor:
    """What the package computes at one step, on a copy of ``unet``; the window shifts come from ``seed``.

    Args:
        inputs: by the names of a phase's graph.
    """
    kind = ControlNetPipeline if evaluation.task.has_control else DiffusionPipeline
    name = checkpoint_name(evaluation.family, evaluation.task)
    pipe = kind(copy.deepcopy(unet), name, evaluation.steps)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), applied(pipe, extreme=evaluation.extreme):
        pipe.unet.info["text_to_img_controlnet"] = evaluation.task is Task.CONTROLNET
        for module in pipe.unet.modules():
            if hasattr(module, "_parent") and hasattr(module, "timestep"):
                module.timestep = evaluation.step
        torch.manual_seed(seed)
        return pipe.unet(inputs["latents"], inputs["timestep"], **unet_arguments(inputs), return_dict=False)[0]


def unet_arguments(inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """diffusers' names for the inputs of a phase's graph, from the third argument on."""
    arguments: dict[str, Any] = {"encoder_hidden_states": inputs["prompt_embeds"]}
    if "text_embeds" in inputs:
        arguments["added_cond_kwargs"] = {key: inputs[key] for key in ("text_embeds", "time_ids")}
    if "mid_residual" in inputs:
        arguments["down_block_additional_residuals"] = [inputs[key] for key in inputs if key.startswith("down_")]
        arguments["mid_block_additional_residual"] = inputs["mid_residual"]
    return arguments


def drawn_shifts(seed: int, blocks: int) -> torch.Tensor:
    """int32 [blocks]: the shifts that the package draws in one UNet call after ``torch.manual_seed(seed)``."""
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.cat([torch.rand(1, generator=generator) for _ in range(blocks)])
    return torch.bucketize(uniforms, _SHIFT_EDGES, out_int32=True)
