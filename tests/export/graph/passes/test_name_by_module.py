"""Names that follow the network."""

from __future__ import annotations

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
