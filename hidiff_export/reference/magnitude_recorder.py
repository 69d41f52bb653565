"""Takes the largest magnitude of every tensor that a float16 graph stores, while float32 PyTorch computes it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
from torch import nn
from torch.nn.modules import module as every_module
from torch.overrides import TorchFunctionMode

from hidiff_export.checkpoints.component import Component
from hidiff_export.graph.float32_ops import precision_of
from hidiff_export.recipe import Recipe
from hidiff_export.recipe.field_types import Precision
from hidiff_export.reference.evaluation_plan import EvaluationPoint
from hidiff_export.reference.magnitudes import Magnitude, Magnitudes

_FLOAT32_MODULES = (Timesteps,)
"""Modules that graphs compute in float32. Attention and normalization, which they do too, are one operator each here,
so that scores, means and variances are not seen, but what goes in and what comes out of them is."""

_SAME_VALUES = frozenset(
    {
        *("__get__", "__getitem__", "chunk", "clone", "contiguous", "detach", "dropout", "expand", "flatten", "float"),
        *("permute", "reshape", "split", "squeeze", "tensor", "to", "transpose", "type", "unbind", "unsqueeze", "view"),
    }
)
"""Operators whose results are values of their input, which was seen already; dropout does nothing in evaluation, and
``tensor`` holds the timestep, which is float32."""

_FLOAT32_INPUTS = frozenset({"timestep", "added_cond_kwargs"})
"""Inputs that graphs do not round: SDXL's ``text_embeds`` among them, which are seen where they are joined."""


class MagnitudeRecorder:
    """Follows the networks that a recipe's bundle computes in float16: UNet, ControlNet, text encoders.

    Networks are told by their classes, wherever they are called while :meth:`recording` lasts, and each result of an
    operator is measured by itself, so that sums, products and concatenations between modules are seen too. Nothing is
    kept but one number for each. A recipe without float16 costs nothing and gives an empty record.

    Args:
        recipe: what is built or verified.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._networks = {
            component.class_name: component
            for component in Component
            if precision_of(component.value, recipe.precision) is Precision.FLOAT16
        }
        self._found: dict[tuple[str, str, str], Magnitude] = {}
        self._points: Iterator[EvaluationPoint] = iter(())
        self._point: EvaluationPoint | None = None
        self._random = False
        self._network: nn.Module | None = None
        self._place = Magnitude("", "", "", 0.0)
        self._names: Mapping[int, str] = {}
        self._path: list[str | None] = []

    @property
    def found(self) -> Magnitudes:
        """What was measured so far."""
        return Magnitudes.of(self._found.values())

    @property
    def tensors(self) -> tuple[Magnitude, ...]:
        """The largest magnitude of each tensor so far."""
        return tuple(self._found.values())

    def follow(self, points: Iterable[EvaluationPoint], *, random: bool = False) -> None:
        """Says which evaluations of the UNet come next, one for each of its calls.

        Args:
            points: phases and steps.
            random: whether they are on random inputs.
        """
        self._points = iter(points)
        self._point = next(self._points, None)
        self._random = random

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Measures while the context lasts; no module is changed."""
        if not self._networks:
            yield
            return
        handles = (
            every_module.register_module_forward_pre_hook(self._enter),
            every_module.register_module_forward_hook(self._leave, with_kwargs=True),
        )
        try:
            with _Results(self._see):
                yield
        finally:
            for handle in handles:
                handle.remove()
                # PyTorch's handle leaves this entry behind, and torch.compile would warn of a hook that there is not.
                every_module._global_forward_hooks_with_kwargs.pop(handle.id, None)
            self._network = None
            self._path = []

    def _enter(self, module: nn.Module, _args: Any) -> None:
        if self._network is not None:
            inside = self._path[-1] is not None and not isinstance(module, _FLOAT32_MODULES)
            self._path.append(self._names.get(id(module), self._path[-1]) if inside else None)
        elif (component := self._networks.get(type(module).__name__)) is not None and self._evaluated(component):
            self._network = module
            self._place = self._at(component)
            self._names = {id(part): name for name, part in module.named_modules()}
            self._path = [""]

    def _evaluated(self, component: Component) -> bool:
        """Returns whether a bundle evaluates the network too: diffusers' pipelines ask a ControlNet in every phase."""
        return component is not Component.CONTROLNET or self._point is None or self._point.phase.control

    def _at(self, component: Component) -> Magnitude:
        """Returns a network's call, and where in a run it is, without a tensor yet."""
        point = self._point
        if component.is_text or point is None:
            return Magnitude(component.value, "", "", 0.0)
        phase = point.phase.name if component is Component.UNET else None
        return Magnitude(component.value, "", "", 0.0, phase, point.step, point.steps, self._random)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
        if self._network is None:
            return
        self._path.pop()
        if module is self._network:
            self._network = None
            self._measure_inputs(module, args, kwargs)
            if self._networks[type(module).__name__] is Component.UNET:
                self._point = next(self._points, None)

    def _measure_inputs(self, network: nn.Module, args: Any, kwargs: Any) -> None:
        given = inspect.signature(network.forward).bind(*args, **kwargs).arguments
        for name, value in given.items():
            if name not in _FLOAT32_INPUTS:
                self._measure(name, "input", value)

    def _see(self, operator: str, output: object) -> None:
        """Takes what an operator gave, in whichever module that was."""
        if self._network is not None and (path := self._path[-1]) is not None and operator not in _SAME_VALUES:
            self._measure(path, operator, output)

    def _measure(self, tensor: str, operator: str, found: object) -> None:
        if isinstance(found, (list, tuple)):
            for one in found:
                self._measure(tensor, operator, one)
        if not isinstance(found, torch.Tensor) or not found.is_floating_point() or not found.numel():
            return
        low, high = (float(end) for end in torch.aminmax(found))
        value = max(-low, high) if math.isfinite(low) and math.isfinite(high) else math.inf
        key = self._place.graph, tensor, operator
        if key not in self._found or value > self._found[key].value:
            self._found[key] = replace(self._place, tensor=tensor, operator=operator, value=value)


class _Results(TorchFunctionMode):
    """Hands on the name and the result of every operator that Python calls."""

    def __init__(self, see: Callable[[str, object], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self._see(getattr(func, "__name__", ""), output)
        return output
