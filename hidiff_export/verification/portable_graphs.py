"""Judges a bundle's portable graphs, as they are before a backend's lowering, by a reference; imports no torch.

What is evaluated is what `hidiff_export.graph.rounded_copy` makes of each graph: a half-precision graph
rounds there as a half-precision engine does, though ONNX Runtime runs it on a CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidiff_export.compiler.stages.stage import traced_graph
from hidiff_export.errors import EngineError
from hidiff_export.graph.float32_ops import precision_of
from hidiff_export.graph.rounded_copy import write_rounded_copy
from hidiff_export.recipe import Recipe
from hidiff_export.recipe.field_types import Precision
from hidiff_export.reference.flops_progress import FlopsProgress
from hidiff_export.reference.tolerances import Boundary, bound_for
from hidiff_export.verification.compare import compare_call, compare_network
from hidiff_runtime import backends
from hidiff_runtime.backends.protocol import Availability, Backend, Device, Session
from hidiff_runtime.bundle import Bundle
from hidiff_runtime.format.bundle_folder import BundleFolder, LinksOption
from hidiff_runtime.format.manifest import GraphRecord, PhaseRecord
from hidiff_runtime.phases import Phase
from hidiff_runtime.verification.comparison import Verdict

if TYPE_CHECKING:
    from hidiff_export.reference.reference import ReferenceCall
    from hidiff_export.reference.text_vae_reference import NetworkCall

_NETWORKS = {
    "controlnet": Boundary.CONTROLNET_GRAPH,
    "vae_decoder": Boundary.VAE_DECODER_GRAPH,
    "vae_encoder": Boundary.VAE_ENCODER_GRAPH,
}
_OPTIONS = {"optimize": False, "weights": "shared"}
"""Every rounding stays where it is written, and weights where they are stored: each graph is evaluated few times."""


def portable_backend() -> Backend:
    """Returns what runs portable graphs, whatever a bundle's engines are: ONNX Runtime, which opens ONNX as it is.

    Raises:
        EngineError: it is not installed.
    """
    backend = backends.get("onnxruntime")
    availability = backend.available()
    if not availability.usable:
        raise EngineError(
            "The portable graphs cannot be checked: ONNX Runtime runs them, and it is not here.",
            given=availability.detail,
            advice=availability.advice,
        )
    return backend


@dataclass(frozen=True)
class _NoEngines:
    """Stands in for the backend of a bundle none of whose engines is opened; its device is the portable one's."""

    name: str
    portable: Backend

    def available(self) -> Availability:
        return Availability(True, "no engine is opened")

    def files(self, engine: Path) -> tuple[Path, ...]:
        return (engine,)

    def device(self, options: Mapping[str, Any]) -> Device:
        return self.portable.device(options)


def no_engines(folder: Path, allow_links: LinksOption, portable: Backend) -> Backend:
    """Returns what opens a bundle whose engines need not run here. Raises BundleError when there is no bundle."""
    manifest = BundleFolder(folder, allow_links).manifest()
    return _NoEngines(next(iter(manifest.phases[0].engines)), portable)


def first_and_last(run: Sequence[Phase], phase: Phase, precision: Precision) -> list[int]:
    """Returns those of a run's evaluations that a phase's graph is judged on: in half precision its first and its last.

    What overflows or loses digits depends on the numbers, and a run's are not random ones; float32 has room for both.

    Args:
        run: the phase of each evaluation.
    """
    if precision.stored is Precision.FLOAT32:
        return []
    own = [index for index, its in enumerate(run) if its == phase]
    return [*own[:1], *own[1:][-1:]]


class GraphComparer:
    """Compares a bundle's portable graphs with a reference; each method yields verdicts as they are reached.

    Args:
        bundle: open; its engines are closed.
        recipe: whose bounds hold.
        meter: told before each evaluation.
        portable: runs portable graphs.
    """

    def __init__(self, bundle: Bundle, recipe: Recipe, meter: FlopsProgress, portable: Backend) -> None:
        bundle.close()
        self._bundle = bundle
        self._recipe = recipe
        self._meter = meter
        self._portable = portable

    def phases(self, random: Sequence[ReferenceCall], run: Sequence[ReferenceCall]) -> Iterator[Verdict]:
        """Yields each phase's graph on the first of the random calls, and in half precision on some of a run.

        A quantized graph comes after the float16 graph it was made from. A phase without a random call is a fault.
        """
        precision, phases = self._recipe.precision, [call.point.phase for call in run]
        for record in self._bundle.manifest.phases:
            graph = self._bundle.file(record.graph)
            first = [call for call in random if call.point.phase == record.phase][:1]
            if precision.quantized:
                yield from self._phase(Boundary.FLOAT16_GRAPH, traced_graph(graph, precision), record, first)
            in_run = [run[index] for index in first_and_last(phases, record.phase, precision)]
            yield from self._phase(Boundary.GRAPH, graph, record, first, in_run)

    def networks(self, calls: Iterable[NetworkCall]) -> Iterator[Verdict]:
        """Yields the graphs of the ControlNet, text encoders and the VAE's halves, where they are of half precision."""
        records = dict(self._bundle.manifest.others())
        for call in calls:
            if precision_of(call.network.partition("_")[0], self._recipe.precision) is Precision.FLOAT32:
                continue
            boundary, record = _NETWORKS.get(call.network, Boundary.TEXT_GRAPH), records[call.network]
            self._meter.note(boundary.value)
            with self._open(self._bundle.file(record.graph), record) as session:
                yield compare_network(boundary, call, session.run, self._recipe)

    def _phase(
        self,
        boundary: Boundary,
        graph: Path,
        record: PhaseRecord,
        random: Sequence[ReferenceCall],
        run: Sequence[ReferenceCall] = (),
    ) -> Iterator[Verdict]:
        if not random:
            bound = bound_for(boundary, self._recipe)
            yield Verdict(boundary.value, bound, None, record.phase.name, fault="no reference")
            return
        calls = [*((boundary, call) for call in random), *((Boundary.GRAPH_RUN, call) for call in run)]
        with self._open(graph, record) as session:
            for judged, call in calls:
                yield compare_call(judged, call, session, self._recipe, self._meter)

    @contextmanager
    def _open(self, graph: Path, record: GraphRecord) -> Iterator[Session]:
        """Yields the form that a graph is judged by, in a temporary folder; weights stay where they are."""
        with tempfile.TemporaryDirectory(prefix="hidiff-judged-") as folder:
            weights = {}
            for name, path in self._bundle.manifest.weights.items():
                weights[name] = Path(folder) / path
                weights[name].parent.mkdir(parents=True, exist_ok=True)
                weights[name].symlink_to(self._bundle.file(path).absolute())
            judged = Path(folder) / record.graph
            judged.parent.mkdir(parents=True, exist_ok=True)
            write_rounded_copy(graph, judged)
            with self._portable.device(_OPTIONS) as device, device.open(judged, weights, record) as session:
                yield session
