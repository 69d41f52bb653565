"""Our engines: built as `hidiff-export build` builds them, and evaluated through `hidiff_runtime` alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import hidiff_runtime
from hidiff_export.compiler.compile import BuildResult, build
from hidiff_export.compiler.stages import order
from hidiff_export.compiler.stages.stage import Report, StageContext
from hidiff_export.recipe import Recipe
from hidiff_export.reference.tolerances import Boundary, bound_for
from hidiff_runtime import Bundle, Phase
from hidiff_runtime.denoising.denoiser import OUTPUT
from hidiff_runtime.verification.sample_recorder import SampleRecorder


class _NoReference:
    """In place of the last stage: the CPU would compute for hours what is computed here on the GPU."""

    name, title, needs = "reference", "no reference", ()

    def inputs(self, _context: StageContext) -> Any:
        return "none"

    def run(self, context: StageContext, _report: Report) -> tuple[Path, ...]:
        bounds = (bound_for(boundary, context.recipe) for boundary in (Boundary.TRAJECTORY, Boundary.RUN))
        return SampleRecorder("nothing", *bounds).write(context.folder / "reference")


class _Lines:
    """Shows each stage's begin and end in the job's log."""

    @contextmanager
    def stage(self, title: str, *, reused: bool) -> Iterator[Report]:
        started = time.monotonic()
        print(f"{title}{' (already there)' if reused else ''} ...", flush=True)
        seen: set[str] = set()

        def report(_done: float, _total: float, note: str) -> None:
            if note not in seen:
                print(f"  {note}", flush=True)
            seen.add(note)

        yield report
        print(f"{title}: {time.monotonic() - started:.1f} s", flush=True)

    def notice(self, text: str) -> None:
        print(f"note: {text}", flush=True)


def build_bundle(recipe: Recipe, folder: Path) -> BuildResult:
    """Builds a bundle with everything but reference samples; one half built before is gone on with.

    Raises:
        HidiffError: a stage failed.
    """
    stages = (*(stage for stage in order.STAGES if stage.name != _NoReference.name), _NoReference())
    with mock.patch.object(order, "STAGES", stages):
        return build(recipe, folder, _Lines())


def open_bundle(folder: Path, backend: str, device: str) -> Bundle:
    """The bundle with one backend's engines, its runs kept on the device. Raises HidiffError if it does not open."""
    options: dict[str, Any] = {"device": device} if backend == "onnxruntime" else {}
    return hidiff_runtime.open(folder, verify="size", backend=backend, loop="device", **options)


class Evaluation:
    """One phase's engine with its inputs and outputs on the device.

    Attributes:
        stream: the CUDA stream that the engine runs on, where the backend tells; calls return before it is done.

    Raises:
        HidiffError: the engine does not open, or there is too little memory.
    """

    def __init__(self, bundle: Bundle, phase: Phase, inputs: Mapping[str, Any]) -> None:
        tensors = bundle.tensors()
        assert tensors is not None  # else the bundle would not have opened
        self._session = bundle.engine(phase)
        self._memory: Any = tensors.memory
        self.stream: int | None = getattr(self._memory, "stream", None)
        record = bundle.manifest.phase(phase)
        self._inputs = {name: self._memory.empty(array.shape, array.dtype.name) for name, array in inputs.items()}
        self._outputs = {spec.name: self._memory.empty(spec.shape, spec.dtype) for spec in record.outputs}
        for name, array in inputs.items():
            self._memory.upload(array, self._inputs[name])

    @property
    def how(self) -> str:
        """What a call includes beside the engine."""
        return "tensors on the device" + ("" if self.stream is not None else ", waited for by a copy of the output")

    def __call__(self) -> None:
        """Evaluates. Where `stream` is not known it ends when the engine does, else when the engine has been asked."""
        self._session.execute(self._inputs, self._outputs)
        if self.stream is None:
            self._memory.download(self._outputs[OUTPUT])

    def output(self) -> Any:
        """The noise prediction of one evaluation, as a host array."""
        self._session.execute(self._inputs, self._outputs)
        return self._memory.download(self._outputs[OUTPUT])
