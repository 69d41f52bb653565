"""The toy's few lines of numpy as ONNX graphs over its weight store: a bundle with real engines."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import toy
from onnx import TensorProto, helper, numpy_helper

from hidiff_export.families.family import Family, default_scheduler
from hidiff_export.graph.step_graph import write_step_graph
from hidiff_export.scheduler_tables.scheduler_probe import probe
from hidiff_runtime.backends.openvino.compile_record import CompileRecord
from hidiff_runtime.format.manifest import GraphRecord, Manifest, PhaseRecord, TensorSpec
from hidiff_runtime.format.safetensors import SafetensorsFile
from hidiff_runtime.format.step_graph import step_inputs, step_outputs

FLOAT32 = "time/Mul"
"""Name of the node of a phase that OpenVINO computes in float32 apart from the rest."""

STATES = 4
"""As many as any of diffusers' samplers needs."""

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
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"node_{len(self.nodes)}", **attributes))
        return output

    def first(self, value: str, channels: int) -> str:
        """The first of a tensor's channels."""
        return self.op("Slice", value, *(self.constant(np.int64([at])) for at in (0, channels, 1)))

    def mean(self, value: str, shape: list[int]) -> str:
        flat = self.op("Reshape", value, self.constant(np.int64(shape)))
        mean = self.op("ReduceMean", flat, self.constant(np.int64([1])))
        return self.op("Reshape", mean, self.constant(np.int64([-1, 1, 1, 1])))

    def model(self, record: GraphRecord, initializers: Sequence[TensorProto]) -> onnx.ModelProto:
        """The graph of a record."""
        values = [
            [helper.make_tensor_value_info(spec.name, TYPES[spec.dtype], spec.shape) for spec in specs]
            for specs in (record.inputs, record.outputs)
        ]
        made = helper.make_graph(self.nodes, "toy", *values, [*initializers, *self.constants])
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    def rolled(self, latents: str, shift: str, axis: int, size: int) -> str:
        indices = self.op("Sub", self.constant(np.arange(size, dtype=np.int32)), shift)
        return self.op("Gather", latents, self.op("Mod", indices, self.constant(np.int32(size))), axis=axis)


def as_onnx(record: PhaseRecord, weights: Path) -> onnx.ModelProto:
    """`toy.unet` in the phase of ``record``."""
    graph, batch = Graph(), record.inputs[0].shape[0]
    sample = graph.first("latents", 4)
    mixed = graph.op("MatMul", graph.op("Transpose", "latents", perm=[0, 2, 3, 1]), graph.op("Transpose", "mix"))
    gain = np.float32(toy.GAINS[record.phase.kind])
    noise = graph.op("Mul", graph.op("Transpose", mixed, perm=[0, 3, 1, 2]), graph.constant(gain))
    for index in range(len(toy.BLOCKS)):
        block = graph.constant(np.int32(index))
        rolled = graph.rolled(sample, graph.op("Gather", "window_shifts", block), 2, toy.HEIGHT)
        rolled = graph.rolled(rolled, graph.constant(np.int32(index + 1)), 3, toy.WIDTH)
        noise = graph.op("Add", noise, graph.op("Mul", graph.op("Gather", "blocks", block), rolled))
    graph.nodes.append(helper.make_node("Mul", ["timestep", graph.constant(np.float32(1e-4))], ["time"], name=FLOAT32))
    noise = graph.op("Add", noise, "time")
    for name in ("prompt_embeds", "text_embeds", "time_ids"):
        if record.input(name) is not None:
            told = graph.mean(graph.op("Tanh", name), [batch, -1])
            gain = graph.op("Add", graph.constant(np.float32(1)), graph.first("latents", 1))
            noise = graph.op("Add", noise, graph.op("Mul", told, gain))
    for spec in record.residuals:
        noise = graph.op("Add", noise, graph.mean(spec.name, [1, -1]))
    if record.phase.shallow:
        share, deep = (graph.constant(np.float32(part)) for part in (0.7, 0.3))
        features = graph.op("Mul", graph.first("deep_features", 1), deep)
        noise = graph.op("Add", graph.op("Mul", noise, share), features)
    graph.nodes.append(helper.make_node("Identity", [noise], ["noise_pred"]))
    if len(record.outputs) > 1:
        twice = graph.op("Mul", noise, graph.constant(np.float32(2)))
        graph.nodes.append(helper.make_node("Concat", [twice, twice], ["deep_features"], axis=1))
    return graph.model(record, [stored(weights, "mix"), stored(weights, "blocks")])


