"""Group normalization as layer normalization, and what that does for accuracy."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.helper import make_node

from hidiff_export.graph.passes.group_norm_to_layer_norm import LARGEST_GROUP, GroupNormToLayerNorm
from hidiff_runtime.verification.comparison import Metrics
from tests.export.graph.small import apply, evaluate, graph, random_feeds

CHANNELS, GROUPS = 8, 4


def normalized(size: int = 5) -> ir.Model:
    random = np.random.default_rng(1)
    constants = {name: random.standard_normal(CHANNELS).astype(np.float32) for name in ("w", "b")}
    node = make_node("GroupNormalization", ["x", "w", "b"], ["y"], num_groups=GROUPS, epsilon=1e-3)
    return graph([node], {"x": [2, CHANNELS, size, size]}, constants=constants)


def by_torch(model: ir.Model, offset: float = 0.0) -> np.ndarray:
    weight, bias = (torch.tensor(model.graph.initializers[name].const_value.numpy()).double() for name in ("w", "b"))
    tensor = torch.from_numpy(random_feeds(model)["x"] + np.float32(offset)).double()
    return torch.nn.functional.group_norm(tensor, GROUPS, weight, bias, 1e-3).numpy()


def test_it_is_pytorch_group_norm() -> None:
    found = apply(normalized(), GroupNormToLayerNorm(), before=lambda model: [by_torch(model)])
    assert found["GroupNormalization"] == 0
    assert found["LayerNormalization"] == 1


def test_it_is_exact_where_the_mean_is_large() -> None:
    model, offset = normalized(64), 20.0
    due = by_torch(model, offset)
    feeds = {"x": random_feeds(model)["x"] + np.float32(offset)}
    (before,) = evaluate(model, feeds)
    GroupNormToLayerNorm()(model)
    (after,) = evaluate(model, feeds)
    assert np.abs(after - due).max() < 1e-4
    assert np.abs(before - due).max() > 3 * np.abs(after - due).max()


def test_an_unknown_shape_is_a_reason() -> None:
    model, lower = normalized(), GroupNormToLayerNorm()
    model.graph.inputs[0].shape = None
    assert not lower(model).modified
    assert list(lower.declined.values()) == ["the input's shape or type is not known"]


@pytest.mark.parametrize(
    ("groups", "shape"),
    [(1, [2, 8, 5, 5]), (8, [2, 8, 5]), (2, [1, 8, 2, 3, 4])],
    ids=["one group", "a group for each channel", "three dimensions"],
)
def test_other_groups_and_ranks(groups: int, shape: list[int]) -> None:
    random = np.random.default_rng(2)
    constants = {name: random.standard_normal(8).astype(np.float32) for name in ("w", "b")}
    node = make_node("GroupNormalization", ["x", "w", "b"], ["y"], num_groups=groups)
    found = apply(graph([node], {"x": shape}, constants=constants), GroupNormToLayerNorm())
    assert found["LayerNormalization"] == 1
    assert found["GroupNormalization"] == 0


@pytest.mark.parametrize(
    ("groups", "shape"),
    [(2, [2, 8, 6, 5]), (1, [1, 8, 6, 5]), (8, [2, 8, 30])],
    ids=["groups of channels", "one group", "a group for each channel"],
)
def test_large_groups_in_pieces(groups: int, shape: list[int]) -> None:
    random = np.random.default_rng(3)
    constants = {name: random.standard_normal(8).astype(np.float32) for name in ("w", "b")}
    node = make_node("GroupNormalization", ["x", "w", "b"], ["y"], num_groups=groups, epsilon=0.1)
    model = graph([node], {"x": shape}, constants=constants)
    found = apply(model, GroupNormToLayerNorm(largest_group=28))  # 30 places in 5 pieces of 6
    assert found["LayerNormalization"] == 1
    assert found["Sqrt"] == 1
    (normal,) = (node for node in model.graph if node.op_type == "LayerNormalization")
    assert normal.outputs[0].shape.numpy() == (shape[0], 40, 6)


def test_pieces_that_are_constant_and_far_apart() -> None:
    constants = {name: np.ones(2, np.float32) for name in ("w", "b")}
    node = make_node("GroupNormalization", ["x", "w", "b"], ["y"], num_groups=1, epsilon=1e-6)
    model = graph([node], {"x": [1, 2, 64]}, constants=constants)
    feeds = {"x": np.repeat(np.float32([-300, 7, 7, 500]), 32).reshape(1, 2, 64)}
    (due,) = evaluate(model, feeds)
    GroupNormToLayerNorm(largest_group=64)(model)
    np.testing.assert_allclose(evaluate(model, feeds)[0], due, rtol=1e-5)


def test_a_vae_s_groups_are_summed_up_exactly_enough() -> None:
    constants = {name: np.ones(2, np.float32) for name in ("w", "b")}
    node = make_node("GroupNormalization", ["x", "w", "b"], ["y"], num_groups=1, epsilon=1e-6)
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 2, 1 << 20)).astype(np.float32)}
    exact = feeds["x"].astype(np.float64)
    exact = (exact - exact.mean()) / exact.std() + 1
    ratios = []
    for largest in (1 << 21, LARGEST_GROUP):
        model = graph([node], {"x": [1, 2, 1 << 20]}, constants=constants)
        GroupNormToLayerNorm(largest)(model)
        ratios.append(Metrics.of(exact, evaluate(model, feeds)[0]).snr_db)
    whole, in_pieces = ratios
    assert in_pieces > 120 > 100 > whole


def test_outputs_keep_their_names() -> None:
    constants = {name: np.ones(CHANNELS, np.float32) for name in ("w", "b")}
    nodes = [
        make_node("GroupNormalization", ["x", "w", "b"], ["n"], num_groups=GROUPS),
        make_node("GroupNormalization", ["n", "w", "b"], ["y"], num_groups=2),
    ]
    model = graph(nodes, {"x": [2, CHANNELS, 5]}, ["y", "n"], constants)
    assert apply(model, GroupNormToLayerNorm())["LayerNormalization"] == 2
    assert [value.name for value in model.graph.outputs] == ["y", "n"]
