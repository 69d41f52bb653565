"""Attention over many keys, a piece of them at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx.helper import make_node

from hidiff_export.graph.passes.split_attention import SplitAttention
from tests.export.graph.small import apply, evaluate, graph, random_feeds

BATCH, HEADS, TOKENS, KEYS, SIZE = 2, 3, 10, 29, 8


def attention(values: int = SIZE, **attributes: Any) -> ir.Model:
    shapes = {"q": [BATCH, HEADS, TOKENS, SIZE], "k": [BATCH, HEADS, KEYS, SIZE], "v": [BATCH, HEADS, KEYS, values]}
    return graph([make_node("Attention", ["q", "k", "v"], ["y"], **attributes)], shapes)


def split(piece: int = 7, probes: int = 4) -> SplitAttention:
    return SplitAttention(most_keys=KEYS - 1, piece=piece, probes=probes)


@pytest.mark.parametrize(("piece", "count"), [(28, 2), (10, 3), (7, 5), (1, 29)])
def test_pieces_give_what_the_whole_gives(piece: int, count: int) -> None:
    model = attention()
    assert apply(model, split(piece))["Attention"] == count
    keys = [node.inputs[1].shape.numpy()[2] for node in model.graph if node.op_type == "Attention"]
    assert max(keys) <= piece + 1
    assert sum(keys) == KEYS + count  # a reference for each piece


def test_scale_and_another_size_of_values() -> None:
    assert apply(attention(scale=0.9), split())["Attention"] == 5
    assert apply(attention(values=5), split())["Attention"] == 5


def test_few_keys_stay_whole() -> None:
    assert apply(attention(), SplitAttention(most_keys=KEYS)) == {"Attention": 1}
    assert apply(attention(), SplitAttention()) == {"Attention": 1}


@pytest.mark.parametrize("height", [0.0, 1000.0, -1000.0])
def test_scores_of_any_height_are_weighed(height: float) -> None:
    """A constant that all of a query's scores have in common changes nothing, however far exponentials are exceeded."""
    model = attention(scale=1.0)
    feeds = random_feeds(model)
    feeds["q"][..., 0], feeds["k"][..., 0] = 1.0, 0.0
    due = evaluate(model, feeds)[0]
    feeds["k"][..., 0] = height
    split()(model)
    np.testing.assert_allclose(evaluate(model, feeds)[0], due, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("key", range(KEYS))
def test_a_key_far_above_all_others_takes_all(key: int) -> None:
    """Probed or not: a key that scores 200 above the rest is all that the query finds."""
    model = attention(scale=1.0)
    feeds = random_feeds(model)
    feeds["q"][..., 0] = 1.0
    feeds["k"][..., key, 0] = 200.0
    split()(model)
    due = np.broadcast_to(feeds["v"][..., key : key + 1, :], (BATCH, HEADS, TOKENS, SIZE))
    np.testing.assert_allclose(evaluate(model, feeds)[0], due, rtol=1e-5, atol=1e-6)


def test_keys_far_above_the_probes_are_weighed() -> None:
    """Two keys of two pieces, neither probed, score 100 and 99 above all others, and share what the query finds."""
    model = attention(scale=1.0)
    feeds = random_feeds(model)
    feeds["q"][:] = 0.0
    feeds["q"][..., 0] = 1.0
    for key, height in ((1, 100.0), (15, 99.0)):
        feeds["k"][..., key, 0] = height
    split()(model)
    share = 1 / (1 + np.exp(-1.0))
    due = share * feeds["v"][..., 1:2, :] + (1 - share) * feeds["v"][..., 15:16, :]
    np.testing.assert_allclose(evaluate(model, feeds)[0], np.broadcast_to(due, (BATCH, HEADS, TOKENS, SIZE)), rtol=1e-3)


def test_every_probe_counts_where_scores_differ_by_hundreds() -> None:
    """With all keys probed no share is too small, and the split is exact at scores of hundreds."""
    model = attention(scale=40.0)
    feeds = random_feeds(model)
    due = evaluate(model, feeds)[0]
    split(probes=KEYS)(model)
    np.testing.assert_allclose(evaluate(model, feeds)[0], due, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [ir.DataType.BFLOAT16, ir.DataType.FLOAT16], ids=str)
def test_halves_stay_what_they_are(dtype: ir.DataType) -> None:
    model = attention()
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.type = ir.TensorType(dtype)
    split()(model)
    assert model.graph.outputs[0].dtype is dtype
    bounds = [node.inputs[1] for node in model.graph if node.op_type == "Max"]
    assert len(bounds) == 5
    assert all(bound.const_value.numpy() > 0 for bound in bounds)  # float16 would have none so small


def test_what_is_more_than_attention_is_a_reason() -> None:
    for attributes, reason in (
        ({"softcap": 2.0}, "it is capped, grouped or has its heads in the last axis"),
        ({"is_causal": 1}, "it is causal, or queries and keys have different numbers of heads"),
    ):
        model, lower = attention(**attributes), split()
        assert apply(model, lower) == {"Attention": 1}
        assert list(lower.declined.values()) == [reason]
