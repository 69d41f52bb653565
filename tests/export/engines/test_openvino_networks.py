"""SDXL's UNet in bfloat16 on OpenVINO: sinusoids of timestep and sizes in float32, beside PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import load, load_stored
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.engines.openvino import OpenVinoBuilder
from hidiff_export.engines.protocol import PortableGraph
from hidiff_export.families.family import Family, Task, Width, unet_config
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.graph.portable import write_graph
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.recipe.field_types import Precision
from hidiff_runtime.backends.openvino.compile_record import CompileRecord
from hidiff_runtime.backends.openvino.inference_device import OpenVinoBackend
from hidiff_runtime.format.manifest import GraphRecord
from hidiff_runtime.phases import Phase, PhaseKind

pytestmark = pytest.mark.slow

SIZE, BATCH = 16, 2
TIMESTEPS = (1.0, 500.0, 999.0)
PIXELS = (8192.0, 4096.0)
"""Large sizes, of which bfloat16 knows every 32nd."""


@dataclass(frozen=True)
class Exported:
    """A phase's graph with its engine, and the module that it is of, in float32 over the stored weights."""

    engine: Path
    record: GraphRecord
    module: PhaseUNet

    def decibels(self, timestep: float, engine: Path | None = None) -> float:
        """How close to PyTorch an engine computes."""
        inputs = self._inputs(timestep)
        with OpenVinoBackend().device({}) as device, device.open(engine or self.engine, {}, self.record) as session:
            found = session.run(inputs)["noise_pred"].astype(np.float64)
        with torch.inference_mode():
            exact = self.module(**{name: torch.from_numpy(array) for name, array in inputs.items()}).double().numpy()
        return float(10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum()))

    def _inputs(self, timestep: float) -> Mapping[str, NDArray[Any]]:
        random = np.random.default_rng(0)
        found: dict[str, NDArray[Any]] = {}
        for spec in self.record.inputs:
            shape = spec.shape
            own = spec.dtype == "int32"
            found[spec.name] = random.integers(0, 4, shape) if own else random.standard_normal(shape)
            found[spec.name] = found[spec.name].astype(spec.dtype)
        found["timestep"] = np.float32([timestep])
        found["time_ids"] = np.float32([[*PIXELS, 0, 0, *PIXELS]] * BATCH)
        return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder, family, task = tmp_path_factory.mktemp("unet"), Family.SDXL, Task.TEXT_TO_IMAGE
    checkpoint = load(Component.UNET, "random:0", family, task, Width.TINY)
    store = WeightStore.write(checkpoint.state_dict, folder / "weights.safetensors", Precision.BFLOAT16)
    (folder / "config.json").write_text(json.dumps(dict(unet_config(family, task, Width.TINY))))
    phase = Phase(PhaseKind.POOLED)
    half = load_stored(Component.UNET, store, torch.bfloat16)
    module = PhaseUNet(half, Layout.of(family), phase, SIZE, SIZE)
    write_graph(module, BATCH, store, folder / "pooled.onnx")
    record = GraphRecord("pooled.onnx", {}, module.input_specs(BATCH), module.output_specs(BATCH))
    graphs = [PortableGraph(folder / "pooled.onnx", record)]
    OpenVinoBuilder().build(graphs, lambda *_: None)
    (engine,) = OpenVinoBuilder().engines(graphs)
    full = PhaseUNet(load_stored(Component.UNET, store), Layout.of(family), phase, SIZE, SIZE)
    return Exported(engine, record, full)


def test_every_sinusoid_is_computed_apart(exported: Exported) -> None:
    kept = CompileRecord.read(exported.engine).float32
    assert set(kept) == {f"{name}/{wave}" for name in ("time_proj", "add_time_proj") for wave in ("Sin", "Cos")}


def test_no_timestep_costs_more_than_another(exported: Exported) -> None:
    found = [exported.decibels(timestep) for timestep in TIMESTEPS]
    assert min(found) > 34
    assert max(found) - min(found) < 4


def test_where_sinusoids_are_rounded_too_it_shows(exported: Exported) -> None:
    """The control: on processors without bfloat16 nothing is rounded."""
    rounded = exported.engine.with_name("rounded.openvino.json")
    replace(CompileRecord.read(exported.engine), float32=()).write(rounded)
    with OpenVinoBackend().device({}) as device:
        able = "BF16" in device._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    lost = exported.decibels(999.0) - exported.decibels(999.0, rounded)
    assert lost > 6 or not able
