"""Convolutions of an enlarged tensor become smaller ones before it, with the same result."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.helper import make_node

from hidiff_export.graph.passes.subpixel_convolution import SubpixelConvolution
from tests.export.graph.small import apply, evaluate, graph, operators, random_feeds

RANDOM = np.random.default_rng(0)
INPUTS, OUTPUTS, HEIGHT, WIDTH = 3, 5, 4, 7
KERNEL = RANDOM.standard_normal((OUTPUTS, INPUTS, 3, 3)).astype(np.float32)
BIAS = RANDOM.standard_normal(OUTPUTS).astype(np.float32)
NEAREST = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
PADDED = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}


def enlarged(
    down: int = 2, across: int = 2, resize: dict[str, str] | None = None, biased: bool = True, **conv: object
) -> ir.Model:
    """A convolution of what a ``Resize`` repeated."""
    nodes = [
        make_node("Resize", ["x", "", "", "sizes"], ["large"], **{**NEAREST, **(resize or {})}),
        make_node("Conv", ["large", "w", *["b"] * biased], ["y"], **{**PADDED, **conv}),
    ]
    sizes = np.int64([2, INPUTS, HEIGHT * down, WIDTH * across])
    constants = {"w": KERNEL[:, : INPUTS // conv.get("group", 1)], "sizes": sizes, **({"b": BIAS} if biased else {})}
    return graph(nodes, {"x": [2, INPUTS, HEIGHT, WIDTH]}, constants=constants)


@pytest.mark.parametrize(("factor", "kernels", "products"), [(2, 4, 16), (3, 9, 25), (4, 9, 25), (5, 9, 25)])
@pytest.mark.parametrize("biased", [True, False])
def test_the_result_is_the_same_with_fewer_products(factor: int, kernels: int, products: int, biased: bool) -> None:
    model, lowering = enlarged(factor, factor, biased=biased), SubpixelConvolution()
    assert apply(model, lowering) == {"Conv": kernels, "Concat": 1, "DepthToSpace": 1}
    assert not lowering.declined
    (found,) = lowering.kernels.values()
    taps = sum(value.shape[2] * value.shape[3] for value in found)
    assert (taps, [*lowering.kernels]) == (products, [factor])
    assert products < 9 * factor**2


def test_the_positions_of_an_element_are_not_interchangeable() -> None:
    """The control: with two kernels changed for each other it shows."""
    model, lowering = enlarged(), SubpixelConvolution()
    feeds = random_feeds(model)
    (due,) = evaluate(model, feeds)
    lowering(model)
    first, second = (lowering.kernels[2][index] for index in (1, 2))
    first.const_value, second.const_value = (
        ir.tensor(other.const_value.numpy().transpose(0, 1, 3, 2) * 0 + 1, name=one.name)
        for one, other in ((first, second), (second, first))
    )
    (found,) = evaluate(model, feeds)
    assert np.abs(found - due).max() > 0.1


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_sums_are_rounded_once(dtype: ir.DataType) -> None:
    model, lowering = enlarged(), SubpixelConvolution()
    for name, array in (("w", KERNEL), ("b", BIAS)):
        model.graph.initializers[name].const_value = ir.tensor(array.astype(dtype.numpy()), dtype, name=name)
    for value in (*model.graph.inputs, *(model.graph.initializers[name] for name in "wb"), *model.graph[0].outputs):
        value.dtype = dtype
    lowering(model)
    exact = KERNEL.astype(dtype.numpy()).astype(np.float32)
    first = lowering.kernels[2][0].const_value.numpy()  # of the position at the upper left
    assert first.dtype == dtype.numpy()
    np.testing.assert_array_equal(first[:, :, 1, 1], exact[:, :, 1:, 1:].sum((2, 3)).astype(dtype.numpy()))
    np.testing.assert_array_equal(first[:, :, 0, 0], exact[:, :, 0, 0].astype(dtype.numpy()))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"down": 2, "across": 3}, "each element repeated"),
        ({"down": 2, "across": 1}, "each element repeated"),
        ({"resize": {"mode": "linear"}}, "each element repeated"),
        ({"resize": {"coordinate_transformation_mode": "half_pixel"}}, "each element repeated"),
        ({"pads": [0, 0, 0, 0]}, "3x3 with one element"),
        ({"strides": [2, 2]}, "3x3 with one element"),
        ({"dilations": [2, 2]}, "3x3 with one element"),
    ],
)
def test_others_stay(changes: dict[str, object], reason: str) -> None:
    model, lowering = enlarged(**changes), SubpixelConvolution()
    assert apply(model, lowering) == {"Resize": 1, "Conv": 1}
    (declined,) = lowering.declined.values()
    assert reason in declined


def test_a_computed_weight_and_a_grouped_convolution_stay() -> None:
    nodes = [
        make_node("Resize", ["x", "", "", "sizes"], ["large"], **NEAREST),
        make_node("Abs", ["w"], ["computed"]),
        make_node("Conv", ["large", "computed"], ["y"], **PADDED),
    ]
    sizes = np.int64([2, INPUTS, HEIGHT * 2, WIDTH * 2])
    model = graph(nodes, {"x": [2, INPUTS, HEIGHT, WIDTH]}, constants={"w": KERNEL, "sizes": sizes})
    lowering = SubpixelConvolution()
    apply(model, lowering)
    assert [*lowering.declined.values()] == ["its weight is computed"]
    grouped = graph(
        [nodes[0], make_node("Conv", ["large", "w"], ["y"], group=3, **PADDED)],
        {"x": [2, INPUTS, HEIGHT, WIDTH]},
        constants={"w": KERNEL[:3, :1], "sizes": sizes},
    )
    assert apply(grouped, lowering) == {"Resize": 1, "Conv": 1}


def test_a_convolution_of_anything_else_is_none_of_its_business() -> None:
    model = graph(
        [make_node("Conv", ["x", "w"], ["y"], **PADDED)],
        {"x": [2, INPUTS, HEIGHT, WIDTH]},
        constants={"w": KERNEL},
    )
    lowering = SubpixelConvolution()
    lowering(model)
    assert operators(model) == {"Conv": 1}
    assert not lowering.declined
