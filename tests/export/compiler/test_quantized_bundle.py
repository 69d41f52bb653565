"""int8 and fp8 from recipe to engines, at tiny width: ranges by the real ModelOpt, engines by the real TensorRT-RTX."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import toy
from filelock import FileLock
from numpy.typing import NDArray

from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.compiler.compile import build
from hidiff_export.compiler.stages import graphs
from hidiff_export.compiler.stages.engines import EnginesStage
from hidiff_export.compiler.stages.quantization import QuantizationStage, calibration
from hidiff_export.compiler.stages.stage import StageContext
from hidiff_export.errors import EngineError
from hidiff_export.graph.quantized_tensor import FP8_LARGEST, QuantizedTensor
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.quantization import quantize, worker
from hidiff_export.recipe import Recipe
from hidiff_export.reference.random_inputs import arrays, mixed_shifts, random_inputs
from hidiff_export.reference.tolerances import Boundary, bound_for
from hidiff_export.verification.verify import verify
from hidiff_runtime import BundleError, check
from hidiff_runtime import open as open_bundle
from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord
from hidiff_runtime.format.manifest import Manifest, PhaseRecord
from hidiff_runtime.format.safetensors import SafetensorsFile
from hidiff_runtime.verification.comparison import compare
from hidiff_runtime.verification.reference_samples import INDEX, ReferenceSamples, Stored
from tests.conftest import NoDisplay
from tests.openvino_bundles import with_openvino

HELD_OUT = 77
"""A seed that neither the reference nor the verification draws from."""


def _recipe(precision: str, *changes: str) -> Recipe:
    return Recipe.load(
        "tiny",
        [
            *changes,
            *("width=128", "height=128", "sampler=[euler]", "steps=[3]", f"precision={precision}"),
            *("backend=[onnxruntime, tensorrt-rtx]", "targets=[cpu, sm89]", "text=false", "vae=false"),
        ],
    )


RECIPES = {"int8": _recipe("int8"), "fp8": _recipe("fp8", "hidiffusion.thresholds.strided=1.0")}
"""The fp8 recipe has one phase, for the time: how phases are quantized one after the other, int8 shows."""


def _silent(_done: float, _total: float, _note: str) -> None:
    pass


def _shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all processes of a run of the tests share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def int8(half_bundle: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The bundle of an int8 recipe; its float16 graphs are those of `half_bundle`, which has the same weights."""

    def take(module: PhaseUNet, _batch: int, store: WeightStore, path: Path) -> None:
        assert store.path.read_bytes() == (half_bundle / "unet/weights.safetensors").read_bytes()
        shutil.copy(half_bundle / "unet" / f"{module.phase.name}.onnx", path)

    folder = _shared(tmp_path_factory, worker_id) / "int8-bundle"
    with FileLock(f"{folder}.lock"), pytest.MonkeyPatch.context() as patch:
        if not folder.is_dir():
            patch.setattr(graphs, "write_graph", take)
            build(RECIPES["int8"], folder, NoDisplay())
    return folder


@pytest.fixture(scope="session")
def fp8(int8: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder that the stages of the fp8 recipe leave, from the same float16 graphs and reference.

    The other phase's graph stays the int8 bundle's.
    """
    folder = _shared(tmp_path_factory, worker_id) / "fp8-bundle"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            unfinished = Path(shutil.copytree(int8, folder.with_name("fp8-bundle.partial"), dirs_exist_ok=True))
            context = StageContext(RECIPES["fp8"], unfinished)
            for stage in (QuantizationStage(), EnginesStage(QuantizationStage.name)):
                stage.run(context, _silent)
            unfinished.rename(folder)
    return folder


@pytest.fixture(params=["int8", "fp8"])
def built(request: pytest.FixtureRequest) -> tuple[Recipe, Path]:
    """Each precision's recipe and folder."""
    return RECIPES[request.param], request.getfixturevalue(request.param)


def _phases(recipe: Recipe, folder: Path) -> dict[str, PhaseRecord]:
    """The records of the recipe's phases."""
    own = recipe.phase_rule().phases()
    return {record.phase.name: record for record in Manifest.read(folder).phases if record.phase in own}


def _evaluate(graph: Path, record: PhaseRecord) -> NDArray[np.float32]:
    """``noise_pred`` of a graph for inputs of the held-out seed."""
    inputs = dict(arrays(random_inputs(record.inputs, timestep=700, width=128, height=128, seed=HELD_OUT)))
    shape = next(spec.shape for spec in record.inputs if spec.name == "window_shifts")
    output: NDArray[np.float32] = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"]).run(
        None, {**inputs, "window_shifts": mixed_shifts(shape, HELD_OUT)}
    )[0]
    return output


