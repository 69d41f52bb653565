"""PyTorch's contenders: the stock UNet, the published package, and our PhaseUNet, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.cases import Step, extreme
from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build, load
from hidiff_export.checkpoints.state_dict import LazyStateDict, shapes_of
from hidiff_export.checkpoints.weight_store import PRECISIONS
from hidiff_export.modules.phase_unet import PhaseUNet, structural_copy
from hidiff_export.recipe import Recipe
from hidiff_export.reference.random_inputs import arrays, mixed_shifts, random_inputs
from tests.parity import published

Tensors = Mapping[str, torch.Tensor]

EAGER, COMPILED, PUBLISHED, STOCK = "eager PhaseUNet", "compiled PhaseUNet", "eager published package", "eager stock"


def unet_of(recipe: Recipe, device: str, dtype: torch.dtype | None = None) -> Any:
    """The recipe's UNet on a device, its weights rounded to the recipe's precision and then of ``dtype``, if given."""
    config, tensors, _ = load(Component.UNET, recipe.source, recipe.family, recipe.task, recipe.unet_width)
    _, stored = PRECISIONS[recipe.precision]
    dtype = dtype or stored
    rounded = LazyStateDict(shapes_of(tensors), lambda name: tensors[name].to(stored).to(device, dtype))
    return build(Component.UNET, config, rounded, dtype)


def phase_unet(unet: Any, recipe: Recipe, step: Step, device: str) -> PhaseUNet:
    """The UNet in the phase of a step; it shares the weights of ``unet``."""
    return PhaseUNet(unet, recipe.unet_layout, step.phase, recipe.latent_height, recipe.latent_width).to(device)


def inputs_of(module: PhaseUNet, recipe: Recipe, step: Step) -> dict[str, Any]:
    """Random inputs of a phase as numpy arrays, by the names of its graph; every window shift occurs."""
    picture = {"width": recipe.width, "height": recipe.height}
    specs = module.input_specs(recipe.model_batch)
    given: dict[str, Any] = arrays(random_inputs(specs, timestep=step.timestep, **picture, seed=step.step))
    given["window_shifts"] = mixed_shifts((len(recipe.unet_layout.windowed_blocks),), step.step)
    return given


def on(device: str, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """numpy's arrays as tensors on a device."""
    return {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}


def evaluate(module: nn.Module, inputs: Tensors) -> torch.Tensor:
    """A phase's noise prediction, float32."""
    with torch.inference_mode():
        noise_pred: torch.Tensor = module(**PhaseUNet.arguments(inputs))
    return noise_pred


def evaluate_stock(unet: nn.Module, inputs: Tensors) -> torch.Tensor:
    """What diffusers' UNet makes of a phase's inputs, in the UNet's own type."""
    dtype = next(unet.parameters()).dtype
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    arguments = published.unet_arguments(cast)
    with torch.inference_mode():
        noise_pred: torch.Tensor = unet(cast["latents"], inputs["timestep"], **arguments, return_dict=False)[0]
    return noise_pred


@contextmanager
def package(
    unet: Any, recipe: Recipe, case: str, step: Step, rehearse: bool
) -> Iterator[Callable[[Tensors, int], torch.Tensor]]:
    """The published package in force on a copy that shares the weights; the function evaluates it at the step.

    The function takes a phase's inputs and the seed of the window shifts. The package counts evaluations in its own
    modules, so the counters are set back before each.
    """
    name = published.checkpoint_name(recipe.family, recipe.task)
    pipe = published.DiffusionPipeline(structural_copy(unet), name, step.steps)
    with published.applied(pipe, extreme=rehearse and extreme(case)):
        counting = [
            module for module in pipe.unet.modules() if hasattr(module, "_parent") and hasattr(module, "timestep")
        ]

        def call(inputs: Tensors, seed: int) -> torch.Tensor:
            for module in counting:
                module.timestep = step.step
            torch.manual_seed(seed)
            return evaluate_stock(pipe.unet, inputs)

        yield call


@contextmanager
def largest_output(module: nn.Module) -> Iterator[list[int]]:
    """Bytes of the largest tensor that any layer gives while the context lasts, as the list's one item."""
    largest = [0]

    def note(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            largest[0] = max(largest[0], output.numel() * output.element_size())

    handles = [layer.register_forward_hook(note) for layer in module.modules()]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()
