"""Plans of the fake libraries, in bundles of `toy` too, and the fakes in the real ones' place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy
import toy_device
from fake_trt import FakeTrt, Kernel, plan_bytes

from hidiff_runtime.backends.tensorrt import runtime_library as libraries
from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord
from hidiff_runtime.format.manifest import GraphRecord, Manifest


@contextmanager
def watched(trt: FakeTrt, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTrt]:
    """Makes the backends import these fakes; at the end nothing was misused, and everything was given back."""
    use(monkeypatch, trt)
    yield trt
    assert not trt.cuda.misuses
    assert not trt.cuda.leaks


def use(monkeypatch: pytest.MonkeyPatch, trt: FakeTrt) -> FakeTrt:
    """Makes the backends import these fakes."""

    def imported(name: str) -> Any:
        if name == "cuda.bindings.runtime":
            return trt.cuda
        if name == ("tensorrt_rtx" if trt.rtx else "tensorrt"):
            return trt
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(libraries, "import_module", imported)
    return trt


def record_of(trt: FakeTrt, graph: GraphRecord, *, phase: str | None = None, **fields: Any) -> PlanRecord:
    """The record of one graph's plan."""
    made = PlanRecord(
        backend="tensorrt-rtx" if trt.rtx else "tensorrt",
        version=trt.__version__,
        targets=(trt.target,),
        device=None,
        parts=("engine.plan",),
        phase=phase,
        inputs=graph.inputs,
        outputs=graph.outputs,
    )
    return replace(made, **fields)


def write_plan(folder: Path, name: str, record: PlanRecord, kernel: str, **more: Any) -> Path:
    """Writes a record and its plan, in two parts; gives the record's path."""
    content = plan_bytes(
        kernel,
        record.inputs,
        record.outputs,
        version=record.version,
        targets=record.targets,
        **more,
    )
    parts = (f"{name}.head", f"{name}.tail")
    (folder / parts[0]).write_bytes(content[:100])
    (folder / parts[1]).write_bytes(content[100:])
    path = folder / f"{name}.{record.backend}.json"
    replace(record, parts=parts).write(path)
    return path


KIND = toy.Toy(reference=False)


def kernels(kind: toy.Toy) -> dict[str, Kernel]:
    """The toy's UNet by phase, and its step graph."""
    stored = toy.stored_weights(kind)
    batch = kind.graph_batch

    def unet(phase: str) -> Kernel:
        return lambda inputs: {"noise_pred": toy.unet(phase, stored, inputs)}

    made: dict[str, Kernel] = {phase.name: unet(phase.name) for phase in kind.rule.phases()}
    return {**made, "step": lambda inputs: toy_device.step(inputs, batch)}


def add_engines(folder: Path, trt: FakeTrt, **more: Any) -> None:
    """Gives every graph of a toy bundle a plan; the parts of the plan follow its record's name."""
    backend = "tensorrt-rtx" if trt.rtx else "tensorrt"
    manifest = Manifest.read(folder)

    def added(record: Any, name: str, plan: PlanRecord, kernel: str) -> Any:
        path = write_plan((folder / record.graph).parent, name, plan, kernel, **more)
        return replace(record, engines={**record.engines, backend: path.relative_to(folder).as_posix()})

    phases = []
    for record in manifest.phases:
        name = record.phase.name
        phases.append(added(record, name, record_of(trt, record, phase=name), name))
    assert manifest.step is not None
    step = added(manifest.step, "step", record_of(trt, manifest.step), "step")
    toy.seal(folder, replace(manifest, phases=tuple(phases), step=step))
