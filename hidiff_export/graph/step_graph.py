"""The step graph: guidance, the sampler's step and the UNet's next input, for a device that keeps the latents.

`hidiff_runtime.format.step_graph` says what goes in and out. Every operator works element by element in float32, or
adds up over a picture. A matrix product would say the same in one line, and round the coefficients to the 10 bits of
TF32 where a backend likes to.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from hidiff_export.graph.capture import OPSET
from hidiff_export.graph.node_builder import NodeBuilder
from hidiff_export.graph.onnx_dtypes import ONNX_DTYPES
from hidiff_export.graph.portable import save
from hidiff_runtime.format import step_graph as names
from hidiff_runtime.format.specs import GraphRecord, TensorSpec

_IR_VERSION = 10


def write_step_graph(record: GraphRecord, path: Path) -> None:
    """Writes the step graph.

    Args:
        record: its inputs and outputs, as `hidiff_runtime.format.step_graph` lists them.
        path: of the ONNX file.

    Raises:
        OSError: the file cannot be written.
    """
    save(_StepGraph(record).model(), path)


class _StepGraph:
    """The step graph while its nodes are being made."""

    def __init__(self, record: GraphRecord) -> None:
        self._record = record
        self._given = {spec.name: _value(spec) for spec in record.inputs}
        self._shapes = {spec.name: spec.shape for spec in (*record.inputs, *record.outputs)}
        self._graph = ir.Graph([*self._given.values()], [], nodes=[], opset_imports={"": OPSET}, name="step")
        self._build = NodeBuilder(self._graph)

    def model(self) -> ir.Model:
        """Makes the whole graph."""
        slots = self._shapes[names.STATE][0]
        states = self._parts(self._given[names.STATE], slots, axis=0)
        # The states' leading axis of 1 stays, and broadcasting gives it to the others.
        vector = [self._given[names.SAMPLE], self._guided(), self._given[names.NOISE], *states]
        rows = self._parts(self._reshaped(self._given[names.ROWS], (-1,)), (1 + slots) * len(vector), axis=0)
        combined = [
            self._combined(rows[index * len(vector) : (index + 1) * len(vector)], vector) for index in range(1 + slots)
        ]
        sample = self._reshaped(combined[0], self._shapes[names.NEXT_SAMPLE])
        found = {
            names.NEXT_SAMPLE: sample,
            names.NEXT_STATE: self._joined(combined[1:], axis=0),
            names.LATENTS: self._latents(sample, guided=True),
            names.NEXT_UNSOUND: self._unsound(),
        }
        if names.UNGUIDED_LATENTS in self._shapes:
            found[names.UNGUIDED_LATENTS] = self._latents(sample, guided=False)
        self._graph.extend(self._build.nodes)
        for spec in self._record.outputs:
            found[spec.name].name = spec.name
            self._graph.outputs.append(found[spec.name])
        for number, node in enumerate(self._graph):
            node.name = f"step/{node.op_type}{number}"
        return ir.Model(self._graph, ir_version=_IR_VERSION)

    def _guided(self) -> ir.Value:
        """Guides as `hidiff_runtime.denoising.conditioning.guided`: up to 1 the positive half alone, to the bit."""
        noise_pred = self._given[names.NOISE_PRED]
        if names.GUIDANCE_SCALE not in self._given:
            return noise_pred
        negative, positive = self._parts(noise_pred, 2, axis=0)
        scale = self._given[names.GUIDANCE_SCALE]
        extra = self._build.op("Mul", scale, self._build.op("Sub", positive, negative))
        one = self._build.constant([1], np.float32, "one")
        combined = self._build.op("Add", negative, extra)
        if names.GUIDANCE_RESCALE in self._given:
            combined = self._rescaled(combined, positive, self._given[names.GUIDANCE_RESCALE], one)
        return self._build.op("Where", self._build.op("Greater", scale, one), combined, positive)

    def _rescaled(self, combined: ir.Value, positive: ir.Value, rescale: ir.Value, one: ir.Value) -> ir.Value:
        """Rescales as `hidiff_runtime.denoising.conditioning.guided` does; at 0 what it was, to the bit."""
        ratio = self._build.op("Sqrt", self._build.op("Div", self._spread(positive), self._spread(combined)))
        share = self._build.op("Mul", rescale, self._build.op("Mul", combined, ratio))
        mixed = self._build.op("Add", share, self._build.op("Mul", self._build.op("Sub", one, rescale), combined))
        none = self._build.constant([0], np.float32, "none")
        return self._build.op("Where", self._build.op("Greater", rescale, none), mixed, combined)

    def _spread(self, value: ir.Value) -> ir.Value:
        """Computes the sum of squared differences from the mean, for each picture: a variance without its divisor."""
        axes = self._build.constant([1, 2, 3], name="all_but_batch")
        apart = self._build.op("Sub", value, self._build.op("ReduceMean", value, axes, keepdims=1))
        return self._build.op("ReduceSum", self._build.op("Mul", apart, apart), axes, keepdims=1)

    def _combined(self, row: list[ir.Value], vector: list[ir.Value]) -> ir.Value:
        total, *terms = (self._build.op("Mul", factor, value) for factor, value in zip(row, vector, strict=True))
        for term in terms:
            total = self._build.op("Add", total, term)
        return total

    def _latents(self, sample: ir.Value, *, guided: bool) -> ir.Value:
        """Makes what the UNet takes next: the scaled sample for each half, inpainting's channels behind."""
        scaled = self._build.op("Mul", sample, self._given[names.INPUT_SCALE])
        repeat = self._shapes[names.LATENTS][0] // self._shapes[names.SAMPLE][0]
        stacked = self._joined([scaled] * (repeat if guided else 1), axis=0)
        channels = self._given.get(names.CHANNELS)
        if channels is None:
            return stacked
        halves = [channels] if guided else self._parts(channels, repeat, axis=0)  # both halves are the same
        return self._joined([stacked, halves[-1]], axis=1)

    def _unsound(self) -> ir.Value:
        """Counts an evaluation, and notes it with its unsound values if none before it had any."""
        done, first, count = self._parts(self._given[names.UNSOUND], 3, axis=0)
        zero = self._build.constant([0], np.int32, "zero")
        now = self._build.op("Add", done, self._build.constant([1], np.int32, "one_more"))
        bad = self._bad()
        begins = self._build.op("And", self._build.op("Equal", first, zero), self._build.op("Greater", bad, zero))
        found, kept = self._joined([now, now, bad], axis=0), self._joined([now, first, count], axis=0)
        return self._build.op("Where", begins, found, kept)

    def _bad(self) -> ir.Value:
        """Counts how many values of the UNet's output are not finite."""
        noise_pred = self._given[names.NOISE_PRED]
        bad = self._build.op("Or", self._build.op("IsNaN", noise_pred), self._build.op("IsInf", noise_pred))
        counted = self._build.op("Cast", self._reshaped(bad, (-1,)), to=ir.DataType.INT32)
        return self._build.op("ReduceSum", counted, self._build.constant([0], name="first_axis"))

    def _parts(self, value: ir.Value, parts: int, *, axis: int) -> list[ir.Value]:
        """Cuts ``value`` into equal parts along ``axis``, which stays."""
        if parts == 1:
            return [value]
        return list(self._build.multi_op("Split", value, outputs=parts, axis=axis, num_outputs=parts))

    def _joined(self, values: list[ir.Value], *, axis: int) -> ir.Value:
        return values[0] if len(values) == 1 else self._build.op("Concat", *values, axis=axis)

    def _reshaped(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        name = "shape_" + "_".join(map(str, shape)).replace("-1", "flat")
        return self._build.op("Reshape", value, self._build.constant(shape, name=name))


def _value(spec: TensorSpec) -> ir.Value:
    return ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=ir.TensorType(ONNX_DTYPES[spec.dtype]))
