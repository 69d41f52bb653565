"""What every pass that rewrites ``Attention`` leaves alone."""

from __future__ import annotations

import onnx_ir as ir

from hidiff_export.graph.passes.base import Declined

_UNSUPPORTED = ("softcap", "qk_matmul_output_mode", "q_num_heads", "kv_num_heads")


def unsupported(node: ir.Node) -> Declined | None:
    """Says why an ``Attention`` is not one of queries, keys and values alone, causal or not, as networks have it."""
    if any(value is not None for value in node.inputs[3:]) or len(node.outputs) != 1:
        return Declined("it has a mask, a cache or more than one output")
    if any(name in node.attributes and node.attributes[name].value for name in _UNSUPPORTED):
        return Declined("it is capped, grouped or has its heads in the last axis")
    return None


def is_causal(node: ir.Node) -> bool:
    """Says whether a token attends to itself and those before it alone, as in text encoders."""
    causal = node.attributes.get("is_causal")
    return causal is not None and bool(causal.as_int())


def scale_of(node: ir.Node, size: int) -> float:
    """Gives what scores are multiplied by, for heads of this size."""
    given = node.attributes.get("scale")
    return size**-0.5 if given is None else given.as_float()
