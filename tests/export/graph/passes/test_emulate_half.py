"""Half precision spelled out in float32: what a half-precision engine would make of small graphs, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import common

from hidiff_export.graph.passes.emulate_half import EmulateHalf
from hidiff_export.graph.passes.float32_operations import HALVES
from tests.export.graph.small import evaluate, graph, operators, random_feeds

LARGEST = 65504.0
KINDS = {TensorProto.FLOAT16: np.dtype(np.float16), TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}
HALF = pytest.mark.parametrize("kind", KINDS, ids=["float16", "bfloat16"])


def half_graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, list[int]],
    constants: dict[str, np.ndarray] | None = None,
    kind: int = TensorProto.FLOAT16,
) -> ir.Model:
    """A graph of half precision between float32 inputs and its output ``y``: the nodes read ``NAME`` and give ``z``."""
    narrow = [helper.make_node("Cast", [f"{name}32"], [name], to=kind) for name in inputs]
    wide = helper.make_node("Cast", ["z"], ["y"], to=TensorProto.FLOAT)
    given = {f"{name}32": shape for name, shape in inputs.items()}
    stored = {name: array.astype(KINDS[kind]) for name, array in (constants or {}).items()}
    return graph([*narrow, *nodes, wide], given, constants=stored)


def emulated(model: ir.Model) -> ir.Model:
    """The graph in float32, checked; nothing else of it has changed."""
    EmulateHalf()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def value_of(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    (y,) = evaluate(model, {f"{name}32": np.asarray(array, np.float32) for name, array in feeds.items()})
    return y


def test_what_exceeds_float16_is_an_infinity_and_then_no_number() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "large"], ["huge"]),
        helper.make_node("Mul", ["huge", "small"], ["level"]),
        helper.make_node("Sub", ["level", "level"], ["z"]),
    ]
    constants = {"large": np.array([300.0]), "small": np.array([1 / 300])}

    found = value_of(emulated(half_graph(nodes, {"x": [3]}, constants)), x=np.array([1.0, 218.0, 219.0]))

    np.testing.assert_array_equal(found, [0, 0, np.nan])  # 219 * 300 is above 65504, 218 * 300 is not


@HALF
@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div"])
def test_each_result_is_rounded_as_numpy_rounds_it(op_type: str, kind: int) -> None:
    model = emulated(half_graph([helper.make_node(op_type, ["a", "b"], ["z"])], {"a": [64], "b": [64]}, kind=kind))
    a, b = (feed.astype(KINDS[kind]) for feed in random_feeds(model).values())
    compute = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}[op_type]

    found = value_of(model, a=a, b=b)

    np.testing.assert_array_equal(found, compute(a.astype(np.float32), b.astype(np.float32)).astype(KINDS[kind]))
    exact = compute(a.astype(np.float64), b.astype(np.float64))
    assert not np.array_equal(found, exact.astype(np.float32))


@HALF
def test_two_layers_are_those_of_torch_in_half_precision(kind: int) -> None:
    """A product, a bias and an activation, twice: the same roundings, but for sums in another order."""
    rng = np.random.default_rng(0)
    weights = {"w1": rng.standard_normal((16, 32)), "b1": rng.standard_normal(32), "w2": rng.standard_normal((32, 8))}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["product"]),
        helper.make_node("Add", ["product", "b1"], ["biased"]),
        helper.make_node("Gelu", ["biased"], ["active"]),
        helper.make_node("MatMul", ["active", "w2"], ["z"]),
    ]
    x = rng.standard_normal((64, 16)).astype(np.float32)

    found = value_of(emulated(half_graph(nodes, {"x": [64, 16]}, weights, kind)), x=x)

    dtype = torch.float16 if kind == TensorProto.FLOAT16 else torch.bfloat16
    narrow = {name: torch.from_numpy(array).to(dtype) for name, array in {"x": x, **weights}.items()}
    half, exact = (
        torch.nn.functional.gelu(given["x"] @ given["w1"] + given["b1"]) @ given["w2"]
        for given in (narrow, {name: tensor.double() for name, tensor in narrow.items()})
    )
    noise, apart = (np.square(found - other.double().numpy()).sum() for other in (exact, half))
    own = float(((half.double() - exact) ** 2).sum())
    assert apart < 0.2 * own  # most of the rounding is the same, element by element
    assert 0.8 * own < noise < 1.25 * own


def test_scores_above_the_largest_number_stay_inside_attention() -> None:
    nodes = [helper.make_node("Attention", ["q", "k", "v"], ["z"])]
    q = np.full((1, 1, 2, 16), 150.0) * np.array([[1.0], [-1.0]])
    v = np.arange(32).reshape(1, 1, 2, 16)

    shape = [1, 1, 2, 16]
    found = value_of(emulated(half_graph(nodes, {"q": shape, "k": shape, "v": shape})), q=q, k=q, v=v)

    assert LARGEST < 150.0**2 * 16 / 4
    np.testing.assert_array_equal(found, v)


def test_squares_above_the_largest_number_stay_inside_a_normalization() -> None:
    nodes = [helper.make_node("LayerNormalization", ["x", "one"], ["z"])]
    x = np.array([[-1000.0, 1000.0]])

    found = value_of(emulated(half_graph(nodes, {"x": [1, 2]}, {"one": np.ones(2)})), x=x)

    np.testing.assert_array_equal(found, [[-1, 1]])


def test_what_only_moves_numbers_is_not_rounded_again_and_weights_stay_as_they_are_stored() -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0]),
        helper.make_node("Concat", ["turned", "weight"], ["joined"], axis=0),
        helper.make_node("Add", ["joined", "weight"], ["z"]),
    ]
    model = half_graph(nodes, {"x": [3, 1]}, {"weight": np.ones((1, 3))})

    emulated(model)

    # In: one pair of casts. The weight: one. The sum: one pair. Out: one, which has nothing to do any more.
    assert operators(model) == {"Transpose": 1, "Concat": 1, "Add": 1, "Cast": 6}
    assert model.graph.initializers["weight"].dtype == ir.DataType.FLOAT16


def test_an_attribute_that_names_or_holds_half_precision_is_float32() -> None:
    value = numpy_helper.from_array(np.array([2], np.float16))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["few"], output_dtype=TensorProto.INT8),
        helper.make_node("DequantizeLinear", ["few", "scale"], ["many"], output_dtype=TensorProto.FLOAT16),
        helper.make_node("ConstantOfShape", ["shape"], ["twos"], value=value),
        helper.make_node("Mul", ["many", "twos"], ["z"]),
    ]
    model = half_graph(nodes, {"x": [3]}, {"scale": np.array(0.1)})
    shape = ir.tensor(np.array([3], np.int64), name="shape")
    known = next(node for node in model.graph if node.op_type == "ConstantOfShape").inputs[0]
    assert known is not None
    known.const_value, known.type, known.shape = shape, ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    model.graph.register_initializer(known)
    common.ShapeInferencePass()(model)

    found = value_of(emulated(model), x=np.array([0.14, 0.16, 100.0]))

    scale = np.float32(np.float16(0.1))
    np.testing.assert_array_equal(found, 2 * (np.array([1, 2, 127], np.float32) * scale).astype(np.float16))


def test_a_float32_graph_is_left() -> None:
    model = graph([helper.make_node("Add", ["x", "x"], ["y"])], {"x": [3]})

    emulated(model)

    assert operators(model) == {"Add": 1}


def test_no_node_but_a_cast_is_of_half_precision_afterwards() -> None:
    nodes = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["z"])]
    model = emulated(half_graph(nodes, {"x": [3]}))

    others = [node for node in model.graph if node.op_type != "Cast"]
    assert len(others) == 2
    assert not any(value.dtype in HALVES for node in others for value in (*node.inputs, *node.outputs) if value)


@pytest.mark.parametrize("damage", ["input", "type", "subgraph"])
def test_a_graph_that_is_not_as_it_has_to_be_is_refused(damage: str) -> None:
    model = half_graph([helper.make_node("Sigmoid", ["x"], ["z"])], {"x": [3]})
    sigmoid = next(node for node in model.graph if node.op_type == "Sigmoid")
    if damage == "input":
        model.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    elif damage == "type":
        sigmoid.outputs[0].type = None
    else:
        sigmoid.attributes["body"] = ir.AttrGraph("body", ir.Graph([], [], nodes=[]))
    message = {"input": "expected float32", "type": "is not known", "subgraph": "holds a graph"}[damage]

    with pytest.raises(ir.passes.PreconditionError, match=message):
        EmulateHalf()(model)
