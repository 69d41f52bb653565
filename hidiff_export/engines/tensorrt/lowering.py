"""From the portable graph to what TensorRT and TensorRT-RTX build."""

from __future__ import annotations

import math

import onnx_ir as ir
from onnx_ir.passes import common

from hidiff_export.errors import ExportError
from hidiff_export.graph.passes.base import static_shape
from hidiff_export.graph.passes.compute_window_orders import ComputeWindowOrders
from hidiff_export.graph.passes.decompose_attention import DecomposeAttention
from hidiff_export.graph.passes.float32_operations import Float32Operations
from hidiff_export.graph.passes.name_by_module import NameByModule
from hidiff_export.graph.portable import run_passes

LARGEST_TENSOR = 2**31 - 1
"""Elements of a tensor at most: TensorRT counts them in 32 bits with a sign."""


def lower(model: ir.Model, name: str = "") -> None:
    """Lowers a portable graph in place; weights stay where they are.

    Args:
        model: the portable graph, its shapes and types known.
        name: of the engine that it is lowered for; by default the graph's own.

    Raises:
        ExportError: a pass failed, or a tensor has more elements than TensorRT can count.
    """
    run_passes(model, lowering_passes(), name)
    check_tensor_sizes(model)


def lowering_passes() -> ir.passes.Sequential:
    """Returns the passes from the portable graph to TensorRT's."""
    return ir.passes.Sequential(
        ComputeWindowOrders(),
        Float32Operations(),
        DecomposeAttention(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        NameByModule(),
        common.RemoveUnusedOpsetsPass(),
    )


def check_tensor_sizes(model: ir.Model) -> None:
    """Refuses a graph with a tensor of more than `LARGEST_TENSOR` elements.

    Raises:
        ExportError: names the node, and says what to change.
    """
    for node in model.graph:
        for value in node.outputs:
            shape = static_shape(value)
            if shape is not None and math.prod(shape) > LARGEST_TENSOR:
                raise ExportError(
                    f"A tensor is too large for TensorRT, which takes {LARGEST_TENSOR:,} elements.",
                    given=f"{node.op_type} {node.name} gives {list(shape)}, {math.prod(shape):,} elements",
                    advice="Choose a smaller width, height or batch in the recipe.",
                )
