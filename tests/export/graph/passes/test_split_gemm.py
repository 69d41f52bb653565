"""Gated layers in two products on two pieces of one weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.helper import make_node
from onnx_ir.passes import common

from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.graph.passes.externalize_weights import ExternalizeWeights
from hidiff_export.graph.passes.split_gemm import SplitGemm
from tests.export.graph.small import apply, evaluate, graph, operators, random_feeds

ROWS, IN, OUT = 6, 4, 10
WEIGHTS = {"w": torch.randn(OUT, IN), "b": torch.randn(OUT)}
EXTRA = {"apart": np.array([2, 3, OUT], np.int64), "sizes": np.array([3, 7], np.int64)}


def gated(axis: int = -1, trans: int = 1) -> ir.Model:
    """y0 and y1 are the first three and the other columns of a linear layer."""
    nodes = [
        make_node("Gemm", ["x", "w", "b"], ["g"], transB=trans),
        make_node("Reshape", ["g", "apart"], ["r"]),
        make_node("Split", ["r", "sizes"], ["y0", "y1"], axis=axis),
    ]
    weights = {name: tensor.numpy() for name, tensor in WEIGHTS.items()}
    if not trans:
        weights["w"] = np.ascontiguousarray(weights["w"].T)
    sizes = EXTRA["sizes"] if axis == -1 else np.array([1, 1], np.int64)
    return graph(nodes, {"x": [ROWS, IN]}, ["y0", "y1"], {**weights, **EXTRA, "sizes": sizes})


def test_each_part_has_a_piece_of_the_weight(tmp_path: Path) -> None:
    model = gated()
    feeds = random_feeds(model)
    due = evaluate(model, feeds)
    store = WeightStore.write(WEIGHTS, tmp_path / "weights.safetensors", "float32")
    ExternalizeWeights(store, "")(model)
    SplitGemm()(model)
    common.RemoveUnusedNodesPass()(model)
    assert operators(model) == {"Gemm": 2, "Reshape": 2}
    external = {name: v.const_value for name, v in model.graph.initializers.items() if name[0] in "wb"}
    assert list(external) == ["w[0:3]", "b[0:3]", "w[3:10]", "b[3:10]"]
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in external.values())
    path = tmp_path / "graph.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for found, wanted in zip(session.run(None, feeds), due, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    assert np.abs(due[0] - due[1][..., :3]).max() > 0.1  # the pieces are not interchangeable


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (gated(), "the weight is not external, or not stored by output"),
        (gated(axis=0), "it is not split along the last axis"),
    ],
    ids=["inline", "other axis"],
)
def test_reasons(model: ir.Model, reason: str) -> None:
    split = SplitGemm()
    assert apply(model, split)["Split"] == 1
    assert list(split.declined.values()) == [reason]


def test_a_weight_stored_by_input_stays(tmp_path: Path) -> None:
    model = gated(trans=0)
    transposed = {**WEIGHTS, "w": WEIGHTS["w"].T.contiguous()}
    ExternalizeWeights(WeightStore.write(transposed, tmp_path / "w.safetensors", "float32"), "")(model)
    split = SplitGemm()
    assert not split(model).modified
    assert operators(model)["Split"] == 1


@pytest.mark.parametrize("bias", [True, False])
def test_a_split_right_behind_the_product(tmp_path: Path, bias: bool) -> None:
    """Scales, the product's name as an output and the order of the outputs stay."""
    weights = WEIGHTS if bias else {"w": WEIGHTS["w"]}
    scales = {"alpha": 0.5, "beta": 2.0} if bias else {"alpha": 0.5}
    nodes = [
        make_node("Gemm", ["x", *weights], ["g"], transB=1, **scales),
        make_node("Split", ["g", "sizes"], ["y0", "y1"], axis=1),
    ]
    constants = {**{name: tensor.numpy() for name, tensor in weights.items()}, "sizes": EXTRA["sizes"]}
    model = graph(nodes, {"x": [ROWS, IN]}, ["y1", "g", "y0"], constants)
    feeds = random_feeds(model)
    due = evaluate(model, feeds)
    ExternalizeWeights(WeightStore.write(weights, tmp_path / "w.safetensors", "float32"), "")(model)
    SplitGemm()(model)
    assert operators(model) == {"Gemm": 3, "Reshape": 2}
    path = tmp_path / "graph.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["y1", "g", "y0"]
    for found, wanted in zip(session.run(None, feeds), due, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_split_of_something_else_stays() -> None:
    nodes = [make_node("Exp", ["x"], ["e"]), make_node("Split", ["e", "sizes"], ["y0", "y1"], axis=1)]
    split = SplitGemm()
    model = graph(nodes, {"x": [ROWS, OUT]}, ["y0", "y1"], {"sizes": EXTRA["sizes"]})
    assert apply(model, split) == {"Exp": 1, "Split": 1}
    assert not split.declined


def unsplit(model: ir.Model, weights: dict[str, torch.Tensor], folder: Path) -> str:
    """The reason why the pass leaves the model's only split alone."""
    ExternalizeWeights(WeightStore.write(weights, folder / "w.safetensors", "float32"), "")(model)
    split = SplitGemm()
    assert not split(model).modified
    (reason,) = split.declined.values()
    return reason


def test_columns_that_were_folded_before_the_split_stay(tmp_path: Path) -> None:
    nodes = [
        make_node("Gemm", ["x", "w", "b"], ["g"], transB=1),
        make_node("Reshape", ["g", "apart"], ["r"]),
        make_node("Split", ["r", "sizes"], ["y0", "y1"], axis=-1),
    ]
    constants = {name: tensor.numpy() for name, tensor in WEIGHTS.items()}
    constants |= {"apart": np.array([ROWS, 2, 5], np.int64), "sizes": np.array([2, 3], np.int64)}
    model = graph(nodes, {"x": [ROWS, IN]}, ["y0", "y1"], constants)
    assert unsplit(model, WEIGHTS, tmp_path) == "its columns are not those of the product"


@pytest.mark.parametrize("shape", [(1,), (ROWS, OUT)], ids=["one for all", "one for each row"])
def test_a_bias_that_is_not_one_for_each_output_stays(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weights = {"w": WEIGHTS["w"], "b": torch.randn(shape)}
    nodes = [
        make_node("Gemm", ["x", "w", "b"], ["g"], transB=1),
        make_node("Split", ["g", "sizes"], ["y0", "y1"], axis=-1),
    ]
    constants = {**{name: tensor.numpy() for name, tensor in weights.items()}, "sizes": EXTRA["sizes"]}
    model = graph(nodes, {"x": [ROWS, IN]}, ["y0", "y1"], constants)
    assert unsplit(model, weights, tmp_path) == "the bias is not one for each output"


def test_two_products_on_one_weight_share_its_pieces(tmp_path: Path) -> None:
    nodes = [
        make_node("Gemm", ["x", "w", "b"], ["g"], transB=1),
        make_node("Split", ["g", "sizes"], ["y0", "y1"], axis=-1),
        make_node("Gemm", ["z", "w", "b"], ["h"], transB=1),
        make_node("Split", ["h", "sizes"], ["y2", "y3"], axis=-1),
    ]
    constants = {**{name: tensor.numpy() for name, tensor in WEIGHTS.items()}, "sizes": EXTRA["sizes"]}
    model = graph(nodes, {"x": [ROWS, IN], "z": [ROWS, IN]}, ["y0", "y1", "y2", "y3"], constants)
    feeds = random_feeds(model)
    due = evaluate(model, feeds)
    ExternalizeWeights(WeightStore.write(WEIGHTS, tmp_path / "w.safetensors", "float32"), "")(model)
    SplitGemm()(model)
    common.RemoveUnusedNodesPass()(model)
    assert operators(model) == {"Gemm": 4, "Reshape": 4}
    path = tmp_path / "graph.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for found, wanted in zip(session.run(None, feeds), due, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_integers_are_cut_with_their_scales(tmp_path: Path) -> None:
    """Each part of a dequantized weight has the scales of its own rows, and no new bytes but those."""
    integers = np.random.default_rng(0).integers(-127, 128, (OUT, IN)).astype(np.int8)
    scales = np.linspace(0.01, 0.1, OUT, dtype=np.float32)
    nodes = [
        make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0),
        make_node("Gemm", ["x", "w", "b"], ["g"], transB=1),
        make_node("Split", ["g", "sizes"], ["y0", "y1"], axis=1),
    ]
    constants = {"q": integers, "s": scales, "z": np.zeros(OUT, np.int8), "b": WEIGHTS["b"].numpy()}
    model = graph(nodes, {"x": [ROWS, IN]}, ["y0", "y1"], {**constants, "sizes": EXTRA["sizes"]})
    feeds = random_feeds(model)
    due = evaluate(model, feeds)
    for name, kept in (("q", integers), ("b", constants["b"])):
        (tmp_path / name).write_bytes(kept.tobytes())
        value = model.graph.initializers[name]
        value.const_value = ir.ExternalTensor(
            name, 0, kept.nbytes, value.const_value.dtype, shape=ir.Shape(kept.shape), name=name, base_dir=tmp_path
        )
    lowering = SplitGemm()
    lowering(model)
    common.RemoveUnusedNodesPass()(model)
    assert not lowering.declined
    assert operators(model) == {"DequantizeLinear": 2, "Gemm": 2, "Reshape": 2}
    external = [name for name, v in model.graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)]
    assert sorted(external) == ["b[0:3]", "b[3:10]", "q[0:3]", "q[3:10]"]
    path = tmp_path / "graph.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for found, wanted in zip(session.run(None, feeds), due, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
