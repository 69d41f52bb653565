"""A model's tensors by name, each made only when it is asked for."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from hidiff_export.errors import CheckpointError
from hidiff_runtime.format.dtypes import BY_NAME, BY_TAG
from hidiff_runtime.format.safetensors import SafetensorsFile, TensorInfo

Shapes = Mapping[str, tuple[int, ...]]
"""Names and shapes of a model's tensors."""

TORCH_DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in BY_NAME}
"""PyTorch's types of numbers, by the names that the runtime's table has for them."""


class LazyStateDict(Mapping[str, torch.Tensor]):
    """A state dict whose shapes are known at once and whose tensors are read or computed one at a time.

    Nothing is kept: every look-up makes the tensor anew, so going through the whole mapping takes the memory of its
    largest tensor.

    Args:
        shapes: the tensors' names and shapes.
        make: gives the tensor of a name; called from several threads at once by whoever writes the tensors out.
    """

    def __init__(self, shapes: Shapes, make: Callable[[str], torch.Tensor]) -> None:
        self.shapes = dict(shapes)
        self._make = make

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shapes_of(state_dict: Mapping[str, torch.Tensor]) -> Shapes:
    """Names and shapes, without making a lazy state dict's tensors."""
    if isinstance(state_dict, LazyStateDict):
        return state_dict.shapes
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def map_tensors(file: SafetensorsFile, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Returns tensors of a safetensors file as torch tensors: mapped, and copied page by page only where written to.

    Raises CheckpointError when one of them is no floating-point tensor.
    """
    with file.path.open("rb") as opened:
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    return {name: _map_tensor(data, name, file.info(name)) for name in names}


def _map_tensor(data: mmap.mmap, name: str, info: TensorInfo) -> torch.Tensor:
    dtype = TORCH_DTYPES[BY_TAG[info.dtype].name]
    if not dtype.is_floating_point:
        raise CheckpointError(
            "A weight is not a floating-point number.",
            given=f"{name}: {info.dtype}",
            advice="Save the checkpoint in float32, float16 or bfloat16.",
        )
    if not info.nbytes:
        return torch.empty(info.shape, dtype=dtype)
    count = math.prod(info.shape)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=info.offset).view(info.shape)
