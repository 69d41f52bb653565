"""Names that follow the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx.helper import make_node

from hidiff_export.graph.passes.name_by_module import NameByModule
from tests.export.graph.small import apply, graph

SCOPES = "pkg.torch.onnx.name_scopes"


def named() -> ir.Model:
    nodes = [
        make_node("Split", ["x"], ["y_1", "b"], num_outputs=2),
        make_node("Exp", ["y_1"], ["c"]),
        make_node("Exp", ["b"], ["d"]),
        make_node("Mul", ["c", "z"], ["e"]),
        make_node("Add", ["d", "e"], ["y"]),
    ]
    return graph(nodes, {"x": [4]}, constants={"z": np.array([2.0], np.float32)})


def scoped(model: ir.Model, scopes: list[list[str]]) -> ir.Model:
    for node, scope in zip(model.graph, scopes, strict=True):
        node.metadata_props[SCOPES] = str(scope)
    return model


def test_nodes_and_values_carry_the_module() -> None:
    block = ["", "unet", "unet.a.0"]
    model = scoped(named(), [["", "split"], [*block, "x"], [*block, "y"], ["", "unet", "e"], ["", "t", "f"]])
    apply(model, NameByModule("unet"))
    assert [node.name for node in model.graph] == ["/Split", "a.0/Exp", "a.0/Exp_1", "/Mul", "t/Add"]
    assert [[value.name for value in node.outputs] for node in model.graph] == [
        ["/Split.0", "/Split.1"],
        ["a.0/Exp"],
        ["a.0/Exp_1"],
        ["/Mul"],
        ["y"],
    ]
    assert list(model.graph.initializers) == ["constant_0"]


def test_without_notes_the_module_comes_from_the_name() -> None:
    model = named()
    for index, node in enumerate(model.graph):
        node.name = f"down.0/old{index}"
    apply(model, NameByModule("unet"))
    assert [node.name for node in model.graph][1:3] == ["down.0/Exp", "down.0/Exp_1"]


def test_naming_again_changes_nothing() -> None:
    model = named()
    NameByModule("unet")(model)
    once = ir.to_proto(model).SerializeToString(deterministic=True)
    NameByModule("unet")(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == once


def test_inputs_outputs_and_weights_keep_their_names(tmp_path: Path) -> None:
    """A weight is what lies outside the graph; only what is inside becomes a numbered constant."""
    weight = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    (tmp_path / "weights").write_bytes(weight.tobytes())
    nodes = [make_node("Mul", ["x", "a.weight"], ["m"]), make_node("Add", ["m", "inside"], ["y"])]
    model = graph(nodes, {"x": [4]}, ["y", "m"], {"a.weight": weight, "inside": weight})
    model.graph.initializers["a.weight"].const_value = ir.ExternalTensor(
        "weights", 0, weight.nbytes, ir.DataType.FLOAT, shape=ir.Shape([4]), name="a.weight", base_dir=tmp_path
    )
    NameByModule()(model)
    assert list(model.graph.initializers) == ["a.weight", "constant_0"]
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert [value.name for value in model.graph.outputs] == ["y", "m"]


def test_initializers_that_nothing_reads_go() -> None:
    model = graph([make_node("Exp", ["x"], ["y"])], {"x": [2]}, constants={"unused": np.ones(2, np.float32)})
    apply(model, NameByModule())
    assert not model.graph.initializers


def test_names_do_not_depend_on_older_ones() -> None:
    scopes = [["", "unet", "unet.a", "s"], ["", "e"], ["", "e"], ["", "unet", "m"], ["", "unet", "a"]]
    first, second = scoped(named(), scopes), scoped(named(), scopes)
    for index, node in enumerate(second.graph):
        node.name = f"other{index}"
    second.graph.node(1).outputs[0].name = "/Mul"  # what another value is going to be called
    for model in (first, second):
        apply(model, NameByModule("unet"))
    assert ir.to_proto(first.graph) == ir.to_proto(second.graph)
