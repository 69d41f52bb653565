"""What every pass that rewrites ``Attention`` leaves alone."""

from __future__ import annotations

import onnx_ir as ir

from hidiff_export.graph.passes.base import Declined, static_shape

_UNSUPPORTED = ("softcap", "qk_matmul_output_mode", "q_num_heads", "kv_num_heads")


def attention_shapes(node: ir.Node) -> tuple[tuple[int, ...], ...] | Declined:
    """Gives the shapes of queries, keys and values, or says why an ``Attention`` is not of these alone, and static."""
    if any(value is not None for value in node.inputs[3:]) or len(node.outputs) != 1:
        return Declined("it has a mask, a cache or more than one output")
    if any(name in node.attributes and node.attributes[name].value for name in _UNSUPPORTED):
        return Declined("it is capped, grouped or has its heads in the last axis")
    shapes = [static_shape(value) for value in node.inputs[:3]]
    known = tuple(shape for shape in shapes if shape is not None and len(shape) == 4)
    if len(known) != 3:
        return Declined("the shape of an input is not known, or not [batch, heads, tokens, size]")
    return known


def is_causal(node: ir.Node) -> bool:
    """Says whether a token attends to itself and those before it alone, as in text encoders."""
    causal = node.attributes.get("is_causal")
    return causal is not None and bool(causal.as_int())


def scale_of(node: ir.Node, size: int) -> float:
    """Gives what scores are multiplied by, for heads of this size."""
    given = node.attributes.get("scale")
    return size**-0.5 if given is None else given.as_float()
