"""The first layers of a phase as a graph of their own, where a bundle leaves a choice of backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hidiff_export.compiler.stages.stage import Report, Stage, StageContext
from hidiff_export.graph.leading_layers import leading_layers_signature, write_leading_layers
from hidiff_export.recipe import Recipe
from hidiff_runtime.format.manifest import GraphRecord
from hidiff_runtime.phases import Phase


class TimingGraphStage(Stage):
    """``unet/timing.onnx``, from the phase that ends the first bucket's runs.

    Args:
        needs: the stages that make the phases' graphs.
    """

    name = "timing"
    title = "timing graph"

    def __init__(self, *needs: str) -> None:
        self.needs = needs

    def inputs(self, context: StageContext) -> Any:
        """Returns the phase."""
        return {"phase": self._phase(context).name}

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Cuts the graph out of the phase's."""
        report(0, 1, "")
        write_leading_layers(context.graph(self._phase(context)), context.timing_graph)
        return (context.timing_graph,)

    def _phase(self, context: StageContext) -> Phase:
        return [phase for phase in context.phases if not phase.shallow][-1]


def is_timed(recipe: Recipe) -> bool:
    """Returns whether a bundle of the recipe has a timing graph: where the machine that serves has to choose."""
    return len(recipe.backend) > 1


def timing_record(context: StageContext) -> GraphRecord | None:
    """Returns the record of the timing graph, without engines; None where the bundle has none."""
    if not (context.first and is_timed(context.recipe) and context.timing_graph.is_file()):
        return None
    return GraphRecord(context.inside(context.timing_graph), {}, *leading_layers_signature(context.timing_graph))
