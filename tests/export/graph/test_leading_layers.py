"""The first layers of a phase, cut out of its graph, compute what they compute there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from hidiff_export.errors import ExportError
from hidiff_export.graph.leading_layers import OUTPUT, leading_layers_signature, write_leading_layers
from hidiff_export.graph.portable import load_graph, save
from hidiff_runtime.format.manifest import TensorSpec

TRANSFORMER = "down_blocks.0.attentions.0/Add"


@pytest.fixture
def unet(sd15_bundle: Path, tmp_path: Path) -> Path:
    """The folder of a UNet's graphs, of the test's own."""
    return shutil.copytree(sd15_bundle / "unet", tmp_path / "unet")


def run(path: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {one.name: inputs[one.name] for one in session.get_inputs()})


@pytest.mark.parametrize("phase", ["strided", "windowed"])
def test_it_gives_what_the_first_transformer_gives(unet: Path, phase: str) -> None:
    write_leading_layers(unet / f"{phase}.onnx", unet / "timing.onnx")
    inputs, outputs = leading_layers_signature(unet / "timing.onnx")
    random = np.random.default_rng(0)
    given = {
        spec.name: np.int32(random.integers(0, 4, spec.shape))
        if spec.dtype == "int32"
        else np.float32(random.standard_normal(spec.shape))
        for spec in inputs
    }
    whole = load_graph(unet / f"{phase}.onnx")
    names = (TRANSFORMER, "down_blocks.0.resnets.1/Add")
    found = {node.name: node.outputs[0] for node in whole.graph if node.name in names}
    whole.graph.outputs.extend(found[name] for name in names)
    save(whole, unet / "whole.onnx")
    _, expected, other = run(unet / "whole.onnx", given)
    (features,) = run(unet / "timing.onnx", given)
    assert outputs == (TensorSpec(OUTPUT, expected.shape, "float32"),)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(features, other, rtol=1e-2)  # another layer's would be seen


def test_only_what_it_needs_is_kept(unet: Path) -> None:
    write_leading_layers(unet / "windowed.onnx", unet / "timing.onnx")
    cut, whole = ir.load(unet / "timing.onnx").graph, ir.load(unet / "windowed.onnx").graph
    assert {value.name for value in cut.inputs} == {"latents", "timestep", "prompt_embeds", "window_shifts"}
    assert {*cut.initializers} < {*whole.initializers}
    assert not any(name.startswith(("mid_block", "up_blocks", "down_blocks.1")) for name in cut.initializers)
    kinds = {node.op_type for node in cut}
    assert {"Conv", "MatMul", "Attention", "GroupNormalization", "Sin"} <= kinds  # what a phase spends its time on


def test_half_precision_leaves_as_float32(half_bundle: Path, tmp_path: Path) -> None:
    unet = shutil.copytree(half_bundle / "unet", tmp_path / "unet")
    write_leading_layers(unet / "windowed.onnx", unet / "timing.onnx")
    assert [spec.dtype for spec in leading_layers_signature(unet / "timing.onnx")[1]] == ["float32"]
    cast = ir.load(unet / "timing.onnx").graph.outputs[0].producer()
    assert cast is not None
    assert cast.op_type == "Cast"


def test_a_graph_without_a_transformer_is_refused(unet: Path) -> None:
    model = load_graph(unet / "windowed.onnx")
    for node in model.graph:
        node.name = (node.name or "").replace("attentions", "others")
    save(model, unet / "other.onnx")
    with pytest.raises(ExportError, match="no transformer"):
        write_leading_layers(unet / "other.onnx", unet / "timing.onnx")
    assert not (unet / "timing.onnx").exists()