@pytest.mark.slow
def test_verify_reports_quantized_graphs_beside_float16(int8: Path) -> None:
    checks = [check.verdict for check in verify(int8).checks]
    assert all(verdict.ok for verdict in checks)
    for phase in ("strided", "windowed"):
        few, half = (
            next(v for v in checks if v.boundary == boundary.value and v.phase == phase)
            for boundary in (Boundary.GRAPH, Boundary.FLOAT16_GRAPH)
        )
        assert few.metrics is not None
        assert half.metrics is not None
        assert few.metrics.snr_db + 15 < half.metrics.snr_db
        assert few.bound.snr_db < half.bound.snr_db


@pytest.mark.slow
def test_new_inputs_are_within_bounds_and_another_phase_is_not(built: tuple[Recipe, Path]) -> None:
    recipe, folder = built
    bound = bound_for(Boundary.GRAPH, recipe)
    for name, record in _phases(recipe, folder).items():
        half = _evaluate(folder / "unet" / f"{name}.float16.onnx", record)
        for other in ("strided", "windowed"):
            few = _evaluate(folder / "unet" / f"{other}.onnx", record)
            assert compare("held out", half, few, bound).ok is (other == name), (name, other)


@pytest.mark.slow
def test_ranges_a_quarter_as_wide_are_found_out(built: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, folder = built
    shutil.copytree(folder / "unet", tmp_path / "unet")
    graph = tmp_path / "unet" / "strided.onnx"
    model = onnx.load(graph, load_external_data=False)
    scales = {node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            values = onnx.numpy_helper.to_array(tensor) / np.float16(64 if recipe.precision.value == "fp8" else 4)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, graph)
    record = _phases(recipe, folder)["strided"]
    half = _evaluate(folder / "unet" / "strided.float16.onnx", record)
    assert not compare("narrow", half, _evaluate(graph, record), bound_for(Boundary.GRAPH, recipe)).ok


@pytest.mark.slow
def test_weights_stay_in_the_store_and_layers_have_their_type(built: tuple[Recipe, Path]) -> None:
    recipe, folder = built
    for name in _phases(recipe, folder):
        model = ir.load(folder / "unet" / f"{name}.onnx")
        quantizing = [node for node in model.graph if node.op_type == "QuantizeLinear"]
        assert {node.outputs[0].dtype for node in quantizing} == {quantize.KINDS[recipe.precision]}
        assert {node.attributes["precision"].as_int() for node in quantizing} == {ir.DataType.FLOAT}
        half = ir.load(folder / "unet" / f"{name}.float16.onnx")
        stored, before = (
            {k for k, v in m.graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)}
            for m in (model, half)
        )
        assert stored == before
        names = set(quantize.quantized_layers(model.graph))
        layers = [node for node in model.graph if node.name in names]
        assert len(layers) > 100
        for layer in layers:
            assert [v.producer().op_type for v in layer.inputs[:2]] == ["DequantizeLinear"] * 2  # type: ignore[union-attr]


@pytest.mark.slow
def test_fp8_weights_use_the_whole_range(fp8: Path) -> None:
    model = ir.load(fp8 / "unet" / "strided.onnx")
    values = model.graph.initializers
    seen = 0
    for place in worker.places(ir.to_proto(model)):
        if place.axis is not None:
            weight = np.abs(values[place.tensor].const_value.numpy().astype(np.float64))  # type: ignore[union-attr]
            largest = weight.max(axis=tuple(axis for axis in range(weight.ndim) if axis != place.axis))
            np.testing.assert_allclose(place.scale, largest / FP8_LARGEST, rtol=2e-2)
            seen += 1
    assert seen > 100


@pytest.mark.slow
def test_every_phase_has_an_engine_of_each_backend(built: tuple[Recipe, Path]) -> None:
    recipe, folder = built
    for record in _phases(recipe, folder).values():
        assert set(record.engines) == {"onnxruntime", "tensorrt-rtx"}
        path = folder / record.engines["tensorrt-rtx"]
        plan = PlanRecord.read(path)
        assert plan.phase == record.phase.name
        assert all(part.stat().st_size for part in plan.paths(path))
        layers = json.loads(path.with_suffix(".layers.json").read_text())["layers"]
        kinds = {output["dtype"] for layer in layers for output in layer["outputs"]}
        assert kinds & {"int8", "fp8"} == {recipe.precision.value}


@pytest.mark.slow
def test_ranges_are_measured_in_the_run_on_both_sides_of_the_change(int8: Path) -> None:
    samples = ReferenceSamples.read(int8 / "reference" / INDEX)
    phases = {record.phase.name: record.phase for record in Manifest.read(int8).phases}
    shape = (len(samples.calls[0].window_shifts),)
    given = {name: calibration(samples, phase, shape) for name, phase in phases.items()}
    found = {name: [float(inputs["timestep"][0]) for inputs in of_phase] for name, of_phase in given.items()}
    (run,) = samples.runs
    assert [len(times) for times in found.values()] == [1, run.steps - 1]
    assert found["strided"][-1] > found["windowed"][0]
    random = tuple(call for call in samples.calls if not isinstance(call.inputs["latents"], Stored))
    without_run = replace(samples, calls=random)
    assert len(calibration(without_run, phases["strided"], shape)) == 1


