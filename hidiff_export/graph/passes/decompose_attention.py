"""Attention as two products and a softmax, where there is no fused kernel for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from hidiff_export.graph.node_builder import NodeBuilder
from hidiff_export.graph.passes.attention import attention_shapes, is_causal, scale_of
from hidiff_export.graph.passes.base import Declined, Outcome, RewritePass, produced_by, static_shape
from hidiff_export.graph.passes.float32_operations import HALVES

HEAD_SIZES = range(16, 257, 8)
"""Head sizes that TensorRT has fused kernels for, in float16 and bfloat16."""

LARGEST_SCORES = 2**27
"""Elements of the scores that are held at a time: half a GiB in float32.

Scores and probabilities are both in memory while one becomes the other. At this bound they take at most a GiB, below
any float32 checkpoint's weights, while each product is still large enough to fill a GPU: the largest case that recipes
reach, SDXL at 4096 pixels with a window of 16384 tokens, is cut into 160 pieces. TensorRT refuses tensors of 2^31
elements or more, which whole scores exceed from 2048 pixels on.
"""

MASKED = -30000.0
"""Added to the scores that causal attention leaves out: far below any other, and a number in every type.

An infinity would do as well on paper, and be a NaN wherever a kernel subtracts it from itself.
"""

_KEYS_LAST = (0, 1, 3, 2)


class DecomposeAttention(RewritePass):
    """Turns ``Attention`` that TensorRT has no kernel for into ``MatMul``, ``Softmax``, ``MatMul``.

    Kernels there are for float16 and bfloat16 and head sizes of 16 to 256 in steps of 8, also where float16 or
    bfloat16 is cast to float32 just before: then the kernel takes the narrow type and adds up in float32. The rest,
    all float32 graphs among it, is computed a piece of the queries at a time. So is causal attention whatever its type:
    text encoders attend over 77 tokens, where no kernel is worth a difference between the precisions.

    Requires: shapes and types known; opset 23 or later.
    Ensures: ``Attention`` is left only where TensorRT has a kernel, or where `declined` says why.

    Args:
        largest_scores: elements of the scores that may be held at a time; one row of queries is always taken.
    """

    operators = frozenset({("", "Attention")})

    def __init__(self, largest_scores: int = LARGEST_SCORES) -> None:
        super().__init__()
        self._largest_scores = largest_scores

    def rewrite(self, node: ir.Node) -> Outcome:
        """Decomposes one attention."""
        shapes = attention_shapes(node)
        if isinstance(shapes, Declined):
            return shapes
        query, key, value = shapes
        if query[1] != key[1]:
            return Declined("queries and keys have different numbers of heads")
        fused = query[3] == value[3] and query[3] in HEAD_SIZES and not is_causal(node)
        if fused and all(_is_half(tensor) for tensor in node.inputs[:3]):
            return None
        return [_Decomposition(self.build, node).result(self._largest_scores)]


def _is_half(value: ir.Value | None) -> bool:
    """Says whether a tensor is of 16 bits, or was until it was cast to float32."""
    if value is not None and value.dtype == ir.DataType.FLOAT and (cast := produced_by(value, "Cast")) is not None:
        (value,) = cast.inputs
    return value is not None and value.dtype in HALVES


class _Decomposition:
    """The nodes that one attention becomes."""

    def __init__(self, build: NodeBuilder, node: ir.Node) -> None:
        self._build = build
        self._node = node

    def result(self, largest_scores: int) -> ir.Value:
        """Makes scaled queries and takes them, a piece at a time, against all keys."""
        query, key, value = (tensor for tensor in self._node.inputs[:3] if tensor is not None)
        batch, heads, tokens, size = _shape(query)
        # Before the product, so that scores are scaled at no cost.
        scaled = self._build.op("Mul", query, self._constant(scale_of(self._node, size), query))
        keys = self._build.op("Transpose", key, perm=_KEYS_LAST)
        rows = piece_sizes(tokens, batch * heads * _shape(key)[2], largest_scores)
        parts = [
            self._attend(part, keys, value, end - count)
            for part, count, end in zip(self._split(scaled, rows), rows, itertools.accumulate(rows), strict=True)
        ]
        return parts[0] if len(parts) == 1 else self._build.op("Concat", *parts, axis=2)

    def _attend(self, query: ir.Value, keys: ir.Value, value: ir.Value, first: int) -> ir.Value:
        """Makes what the queries from number ``first`` on find."""
        scores = self._build.op("MatMul", query, keys)
        if is_causal(self._node):
            *_, rows, columns = _shape(scores)
            later = np.arange(columns) > np.arange(first, first + rows)[:, None]
            scores = self._build.op("Add", scores, self._constant(np.where(later, MASKED, 0.0), query))
        return self._build.op("MatMul", self._build.op("Softmax", scores, axis=-1), value)

    def _constant(self, content: ArrayLike, like: ir.Value) -> ir.Value:
        assert like.dtype is not None  # types are known
        return self._build.constant(content, like.dtype.numpy())

    def _split(self, query: ir.Value, rows: list[int]) -> Sequence[ir.Value]:
        if len(rows) == 1:
            return [query]
        return self._build.multi_op("Split", query, self._build.constant(rows), outputs=len(rows), axis=2)


def _shape(value: ir.Value) -> tuple[int, ...]:
    shape = static_shape(value)
    assert shape is not None  # checked before
    return shape


def piece_sizes(tokens: int, scores_of_one: int, largest_scores: int) -> list[int]:
    """Says how many queries to take at a time, as evenly as can be.

    Args:
        tokens: all queries.
        scores_of_one: elements of the scores of one query, over batch, heads and keys.
        largest_scores: elements that may be held at a time.
    """
    count = min(tokens, math.ceil(tokens / max(1, largest_scores // scores_of_one)))
    small, larger = divmod(tokens, count)
    return [small + 1] * larger + [small] * (count - larger)
