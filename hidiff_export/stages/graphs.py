"""Each phase becomes one static ONNX graph that points into the weight store; so does the ControlNet.

The step graph, which has no weights, comes beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hidiff_export.graph.portable import write_graph
from hidiff_export.graph.step import write_step_graph
from hidiff_export.graph.weights import PRECISIONS, WeightStore
from hidiff_export.model.controlnet import ControlNetModule
from hidiff_export.model.load import build_controlnet, build_unet
from hidiff_export.model.phase_unet import PhaseUNet
from hidiff_export.stages import Report, StageContext
from hidiff_export.stages.records import states, step_record
from hidiff_export.stages.weights import CONFIG, WEIGHTS


class Graphs:
    """``unet/<phase>.onnx``, one a phase, ``controlnet/controlnet.onnx`` if there is one, and ``step/step.onnx``."""

    name = "graphs"
    title = "graphs"
    needs = ("weights",)

    def inputs(self, context: StageContext) -> Any:
        """The phases, the places where they act, the shapes, and how much the samplers remember."""
        recipe = context.recipe
        return {
            "phases": [phase.name for phase in context.phases],
            "controlnet": recipe.controlnet is not None,
            "windowed_blocks": list(recipe.unet_layout.windowed_blocks),
            "latent": list(recipe.latent_shape),
            "model_batch": recipe.model_batch,
            "states": states(context),
        }

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Traces phase after phase over the same mapped weights, then the ControlNet."""
        recipe = context.recipe
        size = (recipe.latent_height, recipe.latent_width)
        store, unet = _stored(context.unet, build_unet)
        for index, phase in enumerate(context.phases):
            report(index, len(context.graphs), phase.name)
            module = PhaseUNet(unet, recipe.unet_layout, phase, *size)
            write_graph(module, recipe.model_batch, store, context.traced(phase))
        if recipe.controlnet is not None:
            report(len(context.phases), len(context.graphs), "ControlNet")
            store, controlnet = _stored(context.controlnet, build_controlnet)
            control_module = ControlNetModule(controlnet, *size)
            write_graph(control_module, recipe.model_batch, store, context.controlnet_graph)
        context.step_graph.parent.mkdir(exist_ok=True)
        write_step_graph(step_record(context), context.step_graph)
        others = context.graphs[len(context.phases) :]
        return (*map(context.traced, context.phases), *others)


def _stored(folder: Path, build: Callable[..., Any]) -> tuple[WeightStore, Any]:
    """A network's weight store, and the network over it."""
    store = WeightStore.open(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    _, dtype = PRECISIONS[store.precision]
    return store, build(config, store.state_dict(), dtype)
