"""The builder: files beside the graphs, nothing half-written, and only what has to be built again is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hidiff_export.engines.protocol import PortableGraph
from hidiff_export.engines.tensorrt import builder as module
from hidiff_export.engines.tensorrt.builder import TensorRtBuilder
from hidiff_export.engines.tensorrt.built_plans import COSTS, Built
from hidiff_export.engines.tensorrt.capabilities import DetectedGpu, Examined
from hidiff_export.engines.tensorrt.engine_build import set_flags
from hidiff_export.engines.tensorrt.libraries import TENSORRT, TENSORRT_RTX
from hidiff_export.errors import EngineError
from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord
from hidiff_runtime.format.manifest import GraphRecord, PhaseRecord, TensorSpec
from hidiff_runtime.phases import Phase, PhaseKind
from tests.export.engines.tensorrt.small_engines import linear, specs, square
from tests.export.engines.tensorrt.test_worker_process import files_of_at_most

pytestmark = pytest.mark.needs("tensorrt-rtx")

FILES = [
    "first.onnx",
    "first.tensorrt-rtx.built",
    "first.tensorrt-rtx.json",
    "first.tensorrt-rtx.layers.json",
    "first.tensorrt-rtx.plan",
]


def silent(_done: float, _total: float, _note: str) -> None:
    """Shows nothing."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def portable(path: Path, weight: float | None = None) -> PortableGraph:
    """A graph on the disk: a square, or with ``weight`` a layer over weights in ``w.bin``."""
    if weight is None:
        model = square()
    else:
        model, _ = linear(path.parent, np.full((16, 32), weight, np.float32))
    path.write_bytes(model.SerializeToString())
    record = GraphRecord(path.name, {}, specs(model.graph.input), specs(model.graph.output))
    return PortableGraph(path, record)


