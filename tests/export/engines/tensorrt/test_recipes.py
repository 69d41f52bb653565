"""Every UNet and every kind of phase at tiny width becomes real TensorRT-RTX engines, without a GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hidiff_export.compiler.graph_specs import graph_records
from hidiff_export.compiler.stages.engines import EnginesStage
from hidiff_export.compiler.stages.graphs import GraphsStage
from hidiff_export.compiler.stages.scheduler_tables import SchedulerTablesStage
from hidiff_export.compiler.stages.stage import StageContext
from hidiff_export.compiler.stages.weights import WeightsStage
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.recipe import Recipe, shipped_recipes
from hidiff_runtime.backends.tensorrt.mapped_parts import map_parts
from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord
from hidiff_runtime.format.manifest import GraphRecord, Manifest, PhaseRecord

pytestmark = [pytest.mark.needs("tensorrt-rtx"), pytest.mark.slow]

ALL_STEPS: Any = 1.0


@dataclass(frozen=True)
class Case:
    """A tiny recipe, and the phases that its thresholds make."""

    family: str
    phases: tuple[str, ...]
    thresholds: dict[str, Any]
    task: str = "text-to-image"

    def __str__(self) -> str:
        return f"{self.family}-{self.task}"

    @property
    def recipe(self) -> Recipe:
        """Thresholds are chosen so that no more phases than those named come up."""
        control = {"controlnet": "random:1"} if self.task == "controlnet" else {}
        return Recipe.from_dict(
            {
                "family": self.family,
                "source": "random:0",
                "unet_width": "tiny",
                "text": False,
                "vae": False,
                "task": self.task,
                "width": 128,
                "height": 128,
                "precision": "float16",
                "hidiffusion": {"thresholds": self.thresholds},
                "backend": "tensorrt-rtx",
                "steps": [1],
                **control,
            }
        )


CASES = (
    Case(
        "sdxl",
        ("strided-control", "pooled-control"),
        {"strided": 0.2, "pooled": {"start": 0.2, "end": ALL_STEPS}, "control": ALL_STEPS},
        "controlnet",
    ),
)

# Built where they are exported for other tests, so as not to export them twice.
ELSEWHERE = {
    "tests/parity/test_graphs.py": [
        ("sd21", "strided-control", "controlnet"),
        ("sd15", "strided_pooled", "text-to-image"),
        ("sdxl", "strided_pooled", "text-to-image"),
    ],
    "tests/export/engines/tensorrt/test_lowered_networks.py": [("sdxl", "windowed", "inpainting")],
}
BUNDLE = ("sd15", ("strided-control", "windowed-control"))
"""The family and the phases of `tensorrt_bundle`."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_graph_becomes_an_engine(case: Case, tmp_path: Path) -> None:
    context = StageContext(case.recipe, tmp_path)
    assert tuple(phase.name for phase in context.phases) == case.phases
    for stage in (WeightsStage(), SchedulerTablesStage(), GraphsStage()):
        stage.run(context, lambda _done, _total, _note: None)
    written = EnginesStage().run(context, lambda _done, _total, _note: None)
    assert not list(tmp_path.rglob("*.tmp"))
    assert_engines(tmp_path, graph_records(context), written)


def test_so_does_every_graph_of_a_whole_bundle(tensorrt_bundle: Path) -> None:
    manifest = Manifest.read(tensorrt_bundle)
    assert (manifest.family, tuple(phase.phase.name for phase in manifest.phases)) == BUNDLE
    records = graph_records(StageContext(Recipe.from_dict(manifest.recipe), tensorrt_bundle))
    assert len(records) > len(manifest.phases)
    assert_engines(tensorrt_bundle, records, [tensorrt_bundle / name for name in manifest.files])


def assert_engines(folder: Path, records: Sequence[GraphRecord], written: Sequence[Path]) -> None:
    """Each graph has a plan of its own phase, whole, with the graph's inputs and outputs."""
    for record in records:
        plan = PlanRecord.read(folder / record.graph.replace(".onnx", ".tensorrt-rtx.json"))
        assert (plan.inputs, plan.outputs) == (record.inputs, record.outputs)
        assert plan.phase == (record.phase.name if isinstance(record, PhaseRecord) else None)
        paths = plan.paths(folder / record.graph)
        assert set(paths) <= set(written)
        assert len(map_parts(paths)) > 50_000
        layers = json.loads((folder / record.graph.replace(".onnx", ".tensorrt-rtx.layers.json")).read_text())["layers"]
        assert {spec.name for spec in record.inputs} <= {
            tensor["name"] for layer in layers for tensor in layer["inputs"] if tensor
        }


def test_each_network_and_each_phase_that_recipes_reach_is_among_them() -> None:
    """Each UNet in some phase, and each kind of phase in a UNet that is changed at the same places.

    Families that share an architecture have the same graphs, so one of them stands for all. A ControlNet's residuals
    are resized and added to what any phase computes: one phase with them stands for all of a layout's. Without windows
    a UNet has nothing that it has not with them, so layouts are those of families.
    """
    family, phases = BUNDLE
    built = [(Case(family, (), {}).recipe, phase) for phase in phases]
    built += [(case.recipe, phase) for case in CASES for phase in case.phases]
    for family, phase, task in (entry for entries in ELSEWHERE.values() for entry in entries):
        built.append((Case(family, (), {}, task).recipe, phase))
    unets = {json.dumps(recipe.unet_config(), sort_keys=True, default=str) for recipe, _ in built}
    phased = {(recipe.unet_layout, phase.removesuffix("-control")) for recipe, phase in built}
    assert {layout for layout, _ in phased} == {
        recipe.unet_layout for recipe, phase in built if phase.endswith("-control")
    }
    for name in shipped_recipes():
        recipe = Recipe.load(name, ["source=random:0", "unet_width=tiny"])
        assert json.dumps(recipe.unet_config(), sort_keys=True, default=str) in unets, name
        for phase in recipe.phase_rule().phases():
            assert (Layout.of(recipe.family), phase.kind.value) in phased, f"{name}: {phase.name}"
