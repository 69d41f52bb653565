"""Phases as branches of one graph: each computes exactly what it did alone, and weights are there once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hidiff_export.errors import ExportError
from hidiff_export.graph.merge import merge, selector_name
from hidiff_export.graph.portable import save
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.format.safetensors import SafetensorsFile, write

PHASES = ("strided", "pooled", "windowed")
WIDTH = 6


def store(folder: Path, name: str = "weights.safetensors", seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    write(folder / name, {f"layer{i}.weight": random.standard_normal((WIDTH, WIDTH), np.float32) for i in range(2)})
    return folder / name


def phase(weights: Path, index: int, *, control: bool = False) -> ir.Model:
    """Two linear layers over weights in a store, with a constant that only this phase has and one that all have."""
    own = numpy_helper.from_array(np.array([0.5 + index], np.float32), "constant_0")
    common = numpy_helper.from_array(np.array([3.0], np.float32), "constant_1")
    nodes = [
        helper.make_node("Mul", ["x", "constant_0"], ["v0"], name="scale"),
        helper.make_node("MatMul", ["v0", "layer0.weight"], ["v1"], name="layer0"),
        helper.make_node("Add", ["v1", "constant_1"], ["v2"], name="shift"),
        helper.make_node("Add", ["v2", "residual"], ["v3"], name="control")
        if control
        else helper.make_node("Identity", ["v2"], ["v3"], name="control"),
        helper.make_node("MatMul", ["v3", "layer1.weight"], ["y"], name="layer1"),
    ]
    names = ["x", "residual"] if control else ["x"]
    graph = helper.make_graph(
        nodes,
        "phase",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, WIDTH]) for name in names],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, WIDTH])],
        [own, common],
    )
    opsets = [helper.make_opsetid("", 23)]
    with SafetensorsFile.open(weights) as file:
        places = {name: file.info(name) for name in file.names()}
    for name, place in places.items():
        tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=place.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": weights.name, "offset": place.offset, "length": place.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
        graph.initializer.append(tensor)
    path = weights.parent / f"{PHASES[index]}.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return ir.load(path)


def run(path: Path, feeds: dict[str, NDArray[np.generic]]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    # Rewriting may differ between a graph and a branch; what is compared is the graph as it stands.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, feeds)[0]
    return found


def feeds(control: bool = False) -> dict[str, NDArray[np.generic]]:
    random = np.random.default_rng(1)
    names = ["x", "residual"] if control else ["x"]
    return {name: random.standard_normal((2, WIDTH)).astype(np.float32) for name in names}


def selected(phases: tuple[str, ...], chosen: str) -> dict[str, NDArray[np.generic]]:
    return {selector_name(name): np.array(name == chosen) for name in phases[1:]}


def merged(folder: Path, phases: tuple[str, ...], **options: bool) -> Path:
    weights = folder / "weights.safetensors"
    model = merge({name: phase(weights, PHASES.index(name), **options) for name in phases})
    save(model, folder / "merged.onnx")
    onnx.checker.check_model(folder / "merged.onnx", full_check=True)
    return folder / "merged.onnx"


@pytest.mark.parametrize("phases", [PHASES[:2], PHASES], ids=["two", "three"])
def test_each_selection_computes_its_phase_and_no_other(phases: tuple[str, ...], tmp_path: Path) -> None:
    store(tmp_path)
    both = merged(tmp_path, phases)
    alone = {name: run(tmp_path / f"{name}.onnx", feeds()) for name in phases}
    for chosen in phases:
        found = run(both, feeds() | selected(phases, chosen))
        assert np.array_equal(found, alone[chosen])
        assert not any(np.array_equal(found, alone[name]) for name in phases if name != chosen)


def test_of_several_selectors_the_last_counts(tmp_path: Path) -> None:
    store(tmp_path)
    path = merged(tmp_path, PHASES)
    both = {selector_name(name): np.array(True) for name in PHASES[1:]}
    assert np.array_equal(run(path, feeds() | both), run(tmp_path / "windowed.onnx", feeds()))


def test_inputs_of_all_phases_are_there_in_order_and_selectors_last(tmp_path: Path) -> None:
    weights = store(tmp_path)
    model = merge({"strided": phase(weights, 0, control=True), "windowed": phase(weights, 2)})
    assert [(value.name, value.dtype, tuple(value.shape)) for value in model.graph.inputs] == [
        ("x", ir.DataType.FLOAT, (2, WIDTH)),
        ("residual", ir.DataType.FLOAT, (2, WIDTH)),
        ("select_windowed", ir.DataType.BOOL, ()),
    ]
    assert [value.name for value in model.graph.outputs] == ["y"]
    save(model, tmp_path / "merged.onnx")
    for name, chosen in (("strided", False), ("windowed", True)):
        alone = run(tmp_path / f"{name}.onnx", feeds(control=name == "strided"))
        found = run(tmp_path / "merged.onnx", feeds(control=True) | {"select_windowed": np.array(chosen)})
        assert np.array_equal(found, alone)


def test_weights_and_equal_constants_are_there_once(tmp_path: Path) -> None:
    store(tmp_path)
    path = merged(tmp_path, PHASES)
    proto = onnx.load(path, load_external_data=False)
    names = sorted(tensor.name for tensor in proto.graph.initializer)
    own = [f"{name}/constant_0" for name in PHASES]
    assert names == sorted(["layer0.weight", "layer1.weight", "strided/constant_1", *own])
    assert not any(attribute.g.initializer for node in proto.graph.node for attribute in node.attribute)


def test_weights_at_other_places_are_refused(tmp_path: Path) -> None:
    one, other = phase(store(tmp_path), 0), phase(store(tmp_path, "other.safetensors", seed=1), 1)
    with pytest.raises(ExportError, match=r"weight layer0\.weight"):
        merge({"strided": one, "pooled": other})


def test_inputs_of_other_shapes_are_refused(tmp_path: Path) -> None:
    weights = store(tmp_path)
    one, other = phase(weights, 0), phase(weights, 1)
    other.graph.inputs[0].shape = ir.Shape((4, WIDTH))
    with pytest.raises(ExportError, match="input x"):
        merge({"strided": one, "pooled": other})


def test_outputs_of_other_types_are_refused(tmp_path: Path) -> None:
    weights = store(tmp_path)
    one, other = phase(weights, 0), phase(weights, 1)
    other.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    with pytest.raises(ExportError, match="outputs of phase pooled"):
        merge({"strided": one, "pooled": other})


@pytest.mark.slow
def test_the_phases_of_a_unet(sd15_bundle: Path, tmp_path: Path) -> None:
    """The portable graphs of a bundle: attention, windows, resizing and all."""
    manifest = Manifest.read(sd15_bundle / "manifest.json")
    records = {record.phase.name: record for record in manifest.phases}
    assert len(records) > 1
    random = np.random.default_rng(0)
    inputs = {
        spec.name: random.integers(0, 4, spec.shape, np.int32)
        if spec.dtype == "int32"
        else random.standard_normal(spec.shape).astype(np.float32)
        for spec in next(iter(records.values())).inputs
    }
    shutil.copy(sd15_bundle / "unet" / "weights.safetensors", tmp_path)
    save(merge({name: ir.load(sd15_bundle / record.graph) for name, record in records.items()}), tmp_path / "all.onnx")
    alone = {name: run(sd15_bundle / record.graph, inputs) for name, record in records.items()}
    for chosen in records:
        found = run(tmp_path / "all.onnx", inputs | selected(tuple(records), chosen))
        assert np.array_equal(found, alone[chosen])
        assert not any(np.allclose(found, alone[name], rtol=1e-3, atol=1e-3) for name in records if name != chosen)
