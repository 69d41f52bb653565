"""Text encoders lowered for TensorRT: the causal mask, float32 where the table wants it, and an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build, load
from hidiff_export.checkpoints.weight_store import PRECISIONS, WeightStore
from hidiff_export.engines.protocol import PortableGraph
from hidiff_export.engines.tensorrt.builder import TensorRtBuilder
from hidiff_export.engines.tensorrt.libraries import TENSORRT_RTX
from hidiff_export.engines.tensorrt.lowering import lower
from hidiff_export.families.family import Family, Task, Width
from hidiff_export.graph.passes.decompose_attention import MASKED
from hidiff_export.graph.passes.float32_operations import computes_in_float32
from hidiff_export.graph.portable import save, write_graph
from hidiff_export.modules.text_encoder import TextEncoderModule
from hidiff_export.recipe.field_types import Precision
from hidiff_runtime.format.manifest import GraphRecord

CASES = {
    "sd15 float32": (Family.SD15, Component.TEXT_ENCODER, Precision.FLOAT32),
    "sdxl's second float16": (Family.SDXL, Component.TEXT_ENCODER_2, Precision.FLOAT16),
}


class Encoder:
    """A fabricated text encoder, its portable graph and what TensorRT is given."""

    def __init__(self, folder: Path, family: Family, component: Component, precision: Precision) -> None:
        config, tensors, _ = load(component, "random:0", family, Task.TEXT_TO_IMAGE, Width.TINY)
        store = WeightStore.write(tensors, folder / "weights.safetensors", precision)
        model = build(component, config, store.state_dict(), PRECISIONS[precision][1])
        self.precision = precision
        self.module = TextEncoderModule(model, penultimate=family.is_sdxl)
        self.portable, self.lowered = folder / "text_encoder.onnx", folder / "lowered.onnx"
        write_graph(self.module, 1, store, self.portable)
        graph = ir.load(self.portable)
        lower(graph)
        save(graph, self.lowered)

    @property
    def operators(self) -> list[ir.Node]:
        return list(ir.load(self.lowered).graph)


@pytest.fixture(scope="module", params=list(CASES.values()), ids=list(CASES))
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder(tmp_path_factory.mktemp("encoder"), *request.param)


def run(path: Path, inputs: dict[str, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    found: list[Any] = onnxruntime.InferenceSession(str(path), options).run(None, inputs)
    return found


def given() -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(0, 512, (1, 77), np.int32)
    ids[0, 40:] = 513
    return {"input_ids": ids, "clip_skip": np.array([1], np.int32)}


def test_attention_is_written_out_with_its_mask_in_float32(encoder: Encoder) -> None:
    kinds = [node.op_type for node in encoder.operators]
    assert "Attention" not in kinds
    softmaxes = [node for node in encoder.operators if node.op_type == "Softmax"]
    assert len(softmaxes) == encoder.module.text_encoder.config.num_hidden_layers
    for node in softmaxes:
        assert computes_in_float32(node)
        masked = node.inputs[0].producer() if node.inputs[0] is not None else None
        assert masked is not None
        assert masked.op_type == "Add"
        mask = masked.inputs[1].const_value.numpy()  # type: ignore[union-attr]
        assert np.array_equal(mask, np.triu(np.full((77, 77), MASKED, np.float32), 1))


def test_it_computes_what_pytorch_does(encoder: Encoder) -> None:
    inputs = given()
    with torch.no_grad():
        wanted = [t.numpy() for t in encoder.module.float()(**{n: torch.from_numpy(a) for n, a in inputs.items()})]
    for found, due in zip(run(encoder.lowered, inputs), wanted, strict=True):
        error = 20 * np.log10(np.linalg.norm(due) / np.linalg.norm(found - due))
        assert error > (100 if encoder.precision is Precision.FLOAT32 else 45)


def test_without_the_mask_it_would_not(encoder: Encoder, tmp_path: Path) -> None:
    model = onnx.load(encoder.lowered, load_external_data=True)
    for constant in model.graph.initializer:
        if list(constant.dims) == [77, 77]:
            constant.raw_data = np.zeros((77, 77), np.float32).tobytes()
    onnx.save(model, tmp_path / "unmasked.onnx")
    one, other = run(encoder.lowered, given())[0], run(tmp_path / "unmasked.onnx", given())[0]
    assert np.linalg.norm(one - other) > 0.1 * np.linalg.norm(one)


def test_tensorrt_rtx_builds_it(encoder: Encoder) -> None:
    record = GraphRecord(encoder.portable.name, {}, encoder.module.input_specs(1), encoder.module.output_specs(1))
    builder = TensorRtBuilder(TENSORRT_RTX, ("sm89",))
    (engine, *_) = builder.build([PortableGraph(encoder.portable, record)], lambda *_: None)
    assert engine.is_file()
    assert encoder.portable.with_name("text_encoder.tensorrt-rtx.plan").stat().st_size > 10_000
