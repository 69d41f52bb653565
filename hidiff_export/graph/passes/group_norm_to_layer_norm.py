"""Group normalisation by the kernel that ONNX Runtime does best."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

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

LARGEST_GROUP = 2**18
"""Elements that ONNX Runtime's kernel sums up well: it adds them one by one in float32.

That leaves 131 dB over 2^16 elements, 118 dB over 2^18, but 100 dB over 2^20 and 73 dB over 2^23, which a VAE's groups
have at 1024 pixels.
"""

_FLOAT = ir.TensorType(ir.DataType.FLOAT)


class GroupNormToLayerNorm(RewritePass):
    """Turns ``GroupNormalization`` into ``LayerNormalization`` over whole groups, then scale and bias by channel.

    ONNX Runtime has no kernel for it on the CPU and takes it apart into means, differences and products: twice the
    time, and inexact where a group's mean is large beside its spread (69 dB at 20 times, where this gives 119 dB).

    Groups that are too large for the kernel are normalised in pieces of a channel. The pieces' means and deviations,
    which it gives too, make up the group's, and scale and bias, by piece then, put right what the pieces lack: no
    further pass over the tensor.

    Requires: shapes known.
    Ensures: ``GroupNormalization`` is left only where `declined` says why.

    Args:
        largest_group: elements of a group up to which it is normalised whole; a quarter of it is the largest piece.
    """

    operators: ClassVar[frozenset[Operator]] = frozenset({("", "GroupNormalization")})

    def __init__(self, largest_group: int = LARGEST_GROUP) -> None:
        super().__init__()
        self._largest_group = largest_group

    def rewrite(self, node: ir.Node) -> Outcome:
        """Lowers one normalisation."""
        tensor = node.inputs[0]
        shape = static_shape(tensor)
        if shape is None or tensor is None or node.graph is None or tensor.dtype is None:
            return Declined("the input's shape or type is not known")
        lowered = _Lowered(node, shape)
        groups = node.attributes["num_groups"].as_int()
        if shape[1] // groups * math.prod(shape[2:]) <= self._largest_group:
            return lowered.whole(groups)
        return lowered.in_pieces(groups, self._largest_group // 4)


class _Lowered:
    """The nodes that one normalisation becomes."""

    def __init__(self, node: ir.Node, shape: tuple[int, ...]) -> None:
        assert node.graph is not None
        self._graph: ir.Graph = node.graph
        self._node = node
        self._shape = shape
        self._kind = node.outputs[0].type
        self._nodes: list[ir.Node] = []

    def whole(self, groups: int) -> Replacement:
        """Each group at once."""
        tensor, scale, bias = self._node.inputs
        length = self._shape[1] // groups * math.prod(self._shape[2:])
        normal = self._normalise(tensor, (self._shape[0], groups, length))[0]
        joined = self._reshape(normal, self._shape)
        by_channel = (self._shape[1], *(1 for _ in self._shape[2:]))
        return self._scaled(joined, self._reshape(scale, by_channel), self._reshape(bias, by_channel), self._shape)

    def in_pieces(self, groups: int, largest: int) -> Replacement:
        """Each channel in pieces of at most ``largest`` elements, corrected by what they have in common."""
        tensor, scale, bias = self._node.inputs
        batch, channels, places = self._shape[0], self._shape[1], math.prod(self._shape[2:])
        count = next(count for count in range(-(-places // largest), places + 1) if places % count == 0)
        pieces, grouped = (batch, channels * count, 1), (batch, groups, channels // groups * count)
        normal, mean, inverse = self._normalise(tensor, (batch, channels * count, places // count), statistics=True)
        mean, deviation = self._reshape(mean, grouped), self._reciprocal(self._reshape(inverse, grouped))
        offset = self._make("Sub", [mean, self._mean(mean)], grouped)
        # The deviations hold epsilon already, and so does their mean square.
        squares = (self._make("Mul", [value, value], grouped) for value in (deviation, offset))
        variance = self._mean(self._make("Add", list(squares), grouped))
        whole = self._reciprocal(self._make("Sqrt", [variance], (batch, groups, 1)))
        factor, term = (self._make("Mul", [value, whole], grouped) for value in (deviation, offset))
        by_channel = (batch, channels, count)
        wide_scale, wide_bias = (self._cast(self._reshape(value, (channels, 1)), _FLOAT) for value in (scale, bias))
        factor, term = (
            self._make("Mul", [self._reshape(value, by_channel), wide_scale], by_channel) for value in (factor, term)
        )
        term = self._make("Add", [term, wide_bias], by_channel)
        factor, term = (self._cast(self._reshape(value, pieces), self._kind) for value in (factor, term))
        replacement = self._scaled(normal, factor, term, (batch, channels * count, places // count))
        return Replacement([self._reshape(replacement.values[0], self._shape)], self._nodes)

    def _normalise(
        self, tensor: ir.Value | None, shape: tuple[int, ...], *, statistics: bool = False
    ) -> tuple[ir.Value, ...]:
        """The tensor in this shape, normalised along its last axis; and its means and inverse deviations, float32."""
        # Made when the engine loads, since it may be megabytes of ones.
        assert self._kind is not None  # a tensor's type is known
        one = ir.tensor(np.ones(1, self._kind.dtype.numpy()), dtype=self._kind.dtype)
        ones = self._make("ConstantOfShape", [self._sizes(shape[-1:])], shape[-1:], self._kind, value=one)
        attributes: dict[str, Any] = {
            "axis": -1,
            **{name: self._node.attributes[name] for name in _KEPT if name in self._node.attributes},
        }
        node = ir.node(
            "LayerNormalization",
            [self._reshape(tensor, shape), ones],
            attributes,
            num_outputs=3 if statistics else 1,
        )
        for value, size, kind in zip(node.outputs, (shape[-1], 1, 1), (self._kind, _FLOAT, _FLOAT), strict=False):
            value.shape, value.type = ir.Shape((*shape[:-1], size)), kind
        self._nodes.append(node)
        return tuple(node.outputs)

    def _scaled(self, tensor: ir.Value, factor: ir.Value, term: ir.Value, shape: tuple[int, ...]) -> Replacement:
        scaled = self._make("Mul", [tensor, factor], shape, self._kind)
        return Replacement([self._make("Add", [scaled, term], shape, self._kind)], self._nodes)

    def _mean(self, value: ir.Value) -> ir.Value:
        shape = static_shape(value)
        assert shape is not None  # its own
        axis = add_constant(self._graph, np.array([-1], np.int64))
        return self._make("ReduceMean", [value, axis], (*shape[:-1], 1), keepdims=1)

    def _reciprocal(self, value: ir.Value) -> ir.Value:
        return self._make("Reciprocal", [value], static_shape(value))

    def _reshape(self, value: ir.Value | None, shape: tuple[int, ...]) -> ir.Value:
        return self._make("Reshape", [value, self._sizes(shape)], shape, None if value is None else value.type)

    def _cast(self, value: ir.Value, to: ir.TypeProtocol | None) -> ir.Value:
        return value if to is None or value.type == to else self._make("Cast", [value], value.shape, to, to=to.dtype)

    def _sizes(self, shape: tuple[int, ...]) -> ir.Value:
        return add_constant(self._graph, np.array(shape, np.int64))

    def _make(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        shape: tuple[int, ...] | ir.Shape | None,
        kind: ir.TypeProtocol | None = _FLOAT,
        **attributes: object,
    ) -> ir.Value:
        self._nodes.append(make(op_type, inputs, attributes, shape=shape, type=kind))
        return self._nodes[-1].outputs[0]


_KEPT = ("epsilon", "stash_type")