def controlnet(record: GraphRecord) -> onnx.ModelProto:
    """Residuals that depend on every input: the mean of all of them, times the scale."""
    graph = Graph()
    told = [graph.mean(graph.op("Tanh", spec.name), [1, -1]) for spec in record.inputs if spec.name != "timestep"]
    total = graph.op("Sum", *told, graph.op("Mul", "timestep", graph.constant(np.float32(1e-3))))
    total = graph.op("Mul", total, "conditioning_scale")
    for spec in record.outputs:
        graph.nodes.append(helper.make_node("Expand", [total, graph.constant(np.int64(spec.shape))], [spec.name]))
    return graph.model(record, [])


def make(
    folder: Path,
    kind: toy.Toy,
    *,
    control: bool = False,
    samplers: Sequence[str] = (),
    precision: str = "",
) -> Path:
    """The toy with ONNX Runtime's engines, or OpenVINO's.

    Args:
        folder: to make.
        kind: of the toy.
        control: whether it has a ControlNet of its own; for a kind with residuals.
        samplers: of diffusers, whose tables it gets beside its own.
        precision: of OpenVINO's engines; empty for ONNX Runtime's.
    """
    manifest = Manifest.read(toy.make(folder, kind))
    for name in samplers:
        probe(name, default_scheduler(Family.SDXL)[1], manifest.steps[3:]).write(
            folder / f"samplers/{name}.safetensors"
        )
    records = []
    for record in manifest.phases:
        graph = f"unet/{record.phase.name}.onnxruntime.onnx"
        onnx.save(as_onnx(record, folder / manifest.weights["unet"]), folder / graph)
        engines = _engines(folder / graph, precision, (FLOAT32,))
        records.append(dataclasses.replace(record, engines=engines))
    manifest = dataclasses.replace(
        manifest,
        phases=tuple(records),
        step=_step(folder, kind, records, precision),
        unguided_step=None if kind.guided is None else _step(folder, kind, records, precision, unguided=True),
        samplers={**manifest.samplers, **{name: f"samplers/{name}.safetensors" for name in samplers}},
        steps=manifest.steps[3:] if samplers else manifest.steps,
    )
    toy.seal(folder, _with_controlnet(folder, manifest) if control else manifest)
    return folder


def _step(
    folder: Path, kind: toy.Toy, records: Sequence[PhaseRecord], precision: str, *, unguided: bool = False
) -> GraphRecord:
    pred = next(record.outputs[0] for record in records if record.phase.unguided == unguided)
    due = (kind.batch, pred, records[0].inputs[0], STATES)
    name = "unguided_step" if unguided else "step"
    graph = f"step/{name}.onnxruntime.onnx"
    engines = _engines(folder / graph, "float32" if precision else "")
    outputs = step_outputs(*due, unguided=kind.guided is not None)
    step = GraphRecord(f"step/{name}.graph", engines, step_inputs(*due), outputs)
    write_step_graph(step, folder / graph)
    return step


def _engines(graph: Path, precision: str, float32: tuple[str, ...] = ()) -> dict[str, str]:
    """The engine of a graph, which is two folders deep: the graph itself, or OpenVINO's record of it."""
    if not precision:
        return {"onnxruntime": f"{graph.parent.name}/{graph.name}"}
    engine = graph.with_suffix(".openvino.json")
    engine.parent.mkdir(exist_ok=True)
    CompileRecord(graph.name, precision, float32).write(engine)
    return {"openvino": f"{engine.parent.name}/{engine.name}"}


def _with_controlnet(folder: Path, manifest: Manifest) -> Manifest:
    (folder / "controlnet").mkdir()
    shutil.copy(folder / "unet/weights.safetensors", folder / "controlnet/weights.safetensors")
    weights = {**manifest.weights, "controlnet": "controlnet/weights.safetensors"}
    full = [record for record in manifest.phases if record.phase.control and not record.phase.shallow]
    beside = {record.phase.unguided: record for record in full}
    found = {each: _controlnet(folder, record) for each, record in beside.items()}
    return dataclasses.replace(manifest, controlnet=found[False], unguided_controlnet=found.get(True), weights=weights)


def _controlnet(folder: Path, phase: PhaseRecord) -> GraphRecord:
    shared = tuple(spec for spec in phase.inputs if spec not in phase.residuals and spec.name != "window_shifts")
    picture = TensorSpec("control_image", (phase.inputs[0].shape[0], 3, toy.HEIGHT * 4, toy.WIDTH * 4), "float32")
    scale = TensorSpec("conditioning_scale", (1,), "float32")
    path = f"controlnet/controlnet{'-unguided' * phase.phase.unguided}.onnx"
    engines = _engines(folder / path, "float32" if "openvino" in phase.engines else "")
    record = GraphRecord(path, engines, (*shared, picture, scale), phase.residuals)
    onnx.save(controlnet(record), folder / record.graph)
    return record
