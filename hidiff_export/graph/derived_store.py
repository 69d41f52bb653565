"""Weights that are computed from a network's, in a store of their own beside its weight store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from hidiff_export.graph.onnx_dtypes import DTYPE_NAMES
from hidiff_runtime.format.dtypes import BY_NAME
from hidiff_runtime.format.safetensors import DTYPES, SafetensorsWriter, TensorLayout


class DerivedStore:
    """A safetensors file of tensors that are computed when they are written.

    Args:
        path: of the file, beside the graphs that read it.
        tensors: by name.
    """

    def __init__(self, path: Path, tensors: Mapping[str, ir.TensorProtocol]) -> None:
        self.path = path
        self._tensors = dict(tensors)
        self._writer = SafetensorsWriter(path, {name: _layout(tensor) for name, tensor in tensors.items()})

    @property
    def names(self) -> Sequence[str]:
        """The tensors' names, as they lie in the file."""
        return self._writer.order

    def write(self, report: Callable[[float], None]) -> None:
        """Writes the file, one tensor in memory at a time; ``report`` is told which part is done.

        Raises:
            StorageError: the disk refuses.
        """
        with self._writer:
            for index, name in enumerate(self._writer.order):
                report(index / len(self._writer.order))
                array = self._tensors[name].numpy()
                self._writer.add(name, array.view(DTYPES[self._writer.infos[name].dtype]))  # bfloat16 as its bits

    def reference(self, name: str) -> ir.ExternalTensor:
        """Returns a tensor as a graph beside the file refers to it, whether it is written yet or not."""
        info, tensor = self._writer.infos[name], self._tensors[name]
        place = (self.path.name, info.offset, info.nbytes, tensor.dtype)
        return ir.ExternalTensor(*place, shape=ir.Shape(info.shape), name=name, base_dir=self.path.parent)


def _layout(tensor: ir.TensorProtocol) -> TensorLayout:
    assert isinstance(tensor.shape, ir.Shape)  # what is written has sizes
    return TensorLayout(BY_NAME[DTYPE_NAMES[tensor.dtype]].tag, tensor.shape.numpy())
