"""Plans of the fake libraries on disk, and the fakes in the real ones' place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_trt import FakeTrt, plan_bytes

from hidiff_runtime.backends.tensorrt import library as libraries
from hidiff_runtime.backends.tensorrt.record import PlanRecord
from hidiff_runtime.manifest import GraphRecord


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

    monkeypatch.setattr(libraries, "import_module_of", imported)
    return trt


def record_of(trt: FakeTrt, graph: GraphRecord, *, phases: tuple[str, ...] = (), **fields: Any) -> PlanRecord:
    """The record of one graph's plan."""
    made = PlanRecord(
        backend="tensorrt-rtx" if trt.rtx else "tensorrt",
        version=trt.__version__,
        targets=(trt.target,),
        device=None,
        parts=("engine.plan",),
        phases=phases,
        selectors=(),
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
        selectors=record.selectors,
        **more,
    )
    parts = (f"{name}.head", f"{name}.tail")
    (folder / parts[0]).write_bytes(content[:100])
    (folder / parts[1]).write_bytes(content[100:])
    path = folder / f"{name}.{record.backend}.json"
    replace(record, parts=parts).write(path)
    return path
