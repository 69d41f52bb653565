"""Nearest-neighbour resizing that picks PyTorch's neighbours, whatever the size."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hidiff_export.graph.passes.base import Declined, Outcome, RewritePass, static_shape

_MEANT = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}


class NearestToGather(RewritePass):
    """Turns a nearest ``Resize`` by a ratio that is no whole number into one ``Gather`` for each axis.

    PyTorch multiplies a position by in / out and rounds down; ONNX divides it by out / in. In float32 the two disagree
    where the exact result is whole: from 50 to 198 rows, as behind the stride-4 downsampler, one row is another's.

    Requires: shapes known.
    Ensures: a nearest ``Resize`` is left only for whole ratios, or where `declined` says why.
    """

    operators = frozenset({("", "Resize")})

    def rewrite(self, node: ir.Node) -> Outcome:
        """Resizes axis by axis."""
        mode = node.attributes.get("mode")
        if mode is not None and mode.as_string() != _MEANT["mode"]:  # nearest is ONNX's default
            return None
        value = node.inputs[0]
        before, after = static_shape(value), static_shape(node.outputs[0])
        if before is None or after is None or value is None:
            return Declined("a shape is not known")
        if any(name not in node.attributes or node.attributes[name].value != wanted for name, wanted in _MEANT.items()):
            return Declined("it does not round down as PyTorch does")
        if all(new % old == 0 for old, new in zip(before, after, strict=True)):
            return None
        for axis, (old, new) in enumerate(zip(before, after, strict=True)):
            if old != new:
                indices = self.build.constant(nearest_indices(old, new), np.int32)
                value = self.build.op("Gather", value, indices, axis=axis)
        return [value]


def nearest_indices(old: int, new: int) -> NDArray[Any]:
    """Computes PyTorch's ``nearest_neighbor_compute_source_index``, in float32, for each of ``new`` elements."""
    exact = np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))
    indices: NDArray[Any] = np.minimum(np.floor(exact), old - 1).astype(np.int32)
    return indices
