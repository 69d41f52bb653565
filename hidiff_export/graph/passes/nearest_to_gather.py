"""Nearest-neighbour resizing that picks PyTorch's neighbours, whatever the size."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hidiff_export.graph.passes.base import (
    Declined,
    Operator,
    Outcome,
    Replacement,
    RewritePass,
    add_constant,
    make,
    static_shape,
)

_MEANT = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}


class NearestToGather(RewritePass):
    """Turns a nearest ``Resize`` by a ratio that is no whole number into one ``Gather`` for each axis.

    PyTorch multiplies a position by in / out and rounds down; ONNX divides it by out / in. In float32 the two disagree
    where the exact result is whole: from 50 to 198 rows, as behind the stride-4 downsampler, one row is another's.

    Requires: shapes known.
    Ensures: a nearest ``Resize`` is left only for whole ratios, or where `declined` says why.
    """

    operators: ClassVar[frozenset[Operator]] = frozenset({("", "Resize")})

    def rewrite(self, node: ir.Node) -> Outcome:
        """Resizes axis by axis."""
        mode = node.attributes.get("mode")
        if mode is not None and mode.as_string() != _MEANT["mode"]:  # nearest is ONNX's default
            return None
        before, after, graph = static_shape(node.inputs[0]), static_shape(node.outputs[0]), node.graph
        value = node.inputs[0]
        if before is None or after is None or value is None or graph is None:
            return Declined("a shape is not known")
        if any(name not in node.attributes or node.attributes[name].value != wanted for name, wanted in _MEANT.items()):
            return Declined("it does not round down as PyTorch does")
        if all(new % old == 0 for old, new in zip(before, after, strict=True)):
            return None
        nodes: list[ir.Node] = []
        shape = list(before)
        for axis, (old, new) in enumerate(zip(before, after, strict=True)):
            if old == new:
                continue
            shape[axis] = new
            inputs = [value, add_constant(graph, nearest_indices(old, new))]
            nodes.append(make("Gather", inputs, {"axis": axis}, shape=shape, type=node.outputs[0].type))
            value = nodes[-1].outputs[0]
        return Replacement([value], nodes)


def nearest_indices(old: int, new: int) -> NDArray[Any]:
    """Where PyTorch takes each of ``new`` elements from: its ``nearest_neighbor_compute_source_index``, in float32."""
    exact = np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))
    indices: NDArray[Any] = np.minimum(np.floor(exact), old - 1).astype(np.int32)
    return indices
