"""The step graph: guidance, the sampler's step and the UNet's next input, for a device that keeps the latents.

`hidiff_runtime.format.step_graph` says what goes in and out. Every operator works element by element in float32, or
adds up over a picture. A matrix product would say the same in one line, and round the coefficients to the 10 bits of
TF32 where a backend likes to.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from hidiff_export.graph.capture import OPSET
from hidiff_export.graph.onnx_dtypes import ONNX_DTYPES
from hidiff_export.graph.portable import save
from hidiff_runtime.format.specs import GraphRecord, TensorSpec
from hidiff_runtime.format.step_graph import (
    CHANNELS,
    GUIDANCE_RESCALE,
    GUIDANCE_SCALE,
    INPUT_SCALE,
    LATENTS,
    NEXT_SAMPLE,
    NEXT_STATE,
    NEXT_UNSOUND,
    NOISE,
    NOISE_PRED,
    ROWS,
    SAMPLE,
    STATE,
    UNSOUND,
)

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
    """The graph while its nodes are being added."""

    def __init__(self, record: GraphRecord) -> None:
        self._record = record
        self._tape = ir.tape.Tape()
        self._given = {spec.name: _value(spec) for spec in record.inputs}
        self._shapes = {spec.name: spec.shape for spec in (*record.inputs, *record.outputs)}
        self._constants: list[ir.Value] = []

    def model(self) -> ir.Model:
        """The whole graph."""
        slots = self._shapes[STATE][0]
        states = self._parts(self._given[STATE], slots, axis=0)
        # The states' leading axis of 1 stays, and broadcasting gives it to the others.
        vector = [self._given[SAMPLE], self._guided(), self._given[NOISE], *states]
        rows = self._parts(self._reshaped(self._given[ROWS], (-1,)), (1 + slots) * len(vector), axis=0)
        combined = [
            self._combined(rows[index * len(vector) : (index + 1) * len(vector)], vector) for index in range(1 + slots)
        ]
        sample = self._reshaped(combined[0], self._shapes[NEXT_SAMPLE])
        found = {
            NEXT_SAMPLE: sample,
            NEXT_STATE: self._joined(combined[1:], axis=0),
            LATENTS: self._latents(sample),
            NEXT_UNSOUND: self._unsound(),
        }
        outputs = [_value(spec) for spec in self._record.outputs]
        for output in outputs:
            self._tape.op("Identity", [found[output.name or ""]], output=output)
        graph = ir.Graph(
            list(self._given.values()),
            outputs,
            nodes=self._tape.nodes,
            initializers=self._constants,
            opset_imports={"": OPSET},
            name="step",
        )
        model = ir.Model(graph, ir_version=_IR_VERSION)
        common.IdentityEliminationPass()(model)
        common.ShapeInferencePass()(model)
        for number, node in enumerate(graph):
            node.name = f"step/{node.op_type}{number}"
        return model

    def _guided(self) -> ir.Value:
        """As `hidiff_runtime.denoising.conditioning.guided`: up to a scale of 1 the positive half alone, to the bit."""
        noise_pred = self._given[NOISE_PRED]
        if GUIDANCE_SCALE not in self._given:
            return noise_pred
        negative, positive = self._parts(noise_pred, 2, axis=0)
        scale = self._given[GUIDANCE_SCALE]
        extra = self._op("Mul", scale, self._op("Sub", positive, negative))
        one = self._constant("one", np.ones(1, np.float32))
        combined = self._op("Add", negative, extra)
        if GUIDANCE_RESCALE in self._given:
            combined = self._rescaled(combined, positive, self._given[GUIDANCE_RESCALE], one)
        return self._op("Where", self._op("Greater", scale, one), combined, positive)

    def _rescaled(self, combined: ir.Value, positive: ir.Value, rescale: ir.Value, one: ir.Value) -> ir.Value:
        """As `hidiff_runtime.denoising.conditioning.guided` does; at 0 what it was, to the bit."""
        ratio = self._op("Sqrt", self._op("Div", self._spread(positive), self._spread(combined)))
        share = self._op("Mul", rescale, self._op("Mul", combined, ratio))
        mixed = self._op("Add", share, self._op("Mul", self._op("Sub", one, rescale), combined))
        none = self._constant("none", np.zeros(1, np.float32))
        return self._op("Where", self._op("Greater", rescale, none), mixed, combined)

    def _spread(self, value: ir.Value) -> ir.Value:
        """The sum of squared differences from the mean, for each picture: a variance without its divisor."""
        axes = self._constant("all_but_batch", np.array([1, 2, 3], np.int64))
        apart = self._op("Sub", value, self._op("ReduceMean", value, axes, keepdims=1))
        return self._op("ReduceSum", self._op("Mul", apart, apart), axes, keepdims=1)

    def _combined(self, row: list[ir.Value], vector: list[ir.Value]) -> ir.Value:
        total, *terms = (self._op("Mul", coefficient, value) for coefficient, value in zip(row, vector, strict=True))
        for term in terms:
            total = self._op("Add", total, term)
        return total

    def _latents(self, sample: ir.Value) -> ir.Value:
        """What the UNet takes next: the scaled sample for each half, inpainting's channels behind."""
        scaled = self._op("Mul", sample, self._given[INPUT_SCALE])
        repeat = self._shapes[LATENTS][0] // self._shapes[SAMPLE][0]
        stacked = self._joined([scaled] * repeat, axis=0)
        return self._joined([stacked, self._given[CHANNELS]], axis=1) if CHANNELS in self._given else stacked

    def _unsound(self) -> ir.Value:
        """One more evaluation; and it with its count, if it is unsound and none before it was."""
        done, first, count = self._parts(self._given[UNSOUND], 3, axis=0)
        zero = self._constant("zero", np.zeros(1, np.int32))
        now = self._op("Add", done, self._constant("one_more", np.ones(1, np.int32)))
        bad = self._bad()
        begins = self._op("And", self._op("Equal", first, zero), self._op("Greater", bad, zero))
        found, kept = self._joined([now, now, bad], axis=0), self._joined([now, first, count], axis=0)
        return self._op("Where", begins, found, kept)

    def _bad(self) -> ir.Value:
        """How many values of the UNet's output are not finite."""
        noise_pred = self._given[NOISE_PRED]
        bad = self._op("Or", self._op("IsNaN", noise_pred), self._op("IsInf", noise_pred))
        counted = self._op("Cast", self._reshaped(bad, (-1,)), to=ir.DataType.INT32)
        return self._op("ReduceSum", counted, self._constant("first_axis", np.zeros(1, np.int64)))

    def _parts(self, value: ir.Value, parts: int, *, axis: int) -> list[ir.Value]:
        """``value`` cut into equal parts along ``axis``, which stays."""
        if parts == 1:
            return [value]
        return list(self._tape.op_multi_out("Split", [value], {"axis": axis, "num_outputs": parts}, num_outputs=parts))

    def _joined(self, values: list[ir.Value], *, axis: int) -> ir.Value:
        return values[0] if len(values) == 1 else self._op("Concat", *values, axis=axis)

    def _reshaped(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        name = "shape_" + "_".join(map(str, shape)).replace("-1", "flat")
        return self._op("Reshape", value, self._constant(name, np.array(shape, np.int64)))

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        known = next((value for value in self._constants if value.name == name), None)
        if known is None:
            known = self._tape.initializer(ir.tensor(array, name=name), name)
            self._constants.append(known)
        return known

    def _op(self, kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return self._tape.op(kind, list(inputs), attributes)


def _value(spec: TensorSpec) -> ir.Value:
    return ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=ir.TensorType(ONNX_DTYPES[spec.dtype]))
