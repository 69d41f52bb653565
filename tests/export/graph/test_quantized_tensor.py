"""fp8 scales: what ModelOpt measures, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from hidiff_export.graph.quantized_tensor import FP8_LARGEST, INT8_LARGEST, MODELOPT_FP8, QuantizedTensor, fp8_tensor
from hidiff_export.quantization import worker
from hidiff_export.quantization.quantize import quantize_graph
from hidiff_export.recipe.field_types import Precision

LARGEST = np.array([2.0, 0.25, 1.0, 0.03, 0.0078125])
"""Of each row of the weight."""

SEEN = 3.0
"""The largest magnitude among the calibration inputs."""


def tensor(scale: float, axis: int | None) -> QuantizedTensor:
    return QuantizedTensor("t", (scale,), axis, (("a/Gemm", 0),))


@pytest.mark.parametrize("largest", [0.01, 1.0, 36.0, 1000.0])
def test_a_weights_largest_number_becomes_the_types_and_activations_have_room(largest: float) -> None:
    measured = largest * MODELOPT_FP8
    assert measured == pytest.approx(largest / 36, rel=1e-4)  # what a correction has to undo
    (weight,) = fp8_tensor(tensor(measured, 0)).scale
    (activation,) = fp8_tensor(tensor(measured, None)).scale
    assert weight == pytest.approx(largest / 448, rel=1e-2)
    assert activation == pytest.approx(largest / 127, rel=1e-2)
    assert weight * 448 >= largest * (1 - 1e-12)
    assert weight == float(np.float16(weight))


@pytest.mark.parametrize("largest", [1e-3, 1e-5, 1e-7])
def test_a_scale_among_the_smallest_float16_numbers_still_holds_the_largest_and_is_not_zero(largest: float) -> None:
    (scale,) = fp8_tensor(tensor(largest * MODELOPT_FP8, 0)).scale
    assert scale * 448 >= largest * (1 - 1e-12)
    assert scale == float(np.float16(scale)) > 0
    assert np.float16(1e-7 / 448) == 0  # rounded to the nearest it would be


def gemm(folder: Path) -> tuple[Path, np.ndarray]:
    """One linear layer of known largest weights, float16, as a portable graph."""
    weight = np.random.default_rng(0).uniform(-1, 1, (LARGEST.size, 64))
    weight = (weight / np.abs(weight).max(axis=1, keepdims=True) * LARGEST[:, None]).astype(np.float16)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape((4, 64)))
    w = ir.Value(name="w", type=x.type, shape=ir.Shape(weight.shape), const_value=ir.tensor(weight, name="w"))
    node = ir.node("Gemm", [x, w], {"transB": 1}, name="layer/Gemm")
    (y,) = node.outputs
    y.name, y.type, y.shape = "y", x.type, ir.Shape((4, LARGEST.size))
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 23}, name="g")
    ir.save(ir.Model(graph, ir_version=10), folder / "layer.float16.onnx")
    return folder / "layer.float16.onnx", weight


@pytest.mark.slow
def test_scales_come_of_the_largest_numbers_that_modelopt_sees(tmp_path: Path) -> None:
    pytest.importorskip("modelopt")
    graph, weight = gemm(tmp_path)
    inputs = [np.linspace(-size, size, 256).reshape(4, 64).astype(np.float16) for size in (1.0, SEEN)]
    quantize_graph(graph, [{"x": x} for x in inputs], Precision.FP8, tmp_path / "layer.onnx")
    scales = {place.axis: np.array(place.scale) for place in worker.places(onnx.load(tmp_path / "layer.onnx"))}
    largest = np.abs(weight.astype(np.float64)).max(axis=1)
    np.testing.assert_allclose(scales[0], largest / FP8_LARGEST, rtol=5e-3)
    np.testing.assert_allclose(scales[None], SEEN / INT8_LARGEST, rtol=5e-3)


def rounded_db(values: np.ndarray, scale: float, counted: slice = slice(None)) -> float:
    """The signal-to-noise ratio of values in fp8, in decibels, over some of them."""
    limited = np.clip(values / np.float32(scale), -FP8_LARGEST, FP8_LARGEST).astype(np.float32)
    error = limited.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale) - values
    return float(10 * np.log10((values[counted] ** 2).sum() / (error[counted] ** 2).sum()))


def normal() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)


WHOLE, ROOM = 1 / FP8_LARGEST, 1 / INT8_LARGEST
"""Scales, as parts of the largest number: the whole range, and with room for larger ones."""


@pytest.mark.parametrize(("grown", "whole", "room"), [(1.0, 31.6, 31.5), (2.0, 23.5, 31.5), (3.5, 11.7, 31.6)])
def test_room_saves_activations_that_grow(grown: float, whole: float, room: float) -> None:
    seen = normal()
    largest = np.abs(seen).max()
    found = [rounded_db(seen * np.float32(grown), largest * scale) for scale in (WHOLE, ROOM)]
    assert found == pytest.approx([whole, room], abs=0.2)


@pytest.mark.parametrize(
    ("outlier", "whole", "room", "modelopt"),
    [(100, 31.5, 31.6, 31.5), (1000, 31.5, 31.5, 31.1), (10000, 31.3, 26.9, 16.1)],
)
def test_room_costs_other_numbers_nothing_until_one_is_a_thousand_times_as_large(
    outlier: float, whole: float, room: float, modelopt: float
) -> None:
    values = normal()
    values[0] = outlier
    found = [rounded_db(values, outlier * scale, slice(1, None)) for scale in (WHOLE, ROOM, MODELOPT_FP8)]
    assert found == pytest.approx([whole, room, modelopt], abs=0.2)
