"""Gated layers without the copy that splits their two halves."""

from __future__ import annotations

import itertools

import onnx_ir as ir

from hidiff_export.graph.passes.base import Declined, Outcome, RewritePass, produced_by, static_shape


class SplitGemm(RewritePass):
    """Turns a ``Gemm`` whose result is split into one ``Gemm`` for each part, on parts of its weight.

    GEGLU computes gate and values in one product and cuts it along the last axis, which copies all of it. The rows of
    a weight [out, in] for each part lie together in the weight store, so each part is a shorter piece of the same file.

    Integers that a weight is stored as are cut before they are dequantized, and their scales with them.

    Requires: shapes known; weights external (see ``ExternalizeWeights``) and read with ``transB``.
    Ensures: no such ``Split`` is left but where `declined` says why.
    """

    operators = frozenset({("", "Split")})

    def rewrite(self, node: ir.Node) -> Outcome:
        """Takes one split apart."""
        reshape = produced_by(node.inputs[0], "Reshape")
        gemm = produced_by(node.inputs[0] if reshape is None else reshape.inputs[0], "Gemm")
        shapes = [static_shape(output) for output in node.outputs]
        graph = node.graph
        if gemm is None or graph is None or any(shape is None for shape in shapes):
            return None
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        known = [shape for shape in shapes if shape is not None]
        if axis not in (-1, len(known[0]) - 1):
            return Declined("it is not split along the last axis")
        tensor, *parameters = gemm.inputs
        sizes = [shape[-1] for shape in known]
        by_output = "transB" in gemm.attributes and gemm.attributes["transB"].as_int() == 1
        if not by_output or not all(map(_is_cut, parameters)):
            return Declined("the weight is not external, or not stored by output")
        rows = static_shape(gemm.outputs[0])
        assert rows is not None  # as known as those of the split
        if sum(sizes) != rows[-1]:
            return Declined("its columns are not those of the product")
        if any(static_shape(bias) != rows[-1:] for bias in parameters[1:]):
            return Declined("the bias is not one for each output")
        outputs = []
        for end, size, shape in zip(itertools.accumulate(sizes), sizes, known, strict=True):
            parts = [self._rows(graph, value, end - size, size) for value in parameters]
            outputs.append(self.build.reshape(self.build.copy(gemm, tensor, *parts), shape))
        return outputs

    def _rows(self, graph: ir.Graph, value: ir.Value | None, begin: int, size: int) -> ir.Value:
        """Makes ``size`` rows of ``value``, from ``begin`` on: one initializer for all products on them."""
        assert value is not None
        dequantize = produced_by(value, "DequantizeLinear")
        if dequantize is not None:
            parts = [self._rows(graph, factor, begin, size) for factor in dequantize.inputs]
            return self.build.op("DequantizeLinear", *parts, axis=0)
        name = f"{value.name}[{begin}:{begin + size}]"
        if name in graph.initializers:
            return graph.initializers[name]
        whole = value.const_value
        assert whole is not None  # checked before
        if not isinstance(whole, ir.ExternalTensor):
            return self.build.initializer(ir.tensor(whole.numpy()[begin : begin + size], whole.dtype, name=name))
        assert whole.offset is not None
        (rows, *_) = static_shape(value) or (0,)
        row = whole.nbytes // rows
        part = ir.ExternalTensor(
            whole.location,
            whole.offset + begin * row,
            size * row,
            whole.dtype,
            shape=ir.Shape((size, *whole.shape[1:])),
            name=name,
            base_dir=whole.base_dir,
        )
        return self.build.initializer(part)


def _is_cut(value: ir.Value | None) -> bool:
    """Returns whether rows of a value are no new bytes, but for scales."""
    if value is None:
        return False
    dequantize = produced_by(value, "DequantizeLinear")
    if dequantize is None:
        return isinstance(value.const_value, ir.ExternalTensor)
    integers, *scales = dequantize.inputs
    by_row = "axis" in dequantize.attributes and dequantize.attributes["axis"].as_int() == 0
    vectors = all(
        scale is not None and scale.const_value is not None and len(scale.shape or ()) == 1 for scale in scales
    )
    return by_row and vectors and integers is not None and isinstance(integers.const_value, ir.ExternalTensor)
