"""A tiny VAE as TensorRT-RTX builds it: in float32, its attention written out."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir
import pytest

from hidiff_export.engines.protocol import PortableGraph
from hidiff_export.engines.tensorrt.builder import TensorRtBuilder
from hidiff_export.engines.tensorrt.libraries import TENSORRT_RTX
from hidiff_export.engines.tensorrt.lowering import lower
from hidiff_export.graph.passes.decompose_attention import HEAD_SIZES
from hidiff_export.graph.portable import save
from hidiff_runtime.verification.comparison import Metrics
from tests.vaes import CONFIG, TILES, WEIGHTS, Opened, record

HALVES = ("decoder", "encoder")


@pytest.fixture(scope="module")
def folder(vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the portable graphs and the weights alone."""
    made = tmp_path_factory.mktemp("vae")
    for name in (WEIGHTS, *(f"{half}.onnx" for half in HALVES)):
        shutil.copy(vae_folder / name, made / name)
    return made


@pytest.mark.parametrize("half", HALVES)
def test_its_attention_is_written_out_in_float32(folder: Path, half: str) -> None:
    model = ir.load(folder / f"{half}.onnx")
    (attention,) = (node for node in model.graph if node.op_type == "Attention")
    assert tuple(attention.inputs[0].shape) == (
        1,
        1,
        TILES.height * TILES.width // 64,
        CONFIG["block_out_channels"][-1],
    )
    lower(model)
    operators = [node.op_type for node in model.graph]
    assert "Attention" not in operators
    assert operators.count("Softmax") == 1
    assert {value.dtype for node in model.graph for value in node.outputs} <= {ir.DataType.FLOAT, ir.DataType.INT64}


def test_a_published_vae_s_head_has_no_kernel_in_any_precision() -> None:
    assert 512 not in HEAD_SIZES


@pytest.mark.parametrize("half", HALVES)
def test_what_is_built_computes_what_onnx_runtimes_engine_does(folder: Path, vae_folder: Path, half: str) -> None:
    import numpy as np
    import onnxruntime

    model = ir.load(folder / f"{half}.onnx")
    lower(model)
    save(model, folder / f"{half}.lowered.onnx")
    graph = getattr(record(), half)
    given = {graph.inputs[0].name: np.random.default_rng(0).standard_normal(graph.inputs[0].shape).astype(np.float32)}
    session = onnxruntime.InferenceSession(folder / f"{half}.lowered.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, given)
    with Opened(vae_folder).network(f"vae_{half}") as engine:
        (due,) = engine.run(given).values()
    assert Metrics.of(due, found).snr_db > 100
    (moved,) = session.run(None, {name: array + np.float32(0.01) for name, array in given.items()})
    assert Metrics.of(due, moved).snr_db < 80


@pytest.mark.needs("tensorrt-rtx")
def test_it_becomes_engines(folder: Path) -> None:
    graphs = [PortableGraph(folder / f"{half}.onnx", getattr(record(), half)) for half in HALVES]
    written = TensorRtBuilder(TENSORRT_RTX, ("sm89",)).build(graphs, lambda _done, _total, _note: None)
    assert {path.name for path in written} >= {
        f"{half}.tensorrt-rtx.{end}" for half in HALVES for end in ("json", "plan")
    }
