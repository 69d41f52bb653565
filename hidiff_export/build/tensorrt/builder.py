"""One builder for TensorRT and TensorRT-RTX: lowers graphs, has a worker build each plan, and writes their records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hidiff_export.build.protocol import PortableGraph, Report
from hidiff_export.build.tensorrt.libraries import TOOL, Library
from hidiff_export.build.tensorrt.lowering import lower
from hidiff_export.build.tensorrt.messages import BuildRequest, Initializer
from hidiff_export.build.tensorrt.process import Progress, ask
from hidiff_export.errors import EngineError
from hidiff_export.graph.portable import save
from hidiff_export.versions import tool_versions
from hidiff_runtime.backends.tensorrt.record import PlanRecord
from hidiff_runtime.manifest import PhaseRecord

OPTIONS = {"profiling_verbosity": "detailed", "tf32": False}
"""What every engine is built with."""

_THIS_MACHINE = ("cuda",)


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name and its compute capability (``sm90``)."""

    name: str
    target: str


@dataclass(frozen=True)
class Examined:
    """What a library can build here: its version, the targets it knows, and this machine's GPU, if there is one."""

    version: str
    targets: tuple[str, ...]
    gpu: Gpu | None


@cache
def examine(library: Library) -> Examined:
    """Loads the library in a process of its own. Raises EngineError where it is missing or does not load."""
    library.require()
    found = ask(library, "nothing", json.dumps({"do": "examine"}), lambda _fraction, _note: None)
    return Examined(found["version"], tuple(found["targets"]), _gpu(found))


def _gpu(answer: dict[str, Any]) -> Gpu | None:
    return None if answer["gpu"] is None else Gpu(**answer["gpu"])


class TensorRtBuilder:
    """Builds plans with one of the two libraries.

    Args:
        library: which.
        targets: compute capabilities such as ``sm89``, or ``cuda`` alone for the GPU of this machine.
        merged: whether all phases go into one plan.
    """

    def __init__(self, library: Library, targets: tuple[str, ...], *, merged: bool = False) -> None:
        self._library = library
        self._targets = targets
        self._merged = merged

    @property
    def name(self) -> str:
        """The library's name in recipes."""
        return self._library.backend

    def check(self) -> None:
        """Refuses a missing or old library, a target that it does not know, and this machine's GPU where none is."""
        library, found = self._library, examine(self._library)
        if tuple(map(int, found.version.split(".")[:2])) < library.least:
            raise EngineError(
                f"{library.title} is too old to build from weights in memory.",
                given=found.version,
                advice=f"pip install --upgrade 'hidiff-export[{library.backend}]'",
            )
        if self._targets == _THIS_MACHINE:
            self._check_gpu(found)
            return
        for target in self._targets:
            if target not in found.targets:
                raise EngineError(
                    f"{library.title} {found.version} does not know the target {target}.",
                    given=", ".join(self._targets),
                    advice=f"It builds for {', '.join(found.targets)}.",
                )

    def _check_gpu(self, found: Examined) -> None:
        title = self._library.title
        if found.gpu is None:
            ahead = "Name the GPUs to build for ahead of time, such as targets: [sm89, sm120]"
            other = ahead if self._library.ahead_of_time else f"{ahead} with backend: tensorrt-rtx"
            raise EngineError(
                f"{title} builds for the GPU of this machine, and there is none.",
                given="targets: cuda",
                advice=f"{other}, or build on the machine that the engines are for.",
            )
        if found.targets and found.gpu.target not in found.targets:
            raise EngineError(
                f"{title} {found.version} builds nothing for this machine's GPU.",
                given=f"{found.gpu.name}, {found.gpu.target}",
                advice=f"It builds for {', '.join(found.targets)}; backend: tensorrt builds for this GPU.",
            )

    def key(self) -> Any:
        """Targets, layout, options and the library's version; the GPU, where the engines are for it."""
        found = examine(self._library)
        here = found.gpu if self._targets == _THIS_MACHINE else None
        return {
            "targets": list(self._targets),
            "merged": self._merged,
            "options": OPTIONS,
            "version": found.version,
            "tools": tool_versions((TOOL,)),
            "gpu": here and [here.name, here.target],
        }

    def engines(self, graphs: Sequence[PortableGraph]) -> tuple[Path, ...]:
        """The plan records: ``strided.tensorrt-rtx.json`` beside ``strided.onnx``."""
        return tuple(graph.path.with_suffix(f".{self.name}.json") for graph in graphs)

    def build(self, graphs: Sequence[PortableGraph], report: Report) -> tuple[Path, ...]:
        """Builds plan after plan; see :class:`~hidiff_export.build.protocol.Builder`."""
        written: list[Path] = []
        try:
            for index, (graph, engine) in enumerate(zip(graphs, self.engines(graphs), strict=True)):

                def progress(fraction: float, note: str, index: int = index, name: str = graph.path.stem) -> None:
                    report(index + fraction, len(graphs), f"{name}: {note}")

                progress(0, "lowering")
                written += self._build(graph, engine, progress)
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise
        return tuple(written)

    def _build(self, graph: PortableGraph, engine: Path, progress: Progress) -> tuple[Path, ...]:
        plan, layers = engine.with_suffix(".plan"), engine.with_suffix(".layers.json")
        beside = {path: path.with_name(f"{path.name}.tmp") for path in (plan, layers)}
        lowered = engine.with_suffix(".onnx.tmp")
        try:
            request = self._request(graph, lowered, beside[plan], beside[layers])
            answer = ask(
                self._library, engine.stem, json.dumps({"do": "build", **json.loads(request.to_json())}), progress
            )
            for path, temporary in beside.items():
                temporary.replace(path)
        finally:
            for path in (lowered, *beside.values()):
                path.unlink(missing_ok=True)
        self._record(graph, plan, answer).write(engine)
        return engine, plan, layers

    def _request(self, graph: PortableGraph, lowered: Path, plan: Path, layers: Path) -> BuildRequest:
        model = ir.load(graph.path)
        lower(model)
        save(model, lowered)
        outside = {
            name: value.const_value
            for name, value in model.graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        weights = {str(Path(tensor.base_dir) / tensor.location) for tensor in outside.values()}
        assert len(weights) <= 1  # one store beside the graph
        return BuildRequest(
            graph=str(lowered),
            weights=next(iter(weights), None),
            initializers=tuple(
                Initializer(name, tensor.offset or 0, tensor.length or tensor.nbytes)
                for name, tensor in outside.items()
            ),
            targets=() if self._targets == _THIS_MACHINE else self._targets,
            inputs=graph.record.inputs,
            outputs=graph.record.outputs,
            plan=str(plan),
            layers=str(layers),
        )

    def _record(self, graph: PortableGraph, plan: Path, answer: dict[str, Any]) -> PlanRecord:
        here = _gpu(answer) if self._targets == _THIS_MACHINE else None
        return PlanRecord(
            backend=self.name,
            version=answer["version"],
            targets=self._targets if here is None else (here.target,),
            device=None if here is None or self._library.ahead_of_time else here.name,
            parts=(plan.name,),
            phases=(graph.record.phase.name,) if isinstance(graph.record, PhaseRecord) else (),
            selectors=(),
            inputs=graph.record.inputs,
            outputs=graph.record.outputs,
            options={**OPTIONS, "seconds": answer["seconds"], "peak_bytes": answer["peak_bytes"]},
        )
