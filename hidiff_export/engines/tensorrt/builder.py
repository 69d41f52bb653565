"""One builder for TensorRT and TensorRT-RTX: lowers graphs, has a worker build each plan, and writes their records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hidiff_export.child_process import Progress
from hidiff_export.engines.protocol import PortableGraph, Report
from hidiff_export.engines.tensorrt.built_plans import Built
from hidiff_export.engines.tensorrt.capabilities import THIS_MACHINE, DetectedGpu, check_targets, examine, timing_cache
from hidiff_export.engines.tensorrt.libraries import TOOL, BuilderLibrary
from hidiff_export.engines.tensorrt.lowering import lower
from hidiff_export.engines.tensorrt.shared_weights import share_tails
from hidiff_export.engines.tensorrt.worker_process import ask
from hidiff_export.engines.tensorrt.worker_protocol import BuildRequest, Initializer
from hidiff_export.files import temporary
from hidiff_export.graph.portable import load_graph, save
from hidiff_export.tool_versions import tool_versions
from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord
from hidiff_runtime.format.manifest import FileDigest, PhaseRecord

OPTIONS = {"profiling_verbosity": "detailed", "tf32": False, "allocates_while_running": False}
"""What every engine is built with; TensorRT-RTX alone has to be asked for the last."""

SIZES = ("scratch_bytes", "weights_bytes")
"""What the library says that a plan will take on the device; None where it does not say."""


@dataclass(frozen=True)
class _Plan:
    """A plan to build of a graph; the other files lie beside its record, ``engine``."""

    engine: Path
    graph: PortableGraph

    @property
    def name(self) -> str:
        """For people: ``strided``."""
        return self.engine.name.partition(".")[0]

    @property
    def plan(self) -> Path:
        """The plan, before it is divided into parts."""
        return self.engine.with_suffix(".plan")

    @property
    def layers(self) -> Path:
        """The list of layers, for people."""
        return self.engine.with_suffix(".layers.json")


class TensorRtBuilder:
    """Builds plans with one of the two libraries.

    Args:
        library: which.
        targets: compute capabilities such as ``sm89``, or ``cuda`` alone for the GPU of this machine.
    """

    def __init__(self, library: BuilderLibrary, targets: tuple[str, ...]) -> None:
        self._library = library
        self._targets = targets

    @property
    def name(self) -> str:
        """The library's name in recipes."""
        return self._library.backend

    def check(self) -> None:
        """Refuses early; see :func:`~hidiff_export.engines.tensorrt.capabilities.check_targets`."""
        check_targets(self._library, self._targets)

    def key(self) -> Any:
        """Returns targets, options and the library's version; the GPU, where the engines are for it."""
        found = examine(self._library)
        here = found.gpu if self._targets == THIS_MACHINE else None
        return {
            "targets": list(self._targets),
            "options": OPTIONS,
            "version": found.version,
            "tools": tool_versions((TOOL,)),
            "gpu": here and [here.name, here.target],
        }

    def engines(self, graphs: Sequence[PortableGraph]) -> tuple[Path, ...]:
        """Returns the plan records: ``strided.tensorrt-rtx.json`` beside ``strided.onnx``."""
        return tuple(graph.path.with_name(f"{graph.path.stem}.{self.name}.json") for graph in graphs)

    def build(self, graphs: Sequence[PortableGraph], report: Report) -> tuple[Path, ...]:
        """Builds plan after plan, then stores once what they share; see `hidiff_export.engines.protocol.Builder`.

        A plan that an interrupted build left whole, of the same graph, weights, library and options, is kept.
        """
        plans = [_Plan(engine, graph) for engine, graph in zip(self.engines(graphs), graphs, strict=True)]
        hashes: dict[str, str] = {}
        records: dict[Path, PlanRecord] = {}
        for index, plan in enumerate(plans):

            def progress(fraction: float, note: str, index: int = index, name: str = plan.name) -> None:
                report(index + fraction, len(plans), f"{name}: {note}")

            records[plan.engine] = self._built(plan, hashes, progress)
        report(len(plans), len(plans), "storing weights once")
        return _share(plans, records)

    def _built(self, plan: _Plan, hashes: dict[str, str], progress: Progress) -> PlanRecord:
        """Returns a plan's record, built but where an interrupted build left it; ``hashes`` of weights are kept."""
        files = (plan.plan, plan.layers, plan.engine)
        beside = {path: temporary(path) for path in (plan.plan, plan.layers)}
        lowered = plan.engine.with_suffix(".onnx.tmp")
        try:
            progress(0, "lowering")
            request = self._request(plan, lowered, *beside.values())
            key = self._key_of(request, hashes)
            built = Built.read(plan.engine)
            if built is not None and built.holds(key, files):
                return PlanRecord.read(plan.engine)
            answer = ask(self._library, plan.engine.stem, request.to_json(), progress)
            for path, part in beside.items():
                part.replace(path)
        finally:
            for path in (lowered, *beside.values()):
                path.unlink(missing_ok=True)
        record = self._record(plan, key, answer)
        record.write(plan.engine)
        Built.of(key, files, answer).write(plan.engine)
        return record

    def _request(self, plan: _Plan, lowered: Path, built: Path, layers: Path) -> BuildRequest:
        """Lowers the graph to the file ``lowered``, and says what is to be built from it."""
        model = load_graph(plan.graph.path)
        lower(model, plan.engine.name)
        save(model, lowered)
        outside = {
            name: value.const_value
            for name, value in model.graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        stores = {str(Path(tensor.base_dir) / tensor.location) for tensor in outside.values()}
        assert len(stores) <= 1  # the one beside the graph
        cache = timing_cache(self._library, examine(self._library))
        return BuildRequest(
            graph=str(lowered),
            weights=next(iter(stores), None),
            initializers=tuple(
                Initializer(name, tensor.offset or 0, tensor.length or tensor.nbytes)
                for name, tensor in outside.items()
            ),
            targets=() if self._targets == THIS_MACHINE else self._targets,
            inputs=plan.graph.record.inputs,
            outputs=plan.graph.record.outputs,
            plan=str(built),
            layers=str(layers),
            timing_cache=None if cache is None else str(cache),
        )

    def _key_of(self, request: BuildRequest, hashes: dict[str, str]) -> str:
        """Returns the fingerprint of everything that a plan depends on."""
        for path in (request.graph, request.weights):
            if path is not None and path not in hashes:
                hashes[path] = FileDigest.of(Path(path)).sha256
        contents = hashes.pop(request.graph), request.weights and hashes[request.weights]
        return hashlib.sha256(json.dumps([self.key(), *contents], sort_keys=True).encode()).hexdigest()

    def _record(self, plan: _Plan, key: str, answer: dict[str, Any]) -> PlanRecord:
        here = DetectedGpu.of(answer) if self._targets == THIS_MACHINE else None
        graph = plan.graph.record
        return PlanRecord(
            backend=self.name,
            version=answer["version"],
            targets=self._targets if here is None else (here.target,),
            device=None if here is None or self._library.ahead_of_time else here.name,
            parts=(plan.plan.name,),
            phase=graph.phase.name if isinstance(graph, PhaseRecord) else None,
            inputs=graph.inputs,
            outputs=graph.outputs,
            options={**OPTIONS, **{name: answer[name] for name in SIZES}, "key": key},
        )


def _share(plans: Sequence[_Plan], records: Mapping[Path, PlanRecord]) -> tuple[Path, ...]:
    """Divides plans over the same weights into parts; returns every file of all plans."""
    files: dict[Path, None] = {}
    for folder in {plan.engine.parent: None for plan in plans}:
        together = [plan for plan in plans if plan.engine.parent == folder]
        parts = share_tails([plan.plan for plan in together])
        for plan in together:
            paths = parts[plan.plan]
            replace(records[plan.engine], parts=tuple(path.name for path in paths)).write(plan.engine)
            files.update(dict.fromkeys((plan.engine, plan.layers, *paths)))
    return tuple(files)
