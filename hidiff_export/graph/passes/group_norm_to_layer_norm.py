"""Group normalization by the kernel that ONNX Runtime does best."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from hidiff_export.graph.node_builder import NodeBuilder
from hidiff_export.graph.passes.base import Declined, Outcome, RewritePass, static_shape

LARGEST_GROUP = 2**18
"""Elements that ONNX Runtime's kernel sums up well: it adds them one by one in float32.

That leaves 131 dB over 2^16 elements, 118 dB over 2^18, but 100 dB over 2^20 and 73 dB over 2^23, which a VAE's groups
have at 1024 pixels.
"""

_KEPT = ("epsilon", "stash_type")


class GroupNormToLayerNorm(RewritePass):
    """Turns ``GroupNormalization`` into ``LayerNormalization`` over whole groups, then scale and bias by channel.

    ONNX Runtime has no kernel for it on the CPU and takes it apart into means, differences and products: twice the
    time, and inexact where a group's mean is large beside its spread (69 dB at 20 times, where this gives 119 dB).

    Groups that are too large for the kernel are normalized in pieces of a channel. The pieces' means and deviations,
    which it gives too, make up the group's, and scale and bias, by piece then, put right what the pieces lack: no
    further pass over the tensor.

    Requires: shapes known.
    Ensures: ``GroupNormalization`` is left only where `declined` says why.

    Args:
        largest_group: elements of a group up to which it is normalized whole; a quarter of it is the largest piece.
    """

    operators = frozenset({("", "GroupNormalization")})

    def __init__(self, largest_group: int = LARGEST_GROUP) -> None:
        super().__init__()
        self._largest_group = largest_group

    def rewrite(self, node: ir.Node) -> Outcome:
        """Lowers one normalization."""
        tensor = node.inputs[0]
        shape = static_shape(tensor)
        if shape is None or tensor is None or tensor.dtype is None:
            return Declined("the input's shape or type is not known")
        lowered = _Lowered(self.build, node, shape, tensor.dtype)
        groups = node.attributes["num_groups"].as_int()
        if shape[1] // groups * math.prod(shape[2:]) <= self._largest_group:
            return [lowered.whole(groups)]
        return [lowered.in_pieces(groups, self._largest_group // 4)]


class _Lowered:
    """The nodes that one normalization becomes."""

    def __init__(self, build: NodeBuilder, node: ir.Node, shape: tuple[int, ...], dtype: ir.DataType) -> None:
        self._build = build
        self._node = node
        self._shape = shape
        self._dtype = dtype

    def whole(self, groups: int) -> ir.Value:
        """Normalizes each group at once."""
        tensor, scale, bias = self._node.inputs
        length = self._shape[1] // groups * math.prod(self._shape[2:])
        (normal,) = self._normalize(tensor, (self._shape[0], groups, length))
        joined = self._build.reshape(normal, self._shape)
        by_channel = (self._shape[1], *(1 for _ in self._shape[2:]))
        return self._scaled(joined, self._build.reshape(scale, by_channel), self._build.reshape(bias, by_channel))

    def in_pieces(self, groups: int, largest: int) -> ir.Value:
        """Normalizes channels in pieces of at most ``largest`` elements, corrected by what they have in common."""
        build, (tensor, scale, bias) = self._build, self._node.inputs
        batch, channels, places = self._shape[0], self._shape[1], math.prod(self._shape[2:])
        count = next(count for count in range(-(-places // largest), places + 1) if places % count == 0)
        pieces, grouped = (batch, channels * count, 1), (batch, groups, channels // groups * count)
        normal, mean, inverse = self._normalize(tensor, (batch, channels * count, places // count), outputs=3)
        mean, deviation = build.reshape(mean, grouped), build.op("Reciprocal", build.reshape(inverse, grouped))
        offset = build.op("Sub", mean, self._mean(mean))
        # The deviations hold epsilon already, and so does their mean square.
        squares = [build.op("Mul", value, value) for value in (deviation, offset)]
        variance = self._mean(build.op("Add", *squares))
        whole = build.op("Reciprocal", build.op("Sqrt", variance))
        factor, term = (build.op("Mul", value, whole) for value in (deviation, offset))
        wide_scale, wide_bias = (
            build.cast(build.reshape(value, (channels, 1)), ir.DataType.FLOAT) for value in (scale, bias)
        )
        by_channel = (batch, channels, count)
        factor, term = (build.op("Mul", build.reshape(value, by_channel), wide_scale) for value in (factor, term))
        term = build.op("Add", term, wide_bias)
        factor, term = (build.cast(build.reshape(value, pieces), self._dtype) for value in (factor, term))
        return build.reshape(self._scaled(normal, factor, term), self._shape)

    def _normalize(self, tensor: ir.Value | None, shape: tuple[int, ...], outputs: int = 1) -> Sequence[ir.Value]:
        """Normalizes the tensor in this shape along its last axis; gives means and inverse deviations too, float32."""
        # Made when the engine loads, since it may be megabytes of ones.
        one = ir.tensor(np.ones(1, self._dtype.numpy()), dtype=self._dtype)
        ones = self._build.op("ConstantOfShape", self._build.constant(shape[-1:]), value=one)
        kept = {name: self._node.attributes[name] for name in _KEPT if name in self._node.attributes}
        flat = self._build.reshape(tensor, shape)
        return self._build.multi_op("LayerNormalization", flat, ones, outputs=outputs, axis=-1, **kept)

    def _scaled(self, tensor: ir.Value, factor: ir.Value, term: ir.Value) -> ir.Value:
        return self._build.op("Add", self._build.op("Mul", tensor, factor), term)

    def _mean(self, value: ir.Value) -> ir.Value:
        return self._build.op("ReduceMean", value, self._build.constant([-1]), keepdims=1)
