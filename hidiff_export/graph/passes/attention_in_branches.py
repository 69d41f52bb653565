"""Attention in the one form that TensorRT fuses inside a branch."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from hidiff_export.graph.passes.attention import is_causal, unsupported
from hidiff_export.graph.passes.base import (
    Declined,
    Operator,
    Outcome,
    Replacement,
    RewritePass,
    add_constant,
    make,
    produced_by,
    static_shape,
)
from hidiff_export.graph.passes.float32_operations import HALVES

LARGEST_SCORES = 2**31 - 1
"""Elements of the scores at most: TensorRT counts elements in 32 bits with a sign, those that it never stores too."""

_KEYS_LAST = (0, 1, 3, 2)
_WIDE = ir.TensorType(ir.DataType.FLOAT)


class AttentionInBranches(RewritePass):
    """Turns 16-bit ``Attention`` into products and a softmax, which TensorRT makes one kernel of again.

    TensorRT has no ``Attention`` inside an ``If``: "myelinOpSetInput called with unknown input tensor", whatever feeds
    it. Of the ways to write it out, few become one kernel (which does not store the scores) inside a branch and still
    add up in float32: queries scaled in their own type, both products float32, and scores and probabilities of 16 bits
    between them. Found by building each of them with TensorRT-RTX 1.7.1 and reading its list of layers. Scores rounded
    to 16 bits are what it costs.

    Requires: shapes and types known; opset 23 or later.
    Ensures: ``Attention`` is left only where `declined` says why, or where its types are float32 from the start.

    Args:
        largest_scores: elements of a tensor of scores at most; beyond, queries are taken a piece at a time.
    """

    operators: ClassVar[frozenset[Operator]] = frozenset({("", "Attention")})

    def __init__(self, largest_scores: int = LARGEST_SCORES) -> None:
        super().__init__()
        self._largest_scores = largest_scores

    def rewrite(self, node: ir.Node) -> Outcome:
        """Writes one attention out."""
        declined = unsupported(node)
        if declined is not None:
            return declined
        if is_causal(node):
            return Declined("it is causal, which no network with branches has")
        narrow = [_narrow(value) for value in node.inputs[:3] if value is not None]
        if len({value.dtype for value in narrow}) != 1 or narrow[0].dtype not in HALVES:
            return Declined("it is not of 16 bits")
        if any((shape := static_shape(value)) is None or len(shape) != 4 for value in narrow):
            return Declined("the shape of an input is not known, or not [batch, heads, tokens, size]")
        return _WrittenOut(node, *narrow).steps(self._largest_scores)


def _narrow(value: ir.Value) -> ir.Value:
    """The tensor of 16 bits behind a cast to float32, or the tensor itself."""
    if value.dtype == ir.DataType.FLOAT and (cast := produced_by(value, "Cast")) is not None:
        source = cast.inputs[0]
        assert source is not None  # a cast has an input
        return source
    return value


class _WrittenOut:
    """The nodes that one attention becomes; ``query``, ``key`` and ``value`` are of 16 bits."""

    def __init__(self, node: ir.Node, query: ir.Value, key: ir.Value, value: ir.Value) -> None:
        assert node.graph is not None
        self._graph: ir.Graph = node.graph
        self._node = node
        self._query, self._key, self._value = query, key, value
        self._nodes: list[ir.Node] = []

    def steps(self, largest_scores: int) -> Replacement:
        """Scaled queries, a piece at a time if need be, against all keys."""
        batch, heads, tokens, size = _shape(self._query)
        scale = self._node.attributes.get("scale")
        factor = np.array(size**-0.5 if scale is None else scale.as_float(), np.float32)
        # Multiplied in float32, because the factor itself would be rounded: 1/sqrt(40) in bfloat16 by 0.4%.
        scaled = self._add("Mul", [self._cast(self._query, _WIDE), add_constant(self._graph, factor)])
        scaled = self._cast(scaled, self._query.type)
        shape = tuple(_shape(self._key)[axis] for axis in _KEYS_LAST)
        keys = self._add("Transpose", [self._key], shape, perm=_KEYS_LAST)
        pieces = piece_count(tokens, batch * heads * tokens * _shape(self._key)[2], largest_scores)
        parts = [self._attend(part, keys) for part in self._split(scaled, pieces)]
        whole = (batch, heads, tokens, _shape(self._value)[3])
        result = parts[0] if pieces == 1 else self._add("Concat", parts, whole, axis=2)
        return Replacement([self._cast(result, self._node.outputs[0].type)], self._nodes)

    def _attend(self, query: ir.Value, keys: ir.Value) -> ir.Value:
        narrow = query.type
        leading, size = _shape(query)[:3], _shape(self._value)[3]
        scores = self._add("MatMul", [self._cast(query, _WIDE), self._cast(keys, _WIDE)], (*leading, _shape(keys)[3]))
        weights = self._add("Softmax", [self._cast(scores, narrow)], axis=-1)
        # Back to 16 bits here, so that pieces are joined as such.
        result = self._add("MatMul", [self._cast(weights, _WIDE), self._cast(self._value, _WIDE)], (*leading, size))
        return self._cast(result, narrow)

    def _split(self, query: ir.Value, pieces: int) -> list[ir.Value]:
        if pieces == 1:
            return [query]
        batch, heads, tokens, size = _shape(query)
        node = ir.node("Split", [query], {"axis": 2, "num_outputs": pieces}, num_outputs=pieces)
        for value in node.outputs:
            value.shape, value.type = ir.Shape((batch, heads, tokens // pieces, size)), query.type
        self._nodes.append(node)
        return list(node.outputs)

    def _cast(self, value: ir.Value, to: ir.TypeProtocol | None) -> ir.Value:
        assert to is not None  # types are known
        if value.type == to:
            return value
        self._nodes.append(make("Cast", [value], {"to": to.dtype}, shape=value.shape, type=to))
        return self._nodes[-1].outputs[0]

    def _add(
        self, op_type: str, inputs: list[ir.Value], shape: tuple[int, ...] | None = None, **attributes: object
    ) -> ir.Value:
        shape = _shape(inputs[0]) if shape is None else shape
        self._nodes.append(make(op_type, inputs, attributes, shape=shape, type=inputs[0].type))
        return self._nodes[-1].outputs[0]


def _shape(value: ir.Value) -> tuple[int, ...]:
    shape = static_shape(value)
    assert shape is not None  # checked before
    return shape


def piece_count(tokens: int, scores: int, largest_scores: int) -> int:
    """In how many equal pieces to take the queries: the fewest that keep each piece's scores within bounds.

    Args:
        tokens: all queries.
        scores: elements of the scores of all queries, over batch, heads and keys.
        largest_scores: elements that a piece may have; one query is always taken.
    """
    least = min(tokens, math.ceil(scores / largest_scores))
    return next(count for count in range(least, tokens + 1) if tokens % count == 0)
