"""What a network has to say of itself to become a graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from hidiff_runtime.format.manifest import TensorSpec


class GraphModule(nn.Module, ABC):
    """A network as a static graph of tensors with names.

    Attributes:
        network: name of the attribute that holds diffusers' network, and so what stands before its weights' names.
        title: the network, for people.
    """

    network: ClassVar[str]
    title: str

    @abstractmethod
    def input_specs(self, model_batch: int) -> tuple[TensorSpec, ...]:
        """Returns names, shapes and types of the inputs for ``model_batch`` latents, the negative prompt's included."""

    @abstractmethod
    def output_specs(self, model_batch: int) -> tuple[TensorSpec, ...]:
        """Returns names, shapes and types of the outputs."""

    @staticmethod
    def arguments(inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Returns ``forward``'s keyword arguments from the inputs by name, in the order of :meth:`input_specs`."""
        return dict(inputs)
