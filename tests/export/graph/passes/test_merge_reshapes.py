"""Changes of shape in a row."""

from __future__ import annotations

import numpy as np
import pytest
from onnx.helper import make_node

from hidiff_export.graph.passes.merge_reshapes import MergeReshapes
from tests.export.graph.small import apply, graph

SHAPES = {
    "flat": np.array([24], np.int64),
    "same": np.array([2, 3, 4], np.int64),
    "other": np.array([4, 6], np.int64),
    "copied": np.array([0, -1], np.int64),
    "axis": np.array([0], np.int64),
}


def reshapes(*names: str) -> dict[str, int]:
    values = ["x", *(f"r{index}" for index in range(len(names) - 1)), "z"]
    nodes = [make_node("Reshape", [values[i], name], [values[i + 1]]) for i, name in enumerate(names)]
    used = {name: SHAPES[name] for name in names}
    model = graph([*nodes, make_node("Exp", ["z"], ["y"])], {"x": [2, 3, 4]}, constants=used)
    return dict(apply(model, MergeReshapes()))


def test_a_way_back_goes() -> None:
    assert reshapes("flat", "same") == {"Exp": 1}


def test_the_last_one_counts() -> None:
    assert reshapes("flat", "same", "other") == {"Reshape": 1, "Exp": 1}


def test_a_shape_that_copies_from_its_input_stays() -> None:
    assert reshapes("other", "copied") == {"Exp": 1, "Reshape": 2}


def test_squeezing_and_unsqueezing_count_too() -> None:
    nodes = [
        make_node("Unsqueeze", ["x", "axis"], ["u"]),
        make_node("Reshape", ["u", "same"], ["z"]),
        make_node("Exp", ["z"], ["y"]),
    ]
    used = {name: SHAPES[name] for name in ("axis", "same")}
    assert apply(graph(nodes, {"x": [2, 3, 4]}, constants=used), MergeReshapes()) == {"Exp": 1}


def test_a_flattening_counts_too() -> None:
    nodes = [make_node("Flatten", ["x"], ["f"], axis=1), make_node("Reshape", ["f", "other"], ["y"])]
    model = graph(nodes, {"x": [2, 3, 4]}, constants={"other": SHAPES["other"]})
    assert apply(model, MergeReshapes()) == {"Reshape": 1}


def test_a_computed_shape_stays() -> None:
    nodes = [
        make_node("Reshape", ["x", "flat"], ["f"]),
        make_node("Shape", ["z"], ["s"]),
        make_node("Reshape", ["f", "s"], ["y"]),
    ]
    model = graph(nodes, {"x": [2, 3, 4], "z": [4, 6]}, constants={"flat": SHAPES["flat"]})
    (*_, shape, _) = model.graph
    shape.outputs[0].const_value = None
    assert apply(model, MergeReshapes()) == {"Reshape": 2, "Shape": 1}


@pytest.mark.parametrize(("last", "left"), [("same", "Identity"), ("other", "Reshape")])
def test_outputs_keep_their_names(last: str, left: str) -> None:
    nodes = [make_node("Reshape", ["x", "flat"], ["f"]), make_node("Reshape", ["f", last], ["y"])]
    used = {name: SHAPES[name] for name in ("flat", last)}
    model = graph(nodes, {"x": [2, 3, 4]}, ["y", "f"], used)
    apply(model, MergeReshapes())
    assert [value.name for value in model.graph.outputs] == ["y", "f"]
    producer = model.graph.outputs[0].producer()
    assert producer is not None
    assert producer.op_type == left
    assert producer.inputs[0] is model.graph.inputs[0]
