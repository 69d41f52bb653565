"""Weights as places in the store, byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.helper import make_node

from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.graph.passes.externalize_weights import LARGEST_INLINE, ExternalizeWeights
from tests.export.graph.small import evaluate, graph, random_feeds

WEIGHTS = {"a.weight": torch.randn(5, 7), "a.bias": torch.randn(7)}


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore.write(WEIGHTS, tmp_path / "weights.safetensors", "float32")


def linear(weights: Mapping[str, torch.Tensor], **more: np.ndarray) -> ir.Model:
    nodes = [
        make_node("MatMul", ["x", "unet.a.weight"], ["m"]),
        make_node("Add", ["m", "unet.a.bias"], ["z"]),
        make_node("Sum", ["z", *more], ["y"]),
    ]
    constants = {f"unet.{name}": tensor.numpy() for name, tensor in weights.items()}
    return graph(nodes, {"x": [2, 5]}, constants={**constants, **more})


def test_weights_lie_in_the_store(store: WeightStore, tmp_path: Path) -> None:
    model = linear(WEIGHTS)
    ExternalizeWeights(store, "unet.")(model)
    path = tmp_path / "graph.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    loaded = onnx.load(path)
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in loaded.graph.initializer}
    assert found.keys() == WEIGHTS.keys()
    for name, array in found.items():
        assert array.tobytes() == WEIGHTS[name].numpy().tobytes()
    assert path.stat().st_size < 1000


def test_one_bit_of_difference_is_refused(store: WeightStore) -> None:
    changed = WEIGHTS["a.bias"].clone()
    changed.view(torch.int32)[3] ^= 1
    with pytest.raises(ir.passes.PassError, match=r"a\.bias is not what the weight store holds"):
        ExternalizeWeights(store, "unet.")(linear({**WEIGHTS, "a.bias": changed}))


def test_another_type_is_refused(tmp_path: Path) -> None:
    half = WeightStore.write(WEIGHTS, tmp_path / "half.safetensors", "float16")
    with pytest.raises(ir.passes.PassError, match="is not what the weight store holds"):
        ExternalizeWeights(half, "unet.")(linear(WEIGHTS))


def test_a_large_constant_is_taken_for_a_computed_weight(store: WeightStore) -> None:
    small = np.zeros((LARGEST_INLINE // 4 // 7, 1, 7), np.float32)
    ExternalizeWeights(store, "unet.")(linear(WEIGHTS, small=small))
    large = np.zeros((LARGEST_INLINE // 4 // 7 + 1, 1, 7), np.float32)
    with pytest.raises(ir.passes.PostconditionError, match="bytes that are not in the store"):
        ExternalizeWeights(store, "unet.")(linear(WEIGHTS, large=large))


def test_the_graph_on_disk_computes_the_same(store: WeightStore, tmp_path: Path) -> None:
    inline = {"extra": np.array([0.5], np.float32)}
    model = linear(WEIGHTS, **inline)
    feeds = random_feeds(model)
    (due,) = evaluate(model, feeds)
    ExternalizeWeights(store, "unet.")(model)
    assert [value.name for value in model.graph.outputs] == ["y"]
    external = {name for name, v in model.graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)}
    assert external == WEIGHTS.keys()
    path = tmp_path / "graph.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["y"], feeds)
    np.testing.assert_allclose(found, due, rtol=1e-5, atol=1e-5)


def test_what_the_store_does_not_hold_stays_inside(store: WeightStore) -> None:
    extra = np.array([0.5], np.float32)
    model = linear(WEIGHTS, extra=extra)
    ExternalizeWeights(store, "unet.")(model)
    kept = model.graph.initializers["extra"].const_value
    assert kept is not None
    assert not isinstance(kept, ir.ExternalTensor)
    assert kept.numpy() == extra


def test_a_difference_far_inside_is_refused(tmp_path: Path) -> None:
    """Weights are compared in pieces, to the last one."""
    weight = torch.zeros(1100, 1000)
    large = WeightStore.write({"w": weight}, tmp_path / "large.safetensors", "float32")
    weight[-1, -1] = 1
    nodes = [make_node("MatMul", ["x", "w"], ["y"])]
    with pytest.raises(ir.passes.PassError, match="the weight w is not what the weight store holds"):
        ExternalizeWeights(large, "")(graph(nodes, {"x": [1, 1100]}, constants={"w": weight.numpy()}))


def test_a_large_weight_that_is_the_stores_is_taken(tmp_path: Path) -> None:
    """Every piece differs from every other, so that comparing one with another's place would be seen."""
    weight = torch.arange(1100 * 1000, dtype=torch.float32).view(1100, 1000)
    large = WeightStore.write({"w": weight}, tmp_path / "large.safetensors", "float32")
    model = graph([make_node("MatMul", ["x", "w"], ["y"])], {"x": [1, 1100]}, constants={"w": weight.numpy()})
    ExternalizeWeights(large, "")(model)
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
