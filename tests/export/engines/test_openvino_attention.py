"""Attention over many keys as OpenVINO computes it: in pieces where that is faster, and close to float64."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from hidiff_export.compiler.stages.engines import builders_for
from hidiff_export.engines.openvino import OpenVinoBuilder, lowered_path
from hidiff_export.engines.protocol import PortableGraph
from hidiff_export.recipe import Recipe
from hidiff_runtime.backends.openvino.inference_device import OpenVinoBackend
from hidiff_runtime.format.manifest import GraphRecord, TensorSpec

HEADS, SIZE, QUERIES, KEYS = 2, 40, 48, 5000
SHAPES = {"q": (1, HEADS, QUERIES, SIZE), "k": (1, HEADS, KEYS, SIZE), "v": (1, HEADS, KEYS, SIZE)}


def lowered(folder: Path, dtype: int, **options: bool) -> tuple[Path, GraphRecord]:
    """The engine of an attention that computes in a type, between casts where that is not float32."""
    casts = [helper.make_node("Cast", [name], [f"{name}_"], name=f"attn/{name}", to=dtype) for name in SHAPES]
    nodes = [
        *casts,
        helper.make_node("Attention", [f"{name}_" for name in SHAPES], ["y_"], name="attn/Attention"),
        helper.make_node("Cast", ["y_"], ["y"], name="attn/y", to=TensorProto.FLOAT),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in SHAPES.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, SHAPES["q"])
    made = helper.make_graph(nodes, "attention", inputs, [output])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    path = folder / "attention.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    specs = tuple(TensorSpec(name, shape, "float32") for name, shape in SHAPES.items())
    record = GraphRecord(path.name, {}, specs, (TensorSpec("y", SHAPES["q"], "float32"),))
    graphs = [PortableGraph(path, record)]
    builder = OpenVinoBuilder(**options)
    builder.build(graphs, lambda *_: None)
    (engine,) = builder.engines(graphs)
    return engine, record


@pytest.mark.parametrize(
    ("dtype", "pieces", "spread", "due"),
    [
        ("BFLOAT16", 3, 1.0, 40),
        ("BFLOAT16", 3, 60.0, 28),  # scores of 200, which bfloat16 rounds to whole ones: in one piece it is no better
        ("FLOAT", 1, 1.0, 90),
        ("FLOAT", 1, 60.0, 90),
    ],
)
def test_attention_is_what_float64_gives(tmp_path: Path, dtype: str, pieces: int, spread: float, due: float) -> None:
    engine, record = lowered(tmp_path, TensorProto.DataType.Value(dtype))
    assert attentions(tmp_path) == pieces
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    feeds["q"] *= spread
    if dtype == "BFLOAT16":  # what its casts leave of them
        feeds = {name: (array.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, array in feeds.items()}
    with OpenVinoBackend().device({}) as device, device.open(engine, {}, record) as session:
        found = session.run(feeds)["y"].astype(np.float64)
    exact = attention(**feeds)
    assert decibels(found, exact) > due
    assert decibels(attention(**{**feeds, "k": np.roll(feeds["k"], 1, axis=2)}), exact) < 5  # keys of other values


def test_networks_that_score_in_the_thousands_are_left_whole(tmp_path: Path) -> None:
    lowered(tmp_path, TensorProto.BFLOAT16, split_attention=False)
    assert attentions(tmp_path) == 1


@pytest.mark.parametrize(("recipe", "split"), [("sd15-2048", True), ("sdxl-2048", True), ("sd21-2048", False)])
def test_recipes_say_which_those_are(recipe: str, split: bool) -> None:
    (builder,) = builders_for(Recipe.load(recipe, ["backend=openvino", "precision=bfloat16", "source=random:0"]))
    assert builder.key()["split_attention"] is split


def attentions(folder: Path) -> int:
    """How many pieces there are."""
    return Counter(node.op_type for node in ir.load(lowered_path(folder / "attention.onnx")).graph)["Attention"]


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = q.astype(np.float64) @ np.swapaxes(k, -1, -2) * SIZE**-0.5
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True) @ v


def decibels(found: np.ndarray, exact: np.ndarray) -> float:
    return float(10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum()))
