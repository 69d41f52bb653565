"""Nearest-neighbour resizing beside PyTorch's."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.helper import make_node

from hidiff_export.graph.passes.nearest_to_gather import NearestToGather, nearest_indices
from tests.export.graph.small import apply, evaluate, graph, operators, random_feeds

TORCH = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}


def resize(before: tuple[int, int], after: tuple[int, int], **attributes: str) -> ir.Model:
    nodes = [make_node("Resize", ["x", "", "", "s"], ["y"], **{**TORCH, **attributes})]
    return graph(nodes, {"x": [2, 3, *before]}, constants={"s": np.array([2, 3, *after], np.int64)})


def by_torch(model: ir.Model, size: tuple[int, int]) -> list[np.ndarray]:
    (tensor,) = random_feeds(model).values()
    return [torch.nn.functional.interpolate(torch.from_numpy(tensor), size=size).numpy()]


@pytest.mark.parametrize(("before", "after"), [((50, 5), (198, 9)), ((4, 58), (16, 230)), ((9, 8), (3, 4))])
def test_pytorch_rows_are_picked(before: tuple[int, int], after: tuple[int, int]) -> None:
    model = resize(before, after)
    assert apply(model, NearestToGather(), before=lambda model: by_torch(model, after)) == {"Gather": 2}


def test_onnx_alone_picks_another_row() -> None:
    model = resize((50, 5), (198, 10))
    (found,), (due,) = evaluate(model, random_feeds(model)), by_torch(model, (198, 10))
    assert np.any(found != due)


def test_every_size_has_pytorch_indices() -> None:
    for old in range(1, 70):
        for new in {2 * old - 1, 4 * old - 3, 4 * old - 2, 4 * old - 1, max(1, old // 3)}:
            source = torch.arange(old, dtype=torch.float32).view(1, 1, 1, old)
            due = torch.nn.functional.interpolate(source, size=(1, new)).flatten()
            np.testing.assert_array_equal(nearest_indices(old, new), due.numpy())


def test_whole_ratios_stay() -> None:
    assert apply(resize((4, 6), (8, 24)), NearestToGather()) == {"Resize": 1}


def test_another_mode_stays() -> None:
    assert apply(resize((4, 6), (7, 9), mode="cubic"), NearestToGather()) == {"Resize": 1}


def test_another_rounding_is_a_reason() -> None:
    model, gather = resize((4, 6), (7, 9), nearest_mode="ceil"), NearestToGather()
    assert not gather(model).modified
    assert list(gather.declined.values()) == ["it does not round down as PyTorch does"]
    assert operators(model) == {"Resize": 1}


def test_the_defaults_of_onnx_are_a_reason() -> None:
    model = resize((4, 6), (7, 9))
    node = next(node for node in model.graph if node.op_type == "Resize")
    node.attributes.clear()
    gather = NearestToGather()
    assert not gather(model).modified
    assert list(gather.declined.values()) == ["it does not round down as PyTorch does"]


def test_an_unknown_shape_is_a_reason() -> None:
    model, gather = resize((4, 6), (7, 9)), NearestToGather()
    model.graph.inputs[0].shape = None
    assert not gather(model).modified
    assert list(gather.declined.values()) == ["a shape is not known"]


def test_outputs_keep_their_names() -> None:
    nodes = [
        make_node("Resize", ["x", "", "", "s"], ["r"], **TORCH),
        make_node("Neg", ["r"], ["y"]),
    ]
    model = graph(nodes, {"x": [1, 2, 4, 6]}, ["y", "r"], {"s": np.array([1, 2, 7, 9], np.int64)})
    assert apply(model, NearestToGather()) == {"Gather": 2, "Neg": 1}
    assert [value.name for value in model.graph.outputs] == ["y", "r"]
