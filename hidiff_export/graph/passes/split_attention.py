"""Attention over many keys, a piece of the keys at a time, merged exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from hidiff_export.graph.passes.attention import attention_shapes, is_causal, scale_of
from hidiff_export.graph.passes.base import Declined, Outcome, RewritePass
from hidiff_export.graph.passes.decompose_attention import piece_sizes

MOST_KEYS = 4096
"""Keys that are left in one piece."""

PIECE = 2304
"""Keys of a piece, at most.

OpenVINO's fused attention holds the scores of a few queries with all keys. While those fit a core's second-level cache
(1 MiB here), in bfloat16, it computes 240 to 260 GFLOP/s; from 9216 keys on half of that, and with a head of 512
channels, as in a VAE, a fifth. Pieces of 1536 to 2304 keys were the fastest at every size from 6144 to 36864 keys; in
float32 pieces of no size gained anything.
"""

PROBES = 256
"""Keys, at least, by which the largest score of a query is estimated."""

ABOVE = 60.0
"""How far the reference scores above the best probe. That probe is a key, so some key reaches it: its exponential, and
those of scores up to 27 below, are still normal numbers beside the reference's."""

SMALLEST_SHARE = 1e-34
"""What a reference's share of a piece is taken for where it is smaller: where a key scores more than 138 above all
probes. Several pieces with such keys would be weighted alike; one alone outweighs all else, as it should. In bfloat16
scores that differ so much are rounded by whole units anyway."""


class SplitAttention(RewritePass):
    """Turns ``Attention`` over many keys into one for each piece of them, and merges what they find.

    A softmax over a piece leaves out how much the piece weighs beside the others, the sum of its exponentials. So each
    piece gets one key more, a *reference* that scores the same in all of them, and values two columns more: ones for
    its keys, and one for its reference. These columns come out as what the piece's keys and the reference take of 1,
    and their quotient is the piece's sum of exponentials in units of the reference's. What the reference scores follows
    from the best of some probed keys, through a column more of queries and keys: so all sums are within range.

    Requires: shapes and types known; opset 23 or later.
    Ensures: no ``Attention`` over more than ``most_keys`` keys is left, but where `declined` says why.

    Args:
        most_keys: that are left in one piece.
        piece: keys of a piece, at most.
        probes: keys, at least, that the reference is chosen by.
    """

    operators = frozenset({("", "Attention")})

    def __init__(self, most_keys: int = MOST_KEYS, piece: int = PIECE, probes: int = PROBES) -> None:
        super().__init__()
        self._most_keys, self._piece, self._probes = most_keys, piece, probes

    def rewrite(self, node: ir.Node) -> Outcome:
        """Splits one attention."""
        shapes = attention_shapes(node)
        if isinstance(shapes, Declined):
            return shapes
        query, key, value = shapes
        if key[2] <= self._most_keys:
            return None
        if query[1] != key[1] or is_causal(node):
            return Declined("it is causal, or queries and keys have different numbers of heads")
        queries, keys, values = (tensor for tensor in node.inputs[:3] if tensor is not None)
        scale = scale_of(node, query[3])
        scored = self._concat(queries, self._reference(queries, keys, key[2], scale), axis=3)
        sizes = piece_sizes(key[2], 1, self._piece)
        parts = [
            self.build.op("Attention", scored, *pair, scale=scale)
            for pair in zip(self._keys(keys, key, sizes), self._values(values, value, sizes), strict=True)
        ]
        return [self._merge(parts, value[3])]

    def _reference(self, queries: ir.Value, keys: ir.Value, tokens: int, scale: float) -> ir.Value:
        """Makes what each query's reference scores before it is scaled, [batch, heads, tokens, 1]."""
        # An odd step, or all probes of a square window would be of one column.
        step = max(1, tokens // self._probes - 1) | 1
        slices = (self.build.constant([number]) for number in (0, tokens, 2, step))
        probed = self.build.op("Transpose", self.build.op("Slice", keys, *slices), perm=(0, 1, 3, 2))
        products = self.build.op("MatMul", queries, probed)
        best = self.build.op("ReduceMax", products, self.build.constant([3]), keepdims=1)
        return self.build.op("Add", best, self._constant(np.array(ABOVE / scale), best))

    def _keys(self, keys: ir.Value, shape: Sequence[int], sizes: list[int]) -> list[ir.Value]:
        """Makes each piece's keys, with a 0 that leaves out the new column of queries, and the reference last."""
        return self._pieces(self._widen(keys, 0), sizes, np.zeros((*shape[:2], 1, shape[3])))

    def _values(self, values: ir.Value, shape: Sequence[int], sizes: list[int]) -> list[ir.Value]:
        """Makes each piece's values, with what tells its keys (1, 0) from the reference (0, 1)."""
        told = self._widen(self._widen(values, 1), 0)
        return self._pieces(told, sizes, np.zeros((*shape[:2], 1, shape[3] + 1)))

    def _widen(self, tensor: ir.Value, content: float) -> ir.Value:
        """Makes a column more, of the same number throughout."""
        number = self._constant(np.array(content), tensor)
        return self.build.op("Pad", tensor, self.build.constant([0] * 7 + [1]), number)

    def _pieces(self, tensor: ir.Value, sizes: list[int], reference: np.ndarray) -> list[ir.Value]:
        """Makes pieces of keys or values, each with a row more, that ends in a 1."""
        row = self._constant(np.pad(reference, ((0, 0),) * 3 + ((0, 1),), constant_values=1), tensor)
        return [self._concat(piece, row, axis=2) for piece in self._split(tensor, sizes, axis=2)]

    def _merge(self, parts: Sequence[ir.Value], size: int) -> ir.Value:
        """Makes the mean of the pieces' values, each weighted by its sum of exponentials."""
        dtype = parts[0].dtype
        assert dtype is not None  # types are known
        weighted = []
        for part in parts:
            # float16 has no numbers as small as shares are; it is what int8 graphs are of, not what OpenVINO computes.
            wide = self.build.cast(part, ir.DataType.FLOAT) if dtype is ir.DataType.FLOAT16 else part
            found, share = self._split(wide, [size + 1, 1], axis=3)
            bounded = self.build.op("Max", share, self._constant(np.array(SMALLEST_SHARE), share))
            weighted.append(self.build.op("Div", found, bounded))
        # In pairs, so that what is rounded to bfloat16 is rounded thrice for eight pieces.
        while len(weighted) > 1:
            pairs = zip(weighted[::2], weighted[1::2], strict=False)
            left = weighted[-1:] if len(weighted) % 2 else []
            weighted = [self.build.op("Add", *pair) for pair in pairs] + left
        values, weights = self._split(weighted[0], [size, 1], axis=3)
        return self.build.cast(self.build.op("Div", values, weights), dtype)

    def _split(self, tensor: ir.Value, sizes: list[int], axis: int) -> Sequence[ir.Value]:
        return self.build.multi_op("Split", tensor, self.build.constant(sizes), outputs=len(sizes), axis=axis)

    def _concat(self, *tensors: ir.Value, axis: int) -> ir.Value:
        return self.build.op("Concat", *tensors, axis=axis)

    def _constant(self, content: np.ndarray, like: ir.Value) -> ir.Value:
        assert like.dtype is not None  # types are known
        return self.build.constant(content, like.dtype.numpy())
