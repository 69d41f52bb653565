"""Attention as ONNX Runtime's fused operator."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from hidiff_export.graph.passes.attention import is_causal, unsupported
from hidiff_export.graph.passes.base import (
    MICROSOFT,
    Declined,
    Operator,
    Outcome,
    Replacement,
    RewritePass,
    add_constant,
    make,
    static_shape,
)

_HEADS_FIRST = (0, 2, 1, 3)


class AttentionToMha(RewritePass):
    """Turns ``Attention`` on [batch, heads, tokens, size] into ``com.microsoft.MultiHeadAttention``.

    On the CPU that operator computes block by block and never holds all scores: at 4096 tokens a twenty-fifth of the
    memory and three quarters of the time; for a VAE's one head of 512 channels, at 6400 tokens, 41 MB where products
    and a softmax take 178 MB, in the same time. It takes [batch, tokens, heads * size], so this pass puts
    transpositions around it which cancel those that split and joined the heads.

    Requires: shapes known; opset 23 or later.
    Ensures: ``Attention`` is left only where `declined` says why.
    """

    operators: ClassVar[frozenset[Operator]] = frozenset({("", "Attention")})

    def rewrite(self, node: ir.Node) -> Outcome:
        """Lowers one attention."""
        shapes = [static_shape(value) for value in node.inputs[:3]]
        graph = node.graph
        assert graph is not None
        declined = unsupported(node)
        if declined is not None:
            return declined
        if any(shape is None or len(shape) != 4 for shape in shapes):
            return Declined("the shape of an input is not known, or not [batch, heads, tokens, size]")
        query, key, value = (shape for shape in shapes if shape is not None)
        if query[1] != key[1] or query[3] != value[3]:
            return Declined("queries and keys have different numbers of heads, or values another size")
        joined, nodes = [], []
        for tensor, shape in zip(node.inputs, (query, key, value), strict=False):
            steps = _join_heads(graph, tensor, shape)
            nodes.extend(steps)
            joined.append(steps[-1].outputs[0])
        attributes = {"num_heads": query[1], "scale": _scale(node, query[3]), "unidirectional": int(is_causal(node))}
        merged = (query[0], query[2], query[1] * query[3])
        mha = make("MultiHeadAttention", joined, attributes, domain=MICROSOFT, shape=merged, type=node.outputs[0].type)
        split = _split_heads(graph, mha.outputs[0], query)
        return Replacement([split[-1].outputs[0]], [*nodes, mha, *split])


def _scale(node: ir.Node, size: int) -> float:
    given = node.attributes.get("scale")
    return size**-0.5 if given is None else given.as_float()


def _join_heads(graph: ir.Graph, tensor: ir.Value | None, shape: tuple[int, ...]) -> list[ir.Node]:
    batch, heads, tokens, size = shape
    kind = None if tensor is None else tensor.type
    last = make("Transpose", [tensor], {"perm": _HEADS_FIRST}, shape=(batch, tokens, heads, size), type=kind)
    flat = np.array([batch, tokens, heads * size], np.int64)
    joined = make("Reshape", [last.outputs[0], add_constant(graph, flat)], shape=tuple(flat.tolist()), type=kind)
    return [last, joined]


def _split_heads(graph: ir.Graph, tensor: ir.Value, shape: tuple[int, ...]) -> list[ir.Node]:
    batch, heads, tokens, size = shape
    apart = np.array([batch, tokens, heads, size], np.int64)
    split = make("Reshape", [tensor, add_constant(graph, apart)], shape=tuple(apart.tolist()), type=tensor.type)
    first = make("Transpose", [split.outputs[0]], {"perm": _HEADS_FIRST}, shape=shape, type=tensor.type)
    return [split, first]
