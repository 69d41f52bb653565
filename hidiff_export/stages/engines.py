"""Each portable graph becomes the engine that the recipe's backend runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hidiff_export.build.onnxruntime import OnnxRuntimeBuilder
from hidiff_export.build.protocol import Builder
from hidiff_export.stages import Report, StageContext

_BUILDERS: dict[str, type[Builder]] = {"onnxruntime": OnnxRuntimeBuilder}


def builder_for(context: StageContext) -> Builder:
    """The builder of the recipe's backend."""
    return _BUILDERS[context.recipe.backend.value]()


class Engines:
    """The engines, beside the graphs they are built from."""

    name = "engines"
    title = "engines"
    needs = ("weights", "graphs")

    def inputs(self, context: StageContext) -> Any:
        """The backend and what it builds for."""
        return {"backend": context.recipe.backend.value, "targets": list(context.recipe.targets)}

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Builds engine after engine."""
        builder = builder_for(context)
        written = []
        for index, graph in enumerate(context.graphs):
            report(index, len(context.graphs), graph.stem)
            engine = builder.engine_path(graph)
            builder.build(graph, engine)
            written.append(engine)
        return tuple(written)