@pytest.fixture
def builder() -> TensorRtBuilder:
    return TensorRtBuilder(TENSORRT_RTX, ("sm89",))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The engines that workers are asked for."""
    found: list[str] = []
    ask = module.ask

    def note(library: Any, what: str, *rest: Any) -> dict[str, Any]:
        found.append(what)
        return ask(library, what, *rest)

    monkeypatch.setattr(module, "ask", note)
    return found


def test_each_graph_has_a_record_a_plan_and_a_list_of_layers(builder: TensorRtBuilder, tmp_path: Path) -> None:
    graph = portable(tmp_path / "first.onnx")
    record = graph.record
    phase = PhaseRecord(record.graph, {}, record.inputs, record.outputs, Phase(PhaseKind.STRIDED))
    written = builder.build([replace(graph, record=phase)], silent)
    assert names(tmp_path) == FILES
    assert {path.name for path in written} == set(FILES[2:])
    plan = PlanRecord.read(builder.engines([graph])[0])
    assert plan.backend == builder.name == "tensorrt-rtx"
    assert (plan.targets, plan.device, plan.phase) == (("sm89",), None, "strided")
    assert plan.parts == ("first.tensorrt-rtx.plan",)
    assert (plan.inputs, plan.outputs) == (record.inputs, record.outputs)
    assert not plan.options.keys() & set(COSTS)
    built = Built.read(builder.engines([graph])[0])
    assert built is not None
    assert built.costs["peak_bytes"] > 50e6


def test_the_same_graph_gives_the_same_bytes_whatever_building_it_costs(
    builder: TensorRtBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = module.ask

    def slower(*rest: Any) -> dict[str, Any]:
        answer = ask(*rest)
        return {**answer, "seconds": answer["seconds"] + 100, "peak_bytes": answer["peak_bytes"] * 2}

    content = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written = builder.build([portable(tmp_path / name / "first.onnx")], silent)
        content.append({path.name: path.read_bytes() for path in written})
        monkeypatch.setattr(module, "ask", slower)
    assert content[0] == content[1]


def test_float32_is_whole_and_no_memory_is_taken_while_an_engine_runs() -> None:
    trt = import_module("tensorrt_rtx")
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    flags = trt.BuilderFlag.TF32, trt.BuilderFlag.REQUIRE_USER_ALLOCATION
    assert [config.get_flag(flag) for flag in flags] == [True, False]
    set_flags(trt, config)
    assert [config.get_flag(flag) for flag in flags] == [False, True]


def test_what_an_interrupted_build_left_whole_is_kept(
    builder: TensorRtBuilder, tmp_path: Path, asked: list[str]
) -> None:
    graphs = [portable(tmp_path / "first.onnx"), portable(tmp_path / "second.onnx")]

    def interrupt(done: float, _total: float, _note: str) -> None:
        if done > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builder.build(graphs, interrupt)
    assert names(tmp_path) == [*FILES, "second.onnx"]
    builder.build(graphs, silent)
    assert asked == ["first.tensorrt-rtx", "second.tensorrt-rtx", "second.tensorrt-rtx"]


Change = Callable[[Path, pytest.MonkeyPatch], None]


def other_weights(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    content = bytearray((folder / "w.bin").read_bytes())
    content[-1] ^= 1
    (folder / "w.bin").write_bytes(content)


def other_graph(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    content = (folder / "first.onnx").read_bytes()
    (folder / "first.onnx").write_bytes(content.replace(b"small", b"other"))


def other_library(_folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "examine", lambda _library: Examined("1.8.0.1", ("sm89",), None))


def damaged_record(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    (folder / "first.tensorrt-rtx.json").write_text("{")


def lost_plan(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    (folder / "first.tensorrt-rtx.plan").unlink()


def changed_plan(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    plan = folder / "first.tensorrt-rtx.plan"
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")


def nothing(_folder: Path, _patch: pytest.MonkeyPatch) -> None:
    """The control: what did not change is kept."""


@pytest.mark.parametrize(
    ("change", "built"),
    [
        (nothing, 1),
        (other_weights, 2),
        (other_graph, 2),
        (other_library, 2),
        (damaged_record, 2),
        (lost_plan, 2),
        (changed_plan, 2),
    ],
)
def test_what_changed_is_built_again(
    change: Change,
    built: int,
    builder: TensorRtBuilder,
    tmp_path: Path,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = portable(tmp_path / "first.onnx", weight=1.0)
    builder.build([graph], silent)
    change(tmp_path, monkeypatch)
    builder.build([graph], silent)
    assert len(asked) == built


def test_a_full_disk_leaves_nothing_half_written(builder: TensorRtBuilder, tmp_path: Path) -> None:
    graph = portable(tmp_path / "first.onnx")
    with files_of_at_most(50_000), pytest.raises(OSError, match="too large"):
        builder.build([graph], silent)
    assert names(tmp_path) == ["first.onnx"]


def test_a_graph_that_is_not_as_its_record_says_leaves_nothing(builder: TensorRtBuilder, tmp_path: Path) -> None:
    graph = portable(tmp_path / "first.onnx")
    wrong = replace(graph.record, outputs=(TensorSpec("c", (8,), "float32"),))
    with pytest.raises(EngineError, match="other outputs than its graph's record says"):
        builder.build([replace(graph, record=wrong)], silent)
    assert names(tmp_path) == ["first.onnx"]


def test_the_key_holds_targets_version_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    h100, l40 = DetectedGpu("NVIDIA H100", "sm90"), DetectedGpu("NVIDIA L40S", "sm89")
    keys = [TensorRtBuilder(TENSORRT_RTX, targets).key() for targets in (("sm89",), ("sm89", "sm120"))]
    for found in (Examined("11.3", (), h100), Examined("11.4", (), h100), Examined("11.4", (), l40)):
        monkeypatch.setattr(module, "examine", lambda _library, found=found: found)
        keys.append(TensorRtBuilder(TENSORRT, ("cuda",)).key())
    assert all(keys.count(key) == 1 for key in keys)
