"""The UNet in PyTorch: diffusers' own without HiDiffusion, a `PhaseUNet` as it is, and one under `torch.compile`."""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from hidiff_export.benchmarking.stock_arguments import stock_arguments
from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import load_stored
from hidiff_export.checkpoints.state_dict import TORCH_DTYPES
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.recipe import Recipe

Array = NDArray[Any]
Predict = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


def evaluator(kind: str, settings: Mapping[str, Any]) -> TorchEvaluator:
    """Returns the evaluator of a kind over the weights in the settings' ``store``."""
    unet = stored_unet(settings)
    if kind == "stock":
        return StockEvaluator(unet)
    return PhaseEvaluator(unet, Recipe.from_dict(settings["recipe"]), compiled=kind == "compile")


def stored_unet(settings: Mapping[str, Any]) -> Any:
    """Returns diffusers' UNet in the settings' precision; weights that are stored in it are mapped, not copied."""
    torch.set_num_threads(settings["threads"])
    dtype = TORCH_DTYPES[settings["precision"]]
    return load_stored(Component.UNET, WeightStore.open(Path(settings["store"])), dtype).requires_grad_(False).eval()


class TorchEvaluator(abc.ABC):
    """A module that predicts noise, handed arrays and giving them."""

    @abc.abstractmethod
    def open(self, phase: str) -> None:
        """Gets ready for a phase."""

    @abc.abstractmethod
    def predict(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the predicted noise."""

    @torch.inference_mode()
    def evaluate(self, inputs: Mapping[str, Array]) -> Array:
        """Returns what the module gives, in float32."""
        output: Array = self.predict({name: torch.from_numpy(array) for name, array in inputs.items()}).float().numpy()
        return output

    def operators(self, inputs: Mapping[str, Array]) -> Mapping[str, float]:
        """Returns the time of each of ATen's operators, that of others which it calls left out."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.evaluate(inputs)
        found: Counter[str] = Counter()
        for event in profile.key_averages():
            found[event.key] += event.self_cpu_time_total / 1e6
        return {name: seconds for name, seconds in found.most_common() if seconds > 0}


class StockEvaluator(TorchEvaluator):
    """The UNet as diffusers runs it, without HiDiffusion: one kind of evaluation, whatever the phase."""

    def __init__(self, unet: Any) -> None:
        self._unet = unet

    def open(self, phase: str) -> None:
        """Does nothing."""

    def predict(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns diffusers' prediction; window shifts have no place in it."""
        dtype = self._unet.dtype
        cast = {name: tensor.to(dtype) if name != "timestep" else tensor for name, tensor in inputs.items()}
        noise: torch.Tensor = self._unet(**stock_arguments(cast), return_dict=False)[0]
        return noise


class PhaseEvaluator(TorchEvaluator):
    """A `PhaseUNet` of the phase at hand."""

    def __init__(self, unet: Any, recipe: Recipe, *, compiled: bool) -> None:
        self._unet = unet
        self._recipe = recipe
        self._compiled = compiled
        self._predict: Predict

    def open(self, phase: str) -> None:
        """Makes the phase's module. `torch.compile` compiles it at its first evaluation."""
        recipe = self._recipe
        named = {each.name: each for each in recipe.phase_rule().phases()}
        size = (recipe.latent_height, recipe.latent_width)
        options = {**recipe.phase_options(named[phase]), "reuse_depth": None}  # no peer reuses features
        module = PhaseUNet(self._unet, recipe.unet_layout, named[phase], *size, **options)
        if self._compiled:
            module.compile()
        self._predict = lambda inputs: module(**PhaseUNet.arguments(inputs))

    def predict(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the phase's prediction."""
        return self._predict(inputs)
