"""Stages of a rebased bundle: graphs and tables that do not depend on the weights are taken from the bundle before."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hidiff_export.checkpoints.stored_configs import SCHEDULER_CONFIG, WEIGHTS
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.compiler.graph_specs import graph_records
from hidiff_export.compiler.stages.graphs import GraphsStage, write_beside
from hidiff_export.compiler.stages.scheduler_tables import SchedulerTablesStage, table_path, tabulated
from hidiff_export.compiler.stages.stage import Report, StageContext, traced_graph
from hidiff_export.errors import BundleError
from hidiff_export.graph.onnx_dtypes import ONNX_DTYPES, signature
from hidiff_export.recipe import Recipe
from hidiff_export.tool_versions import EXPORTERS, tool_versions
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.format.dtypes import BY_TAG
from hidiff_runtime.format.integrity import verify_files
from hidiff_runtime.format.manifest import FileDigest, GraphRecord, Manifest


@dataclass(frozen=True)
class SourceBundle:
    """The bundle that graphs and tables are taken from: its folder and its manifest."""

    folder: BundleFolder
    manifest: Manifest

    def take(self, context: StageContext, path: Path) -> Path:
        """Copies a file to the same place in the new bundle. Raises BundleError when it is not as it was written."""
        name = context.inside(path)
        if name not in self.manifest.files:
            raise _untakeable(f"{name} is not in {self.folder.root}")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.folder.file(name), path)
        verify_files(BundleFolder(context.folder), {name: self.manifest.files[name]})
        return path


class ReusedGraphs(GraphsStage):
    """The traced graphs of another bundle; the step graphs and the preview, which cost little, are made anew.

    A graph holds no weight, but says where in the store each lies. It is taken only if the new store has every weight
    that it names at that place, of that type and shape, and its inputs and outputs are those that the recipe gives.

    Args:
        origin: where they come from.
    """

    def __init__(self, origin: SourceBundle) -> None:
        self.origin = origin

    def inputs(self, context: StageContext) -> Any:
        """Returns the graphs by their content, and what they have to fit."""
        phases = len(context.phases)
        others = [path for path in context.graphs[phases:] if path not in context.step_graphs]
        names = map(context.inside, (*map(context.traced, context.phases), *others))
        files = self.origin.manifest.files
        return {**super().inputs(context), "taken": {name: files[name].sha256 for name in names if name in files}}

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Copies graph after graph and compares each with the new weight store."""
        beside = write_beside(context)
        taken: list[Path] = []
        for path, record in _traced(context):
            report(len(taken), len(context.graphs), f"{path.name}, taken over")
            self.origin.take(context, path)
            check_graph(path, record, WeightStore.open(path.parent / WEIGHTS))
            taken.append(path)
        declined = context.declined(self.name)
        if context.inside(declined) in self.origin.manifest.files:
            beside = (*beside, self.origin.take(context, declined))
        return (*taken, *beside)


class ReusedSchedulerTables(SchedulerTablesStage):
    """The sampler tables of another bundle where noise schedule, runs and tools are the same, else new ones.

    Args:
        origin: where they come from.
    """

    def __init__(self, origin: SourceBundle) -> None:
        self.origin = origin

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Copies every table, or probes every sampler."""
        if not self._same(context):
            return super().run(context, report)
        return tuple(
            self.origin.take(context, table_path(context, sampler.value)) for sampler in context.recipe.sampler
        )

    def _same(self, context: StageContext) -> bool:
        tools = tool_versions(EXPORTERS)
        before = self.origin.manifest
        schedule = FileDigest.of(context.folder / SCHEDULER_CONFIG) == before.files.get(SCHEDULER_CONFIG)
        same_runs = tabulated(Recipe.from_dict(before.recipe)) == tabulated(context.recipe)
        return schedule and same_runs and all(before.tools.get(name) == version for name, version in tools.items())


def _traced(context: StageContext) -> Iterator[tuple[Path, GraphRecord]]:
    """Yields the graphs that a build traces, with what goes in and out of each."""
    phases = {context.graph(phase) for phase in context.phases}
    for record in graph_records(context):
        path = context.folder / record.graph
        if path not in context.step_graphs:
            yield (traced_graph(path, context.recipe.precision) if path in phases else path), record


def check_graph(path: Path, record: GraphRecord, store: WeightStore) -> None:
    """Raises BundleError unless a graph's inputs, outputs and weights are those of the record and of the store.

    Args:
        path: of the graph, beside the store.
        record: what goes in and out.
        store: whose tensors the graph names.
    """
    try:
        graph = ir.load(path).graph
    except Exception as error:  # whatever the parser makes of a file that is no graph
        raise _untakeable(f"{path.name} is not a readable graph: {error}") from error
    for specs, values in ((record.inputs, graph.inputs), (record.outputs, graph.outputs)):
        wanted = [(spec.name, spec.shape, spec.dtype) for spec in specs]
        found = signature(values)
        if found != wanted:
            odd = next((one for one in found if one not in wanted), None)
            raise _untakeable(f"{path.name}: expected {wanted}, got {odd or found}")
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and (fault := _fault(name, tensor, store)):
            raise _untakeable(f"{path.name}: {fault}")


def _fault(name: str, tensor: ir.ExternalTensor, store: WeightStore) -> str:
    """Returns what keeps an external weight from being the store's tensor of this name; empty where nothing does."""
    if Path(tensor.location) != Path(store.path.name):
        return f"{name} is in {tensor.location}, not in {store.path.name}"
    if name not in store.names():
        return f"{name} is not among the new weights"
    place = store.reference(name)
    here = (tensor.offset, tensor.length, tensor.dtype, tuple(tensor.shape))
    there = (place.offset, place.nbytes, ONNX_DTYPES[BY_TAG[place.dtype].name], place.shape)
    return "" if here == there else f"{name} is expected at {here}, and lies at {there}"


def _untakeable(given: str) -> BundleError:
    return BundleError(
        "The bundle's graphs do not fit the new weights.",
        given=given,
        advice="Build the new checkpoint with hidiff-export build; another version may have made this bundle.",
    )
