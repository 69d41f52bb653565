"""Each phase becomes one static ONNX graph that points into the weight store; so do the other networks.

The step graph, which has no weights, comes beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import load_stored
from hidiff_export.checkpoints.stored_configs import WEIGHTS
from hidiff_export.checkpoints.weight_store import PRECISIONS, WeightStore
from hidiff_export.compiler.graph_specs import states, step_records
from hidiff_export.compiler.stages.stage import Report, Stage, StageContext
from hidiff_export.files import write_json
from hidiff_export.graph.declined import collecting, write_declined
from hidiff_export.graph.portable import write_graph
from hidiff_export.graph.step_graph import write_step_graph
from hidiff_export.modules.controlnet import ControlNetModule
from hidiff_export.modules.graph_module import GraphModule
from hidiff_export.modules.latent_preview import fit_preview
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.modules.text_encoder import TextEncoderModule
from hidiff_export.modules.vae import VaeDecoder, VaeEncoder


class GraphsStage(Stage):
    """``unet/<phase>.onnx``, one a phase, ``step/step.onnx``, and a graph for each other network that there is."""

    name = "graphs"
    title = "graphs"
    needs = ("weights",)

    def inputs(self, context: StageContext) -> Any:
        """Returns the phases, the places where they act, the shapes, and how much the samplers remember."""
        recipe = context.recipe
        return {
            "phases": [phase.name for phase in context.phases],
            "controlnet": recipe.controlnet is not None,
            "text_encoders": list(recipe.text_encoders) if context.first else [],
            "tile": [recipe.tiles.height, recipe.tiles.width] if context.has_vae else None,
            "windowed_blocks": list(recipe.unet_layout.windowed_blocks),
            "latent": list(recipe.latent_shape),
            "model_batch": recipe.model_batch,
            "prompt_tokens": recipe.prompt_tokens,
            "states": states(context),
            **({} if (reuse := context.rule.reuse) is None else {"reuse_depth": reuse.depth}),
        }

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Traces phase after phase over the same mapped weights, then the other networks."""
        written: list[Path] = []
        with collecting() as declined:
            for module, model_batch, store, path in _modules(context):
                report(len(written), len(context.graphs), module.title)
                write_graph(module, model_batch, store, path)
                written.append(path)
        return (*written, *write_beside(context), *write_declined(declined, context.declined(self.name)))


def write_beside(context: StageContext) -> tuple[Path, ...]:
    """Writes what comes with the graphs and is not traced: the step graph, and the factors of previews."""
    written = []
    for record in step_records(context):
        path = context.folder / record.graph
        path.parent.mkdir(exist_ok=True)
        write_step_graph(record, path)
        written.append(path)
    if not (context.recipe.vae and context.first):
        return tuple(written)
    _, vae = _stored(context, Component.VAE)
    write_json(context.preview, fit_preview(vae))
    return (*written, context.preview)


def _modules(context: StageContext) -> Iterator[tuple[GraphModule, int, WeightStore, Path]]:
    """Yields every network with its batch, its weights and its graph's path; one network is in memory at a time."""
    recipe = context.recipe
    size = (recipe.latent_height, recipe.latent_width)
    store, unet = _stored(context, Component.UNET)
    for phase in context.phases:
        phase_unet = PhaseUNet(unet, recipe.unet_layout, phase, *size, **recipe.phase_options(phase))
        yield phase_unet, recipe.batch_of(phase), store, context.traced(phase)
    for unguided in context.controlled:
        store, controlnet = _stored(context, Component.CONTROLNET)
        control = ControlNetModule(controlnet, *size, prompt_tokens=recipe.prompt_tokens)
        batch = recipe.batch if unguided else recipe.model_batch
        yield control, batch, store, context.controlnet_graph(unguided=unguided)
    for name in recipe.text_encoders if context.first else ():
        store, encoder = _stored(context, Component(name))
        text_encoder = TextEncoderModule(encoder, penultimate=recipe.family.is_sdxl)
        yield text_encoder, 1, store, context.text_encoder_graph(name)
    if context.has_vae:
        store, vae = _stored(context, Component.VAE)
        yield VaeDecoder(vae, recipe.tiles), 1, store, context.vae_graph("decoder")
        yield VaeEncoder(vae, recipe.tiles), 1, store, context.vae_graph("encoder")


def _stored(context: StageContext, component: Component) -> tuple[WeightStore, Any]:
    """Returns a network's weight store, and the network over it."""
    store = WeightStore.open(context.folder / component.value / WEIGHTS)
    _, dtype = PRECISIONS[store.precision]
    return store, load_stored(component, store, dtype)
