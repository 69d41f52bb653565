"""Each portable graph becomes the engines that the recipe's backends run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from hidiff_export.compiler.graph_specs import graph_records
from hidiff_export.compiler.stages.stage import Report, Stage, StageContext
from hidiff_export.compiler.stages.timing_graph import timing_record
from hidiff_export.engines.onnxruntime import OnnxRuntimeBuilder
from hidiff_export.engines.openvino import OpenVinoBuilder
from hidiff_export.engines.protocol import Builder, PortableGraph
from hidiff_export.engines.tensorrt.builder import TensorRtBuilder
from hidiff_export.engines.tensorrt.libraries import TENSORRT, TENSORRT_RTX
from hidiff_export.errors import ExportError
from hidiff_export.graph.declined import collecting, write_declined
from hidiff_export.recipe import Recipe
from hidiff_export.recipe.field_types import BackendName
from hidiff_runtime.format.manifest import GraphRecord

Record = TypeVar("Record", bound=GraphRecord)


_TENSORRT = {BackendName.TENSORRT: TENSORRT, BackendName.TENSORRT_RTX: TENSORRT_RTX}


def builders_for(recipe: Recipe) -> tuple[Builder, ...]:
    """Returns the builders of the recipe's backends, the default one first."""
    return tuple(_builder(recipe, backend) for backend in recipe.backend)


def _builder(recipe: Recipe, backend: BackendName) -> Builder:
    if backend is BackendName.ONNXRUNTIME:
        return OnnxRuntimeBuilder()
    if backend is BackendName.OPENVINO:
        return OpenVinoBuilder(split_attention=not recipe.family.has_large_scores)
    return TensorRtBuilder(_TENSORRT[backend], tuple(target.value for target in backend.targets(recipe.targets)))


def with_engines(context: StageContext, record: Record) -> Record:
    """Returns the record of a graph, with the paths of its engines."""
    for bucket in context.buckets:
        graphs = _portable_graphs(bucket)
        for index, graph in enumerate(graphs):
            if graph.record.graph == record.graph:
                engines = {builder.name: builder.engines(graphs)[index] for builder in builders_for(context.recipe)}
                return replace(record, engines={name: context.inside(path) for name, path in engines.items()})
    raise ExportError("A graph is no bucket's.", given=record.graph)


def _portable_graphs(context: StageContext) -> tuple[PortableGraph, ...]:
    timing = timing_record(context)
    records = (*graph_records(context), *(() if timing is None else (timing,)))
    return tuple(PortableGraph(context.folder / record.graph, record) for record in records)


class EnginesStage(Stage):
    """The engines, beside the graphs they are built from.

    Args:
        others: stages that make graphs too.
    """

    name = "engines"
    title = "engines"

    def __init__(self, *others: str) -> None:
        self.needs = ("weights", "graphs", *others)

    def inputs(self, context: StageContext) -> Any:
        """Returns the backends, and what each builds for and with."""
        return {builder.name: builder.key() for builder in builders_for(context.recipe)}

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Builds every graph's engine with builder after builder."""
        graphs = _portable_graphs(context)
        builders = builders_for(context.recipe)
        written: list[Path] = []
        with collecting() as declined:
            for index, builder in enumerate(builders):
                written += builder.build(graphs, _part(report, index, len(builders)))
        return (*written, *write_declined(declined, context.declined(self.name)))


def _part(report: Report, index: int, builders: int) -> Report:
    """Shows one builder's progress as a part of the stage's."""

    def show(done: float, total: float, note: str) -> None:
        report(index + done / total, builders, note)

    return show
