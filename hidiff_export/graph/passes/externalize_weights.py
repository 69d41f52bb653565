"""Weights as places in the weight store instead of copies in the graph."""

from __future__ import annotations

import os

import numpy as np
import onnx_ir as ir

from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.graph.onnx_dtypes import ONNX_DTYPES
from hidiff_runtime.format.dtypes import BY_TAG
from hidiff_runtime.format.safetensors import TensorInfo

LARGEST_INLINE = 1 << 16
"""Bytes of the largest floating-point constant that a graph may hold: what is larger is taken for a weight."""

_CHUNK = 1 << 22


class ExternalizeWeights(ir.passes.InPlacePass):
    """Points every weight at its bytes in the store, after comparing them.

    Requires: initializers under the store's own names or with ``prefix`` before them.
    Ensures: no floating-point constant of more than `LARGEST_INLINE` bytes is left in the graph, so nothing was
        computed from a weight while building.

    Args:
        store: in whose folder the graph will be.
        prefix: before the names of the exported network's weights.
    """

    def __init__(self, store: WeightStore, prefix: str) -> None:
        super().__init__()
        self._store = store
        self._prefix = prefix

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Externalizes in place."""
        names = frozenset(self._store.names())
        with self._store.path.open("rb") as file:
            for value in tuple(model.graph.initializers.values()):
                assert value.name is not None  # an initializer is registered by its name
                name = value.name.removeprefix(self._prefix)
                if name in names:
                    self._externalize(value, name, file.fileno())
        return ir.passes.PassResult(model, modified=True)

    def _externalize(self, value: ir.Value, name: str, file: int) -> None:
        place = self._store.reference(name)
        tensor = value.const_value
        assert tensor is not None
        dtype = ONNX_DTYPES[BY_TAG[place.dtype].name]
        if tensor.dtype != dtype or tuple(tensor.shape) != place.shape or not _same_bytes(tensor, place, file):
            raise ir.passes.PassError(f"the weight {name} is not what the weight store holds under this name")
        value.name = name
        value.const_value = ir.ExternalTensor(
            self._store.path.name,
            place.offset,
            place.nbytes,
            dtype,
            shape=ir.Shape(place.shape),
            name=name,
            base_dir=self._store.path.parent,
        )

    def ensures(self, model: ir.Model) -> None:
        """Checks that no weight is left inside."""
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.ExternalTensor):
                continue
            if tensor.dtype.is_floating_point() and tensor.nbytes > LARGEST_INLINE:
                raise ir.passes.PostconditionError(f"{name} holds {tensor.nbytes} bytes that are not in the store")


def _same_bytes(tensor: ir.TensorProtocol, place: TensorInfo, file: int) -> bool:
    # Read rather than mapped, so that comparing a model of gigabytes takes no memory.
    ours = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    if ours.nbytes != place.nbytes:
        return False
    for begin in range(0, place.nbytes, _CHUNK):
        part = ours[begin : begin + _CHUNK]
        if os.pread(file, part.nbytes, place.offset + begin) != part.tobytes():
            return False
    return True