def test_without_modelopt_a_build_ends_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "modelopt" else object())
    with pytest.raises(EngineError, match="which is not installed") as caught:
        build(_recipe("int8"), tmp_path / "bundle", NoDisplay())
    assert "hidiff-export[quantization]" in caught.value.advice
    assert not list(tmp_path.iterdir())


def test_what_modelopt_says_when_it_fails_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no such operator')")
    monkeypatch.setattr(quantize, "WORKER", [str(broken)])
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([1]))
    node = ir.node("Relu", [x], name="a/Relu")
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 23})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "g.float16.onnx")
    precision = _recipe("int8").precision
    with pytest.raises(EngineError, match="ModelOpt cannot quantize g") as caught:
        quantize.quantize_graph(tmp_path / "g.float16.onnx", [{}], precision, tmp_path / "g.onnx")
    assert "no such operator" in str(caught.value.given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.py", "g.float16.onnx"]


def test_a_layer_that_modelopt_passes_over_is_a_fault() -> None:
    found = [
        QuantizedTensor("x", (1.0,), None, (("a/Conv", 0), ("b/Conv", 0))),
        QuantizedTensor("w", (1.0,), 0, (("a/Conv", 1),)),
    ]
    quantize._check_complete(found, ["a/Conv"], Path("g.onnx"))
    with pytest.raises(EngineError, match=r"left 1 of 2 layers of g\.onnx as they were") as caught:
        quantize._check_complete(found, ["a/Conv", "b/Conv"], Path("g.onnx"))
    assert caught.value.given == "b/Conv"


def test_a_zero_point_other_than_zero_is_refused() -> None:
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="d"),
    ]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    scale = onnx.numpy_helper.from_array(np.float32(0.5), "s")
    for zero in (0, 3):
        offset = onnx.numpy_helper.from_array(np.int8(zero), "z")
        model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", values[:1], values[1:], [scale, offset]))
        if zero:
            with pytest.raises(ValueError, match="not symmetric"):
                worker.places(model)
        else:
            (place,) = worker.places(model)
            assert (place.tensor, place.scale, place.axis, place.uses) == ("x", (0.5,), None, ())


def test_openvino_reads_integers_from_one_store_and_computes_with_them(int8: Path, tmp_path: Path) -> None:
    folder = with_openvino(int8, tmp_path / "b")
    store = _phases_integers(folder)
    whole = sum(SafetensorsFile.open(folder / "unet/weights.safetensors").info(name).nbytes for name in _weights(store))
    assert sum(SafetensorsFile.open(store).info(name).nbytes for name in _weights(store)) * 2 == whole
    report = check(folder, backend="openvino")
    assert report.ok, report.render()
    with open_bundle(folder, backend="openvino") as bundle:
        for record in bundle.manifest.phases:
            graph = onnx.load(folder / record.engines["openvino"].replace(".json", ".onnx"), load_external_data=False)
            read = {node.input[0] for node in graph.graph.node if node.op_type == "QuantizeLinear"}
            assert not read & {tensor.name for tensor in graph.graph.initializer}
            session = bundle.engine(record.phase)
            kinds = Counter(
                (info["layerType"].value, info["runtimePrecision"].value)
                for node in session._parts[-1].request.get_compiled_model().get_runtime_model().get_ordered_ops()
                for info in (node.get_rt_info(),)
            )
            layers = sum(kinds[kind, few] for kind in ("Convolution", "FullyConnected") for few in ("i8", "u8"))
            halves = sum(".ff.net.0.proj" in name for name in _weights(store))  # each a product for the gate besides
            assert layers == len(_weights(store)) + halves


def _phases_integers(folder: Path) -> Path:
    """The store that the phases share; that of the timing graph is smaller."""
    first, *others = sorted(folder.glob("unet/weights.int8-*.safetensors"), key=lambda path: -path.stat().st_size)
    assert len(others) == (Manifest.read(folder).timing is not None)
    return first


def _weights(store: Path) -> list[str]:
    return list(SafetensorsFile.open(store))


def test_a_store_of_other_integers_is_found(int8: Path, tmp_path: Path) -> None:
    folder = with_openvino(int8, tmp_path / "b")
    store = _phases_integers(folder)
    content = bytearray(store.read_bytes())
    content[-20000:] = content[-20001:-1]
    store.write_bytes(content)
    with pytest.raises(BundleError, match=r"weights\.int8-.* has changed"):
        check(folder, backend="openvino")
    toy.seal(folder)
    assert not check(folder, backend="openvino", runs=False).ok
