"""The runtime on real ONNX Runtime engines: the toy's few lines of numpy as ONNX graphs over its weight store."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import toy
from onnx import TensorProto, helper, numpy_helper

from hidiff_runtime import BundleError, EngineError, InputError, check
from hidiff_runtime import open as open_bundle
from hidiff_runtime.manifest import Manifest, PhaseRecord
from hidiff_runtime.safetensors import SafetensorsFile

TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}


def stored(weights: Path, name: str) -> TensorProto:
    """An initializer that points into the weight store."""
    with SafetensorsFile.open(weights) as file:
        info = file.info(name)
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=info.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", weights.name), ("offset", info.offset), ("length", info.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


class Graph:
    """Nodes and constants as they are added; every method returns the name of what it computes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), f"constant_{len(self.constants)}"))
        return self.constants[-1].name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def mean(self, value: str, shape: list[int]) -> str:
        flat = self.op("Reshape", value, self.constant(np.int64(shape)))
        mean = self.op("ReduceMean", flat, self.constant(np.int64([1])))
        return self.op("Reshape", mean, self.constant(np.int64([-1, 1, 1, 1])))

    def rolled(self, latents: str, shift: str, axis: int, size: int) -> str:
        indices = self.op("Sub", self.constant(np.arange(size, dtype=np.int32)), shift)
        return self.op("Gather", latents, self.op("Mod", indices, self.constant(np.int32(size))), axis=axis)


def as_onnx(record: PhaseRecord, weights: Path) -> onnx.ModelProto:
    """`toy.unet` in the phase of ``record``."""
    graph, batch = Graph(), record.inputs[0].shape[0]
    mixed = graph.op("MatMul", graph.op("Transpose", "latents", perm=[0, 2, 3, 1]), graph.op("Transpose", "mix"))
    gain = np.float32(toy.GAINS[record.phase.kind])
    noise = graph.op("Mul", graph.op("Transpose", mixed, perm=[0, 3, 1, 2]), graph.constant(gain))
    for index in range(len(toy.BLOCKS)):
        block = graph.constant(np.int32(index))
        rolled = graph.rolled("latents", graph.op("Gather", "window_shifts", block), 2, toy.HEIGHT)
        rolled = graph.rolled(rolled, graph.constant(np.int32(index + 1)), 3, toy.WIDTH)
        noise = graph.op("Add", noise, graph.op("Mul", graph.op("Gather", "blocks", block), rolled))
    noise = graph.op("Add", noise, graph.op("Mul", "timestep", graph.constant(np.float32(1e-4))))
    prompt = graph.mean(graph.op("Tanh", "prompt_embeds"), [batch, -1])
    graph.nodes.append(helper.make_node("Add", [noise, prompt], ["noise_pred"]))
    values = [
        [helper.make_tensor_value_info(spec.name, TYPES[spec.dtype], spec.shape) for spec in specs]
        for specs in (record.inputs, record.outputs)
    ]
    initializers = [stored(weights, "mix"), stored(weights, "blocks"), *graph.constants]
    made = helper.make_graph(graph.nodes, record.phase.name, *values, initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with an ONNX Runtime engine in each phase, and numpy's reference samples."""
    folder = toy.make(tmp_path_factory.mktemp("ort") / "bundle")
    manifest = Manifest.read(folder)
    records = []
    for record in manifest.phases:
        engine = f"unet/{record.phase.name}.onnxruntime.onnx"
        onnx.save(as_onnx(record, folder / manifest.weights["unet"]), folder / engine)
        records.append(dataclasses.replace(record, engines={"onnxruntime": engine}))
    toy.seal(folder, dataclasses.replace(manifest, phases=tuple(records)))
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


@pytest.mark.parametrize("resident", ["current", "all"])
@pytest.mark.parametrize("weights", ["packed", "shared"])
def test_engines_give_the_reference(pristine: Path, resident: str, weights: str) -> None:
    report = check(pristine, resident=resident, weights=weights)
    assert report.backend == "onnxruntime"
    assert report.ok, report.render()


def test_a_run_is_the_one_written_out_by_hand(pristine: Path) -> None:
    kind = toy.Toy()
    expected = toy.reference_run(kind, Manifest.read(pristine), toy.stored_weights(kind))
    with open_bundle(pristine, verify="size", preload=True) as bundle:
        latents = bundle.denoiser().denoise(
            **expected["inputs"], steps=8, sampler="noisy", seed=expected["seed"], guidance_scale=4.0
        )
    np.testing.assert_allclose(latents, expected["latents"], rtol=1e-5, atol=1e-5)


def test_an_engine_of_the_wrong_phase_fails(folder: Path) -> None:
    shutil.copy(folder / "unet/windowed.onnxruntime.onnx", folder / "unet/strided.onnxruntime.onnx")
    toy.seal(folder)
    report = check(folder, runs=False)
    assert [verdict.phase for verdict in report.verdicts if not verdict.ok] == ["strided"]


def test_one_perturbed_weight_fails(folder: Path) -> None:
    path = folder / "unet/weights.safetensors"
    with SafetensorsFile.open(path) as file:
        offset = file.info("mix").offset
    content = bytearray(path.read_bytes())
    content[offset + 2] ^= 0x20  # a high bit of the first weight's mantissa
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"weights\.safetensors has changed"):
        check(folder)
    toy.seal(folder)
    assert not any(verdict.ok for verdict in check(folder, runs=False).verdicts)


def test_an_engine_that_does_not_load_is_an_error(folder: Path) -> None:
    (folder / "unet/windowed.onnxruntime.onnx").write_bytes(b"no graph")
    toy.seal(folder)
    with pytest.raises(EngineError, match="cannot load"):
        check(folder)


def test_an_option_that_the_backend_lacks_is_refused(pristine: Path) -> None:
    with pytest.raises(InputError, match="no such option"):
        open_bundle(pristine, colour="blue")
