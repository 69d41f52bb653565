"""Each phase becomes one static ONNX graph that points into the weight store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hidiff_export.graph.portable import write_graph
from hidiff_export.graph.weights import PRECISIONS, WeightStore
from hidiff_export.model.load import build_unet
from hidiff_export.model.phase_unet import PhaseUNet
from hidiff_export.stages import Report, StageContext
from hidiff_export.stages.weights import CONFIG, WEIGHTS


class Graphs:
    """``unet/<phase>.onnx``, one a phase."""

    name = "graphs"
    title = "phase graphs"
    needs = ("weights",)

    def inputs(self, context: StageContext) -> Any:
        """The phases, the places where they act and the shapes."""
        recipe = context.recipe
        return {
            "phases": [phase.name for phase in context.phases],
            "windowed_blocks": list(recipe.layout.windowed_blocks),
            "latent": list(recipe.latent_shape),
            "model_batch": recipe.model_batch,
        }

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Traces phase after phase over the same mapped weights."""
        recipe = context.recipe
        store = WeightStore.open(context.unet / WEIGHTS)
        config = json.loads((context.unet / CONFIG).read_text(encoding="utf-8"))
        _, dtype = PRECISIONS[store.precision]
        unet = build_unet(config, store.state_dict(), dtype)
        written = []
        for index, phase in enumerate(context.phases):
            report(index, len(context.phases), phase.name)
            path = context.graph(phase)
            module = PhaseUNet(unet, recipe.layout, phase, recipe.latent_height, recipe.latent_width)
            write_graph(module, recipe.model_batch, store, path)
            written.append(path)
        return tuple(written)
