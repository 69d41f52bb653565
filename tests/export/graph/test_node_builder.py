"""Nodes and constants: names, contents that are kept once, and the shapes and types that ONNX derives."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.helper import make_node

from hidiff_export.graph.node_builder import NodeBuilder
from hidiff_export.graph.passes.base import MICROSOFT, static_shape
from tests.export.graph.small import evaluate, graph

HALF = ir.DataType.FLOAT16


@pytest.fixture
def model() -> ir.Model:
    return graph([make_node("Exp", ["x"], ["y"], name="exp")], {"x": [2, 6]})


@pytest.fixture
def build(model: ir.Model) -> NodeBuilder:
    return NodeBuilder(model.graph)


def test_equal_contents_are_one_initializer_and_others_have_names_of_their_own(
    model: ir.Model, build: NodeBuilder
) -> None:
    one = build.constant([1])
    assert build.constant(np.array([1])) is one
    others = [
        build.constant([1], np.int32),
        build.constant(1),
        build.constant([2]),
        NodeBuilder(model.graph).constant([1]),
    ]
    names = [value.name for value in (one, *others)]
    assert len(set(names)) == 5
    assert list(model.graph.initializers) == names
    assert build.constant([3], np.float32, "three").name == "three"


def test_nodes_stay_out_of_the_graph_in_the_order_in_which_they_are_made(model: ir.Model, build: NodeBuilder) -> None:
    build.op("Neg", build.reshape(model.graph.inputs[0], (3, 4)))
    assert [node.op_type for node in build.nodes] == ["Reshape", "Neg"]
    assert [node.op_type for node in model.graph] == ["Exp"]


def test_shapes_and_types_are_those_of_onnxs_own_inference(model: ir.Model, build: NodeBuilder) -> None:
    (x,) = model.graph.inputs
    turned = build.op("Transpose", build.reshape(x, (2, -1, 3)), perm=(2, 0, 1))
    first, second = build.multi_op("Split", turned, build.constant([1, 1]), outputs=2, axis=1)
    joined = build.op("Concat", first, second, second, axis=1)
    ones = build.op("ConstantOfShape", build.constant([2]), value=ir.tensor(np.ones(1, np.float32)))
    normal, mean, _ = build.multi_op("LayerNormalization", joined, ones, outputs=3, axis=-1)
    half = build.cast(normal, HALF)
    same = build.op("Equal", mean, mean)
    model.graph.extend(build.nodes)
    model.graph.outputs[0].replace_all_uses_with(half, replace_graph_outputs=True)
    found = {value.name: (static_shape(value), value.dtype) for node in build.nodes for value in node.outputs}
    assert found[half.name] == ((3, 3, 2), HALF)
    assert found[same.name] == ((3, 3, 1), ir.DataType.BOOL)
    inferred = onnx.shape_inference.infer_shapes(_bare(model), strict_mode=True, data_prop=True).graph
    wanted = {info.name: ir.from_proto(info) for info in [*inferred.value_info, *inferred.output]}
    assert found == {name: (static_shape(wanted[name]), wanted[name].dtype) for name in found}
    (computed,) = evaluate(model, {"x": np.arange(12, dtype=np.float32).reshape(2, 6)})
    assert (computed.shape, computed.dtype) == ((3, 3, 2), np.float16)


def _bare(model: ir.Model) -> onnx.ModelProto:
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    return proto


def test_many_pieces_have_the_lengths_that_a_constant_says(build: NodeBuilder) -> None:
    lengths = [1, 2] * 80
    whole = build.constant(np.zeros((2, 240)), np.float32)
    parts = build.multi_op("Split", whole, build.constant(lengths), outputs=len(lengths), axis=1)
    assert [static_shape(part) for part in parts] == [(2, length) for length in lengths]


def test_what_is_not_known_stays_so(build: NodeBuilder) -> None:
    unknown = build.op("Neg", ir.Value(name="unknown"))
    assert (unknown.shape, unknown.type) == (None, None)
    shapeless = build.op("Neg", ir.Value(name="shapeless", type=ir.TensorType(HALF)))
    assert (shapeless.shape, shapeless.dtype) == (None, HALF)


def test_a_node_that_its_inputs_do_not_fit_is_refused(model: ir.Model, build: NodeBuilder) -> None:
    with pytest.raises(onnx.shape_inference.InferenceError):
        build.op("MatMul", model.graph.inputs[0], build.constant(np.ones((5, 2)), np.float32))


def test_a_cast_to_the_same_type_is_none(model: ir.Model, build: NodeBuilder) -> None:
    (x,) = model.graph.inputs
    assert build.cast(x, ir.DataType.FLOAT) is x
    assert build.nodes == ()
    assert build.cast(x, HALF).dtype == HALF


def test_an_operator_of_another_domain_is_given_its_shape_and_type(model: ir.Model, build: NodeBuilder) -> None:
    (x,) = model.graph.inputs
    given = build.op("QuickGelu", x, domain=MICROSOFT, shape=(2, 6), type=x.type, alpha=1.0)
    assert (static_shape(given), given.dtype) == ((2, 6), ir.DataType.FLOAT)
    assert build.op("QuickGelu", x, domain=MICROSOFT).shape is None
    (node, _) = build.nodes
    copied = build.copy(node, given)
    assert copied.producer().domain == MICROSOFT
    assert copied.producer().attributes["alpha"].as_float() == 1.0
