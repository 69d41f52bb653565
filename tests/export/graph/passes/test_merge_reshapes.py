"""Changes of shape in a row."""

from __future__ import annotations

import numpy as np
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
