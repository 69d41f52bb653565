"""The published package ``hidiffusion`` 0.1.10 on today's diffusers: made importable, and steered to a phase's step.

What it computes is its own code all through.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from diffusers.models.controlnets import multicontrolnet

from hidiff_export.benchmarking.stock_arguments import stock_arguments
from hidiff_export.benchmarking.torch_evaluators import TorchEvaluator, stored_unet
from hidiff_export.families.family import Family, Task
from hidiff_export.recipe import Recipe

_CHECKPOINTS = {
    Family.SD15: "runwayml/stable-diffusion-v1-5",
    Family.SD21: "stabilityai/stable-diffusion-2-1-base",
    Family.SDXL: "stabilityai/stable-diffusion-xl-base-1.0",
    Family.SDXL_TURBO: "stabilityai/sdxl-turbo",
    Family.PLAYGROUND: "playgroundai/playground-v2-1024px-aesthetic",
}
_SDXL_INPAINTING = "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"


def package() -> ModuleType:
    """Imports the package's one module, which looks for ControlNets where diffusers kept them until 0.35."""
    sys.modules.setdefault("diffusers.pipelines.controlnet.multicontrolnet", multicontrolnet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from hidiffusion import hidiffusion
    module: ModuleType = hidiffusion
    return module


def evaluator(_kind: str, settings: Mapping[str, Any]) -> PublishedEvaluator:
    """Returns the package applied to the UNet over the settings' ``store``."""
    steps = {phase: int(step) for phase, step in settings["phase_steps"].items()}
    return PublishedEvaluator(stored_unet(settings), Recipe.from_dict(settings["recipe"]), settings["steps"], steps)


def checkpoint_name(family: Family, task: Task) -> str:
    """Returns a checkpoint's name from which the package concludes family and task."""
    return _SDXL_INPAINTING if family is Family.SDXL and task is Task.INPAINTING else _CHECKPOINTS[family]


class DiffusionPipeline:
    """What the package asks of a pipeline, which it knows by this class's name."""

    def __init__(self, unet: Any, name_or_path: str, num_timesteps: int) -> None:
        self.unet = unet
        self.name_or_path = name_or_path
        self._num_timesteps = num_timesteps


class PublishedEvaluator(TorchEvaluator):
    """A UNet that the package patched: its modules count steps, and choose by them what they do.

    Args:
        unet: diffusers'.
        recipe: its family and task, by whose names the package goes.
        steps: of the run.
        phase_steps: the first step of each phase in it.
    """

    def __init__(self, unet: Any, recipe: Recipe, steps: int, phase_steps: Mapping[str, int]) -> None:
        hidiffusion: Any = package()
        if recipe.family.is_sdxl:
            # Checkpoints of an unknown name are recognized by module names; a tiny one has fewer transformer blocks.
            names = {name for name, _ in unet.named_modules()}
            hidiffusion.sdxl_module_key = [name for name in hidiffusion.sdxl_module_key if name in names]
        pipe = DiffusionPipeline(unet, checkpoint_name(recipe.family, recipe.task), steps)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="HiDiffusion Warning")  # of odd sizes
            hidiffusion.apply_hidiffusion(pipe)
        self._unet = pipe.unet
        self._steps = phase_steps
        self._step = 0

    def open(self, phase: str) -> None:
        """Notes the step that the phase begins at."""
        self._step = self._steps[phase]

    def predict(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the package's prediction; it draws the window shifts itself, from torch's seed."""
        for module in self._unet.modules():
            if hasattr(module, "_parent") and hasattr(module, "timestep"):
                module.timestep = self._step
        torch.manual_seed(int(inputs["timestep"]))
        dtype = self._unet.dtype
        cast = {name: tensor.to(dtype) if name != "timestep" else tensor for name, tensor in inputs.items()}
        arguments = stock_arguments(cast)
        latents = arguments.pop("sample")  # by place, as pipelines have it: the package looks at the first argument
        noise: torch.Tensor = self._unet(latents, **arguments, return_dict=False)[0]
        return noise
