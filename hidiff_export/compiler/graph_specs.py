"""What goes in and out of every graph of a build, by the recipe: what engines are checked against and manifests say."""

from __future__ import annotations

import json
from collections.abc import Mapping

from hidiff_export.checkpoints.stored_configs import CONFIG, read_config
from hidiff_export.compiler.stages.scheduler_tables import table_path
from hidiff_export.compiler.stages.stage import StageContext
from hidiff_export.families.graph_io import (
    controlnet_inputs,
    controlnet_outputs,
    most_skipped,
    phase_inputs,
    phase_outputs,
    text_encoder_inputs,
    text_encoder_outputs,
)
from hidiff_runtime.format.manifest import GraphRecord, Manifest, PhaseRecord
from hidiff_runtime.format.safetensors import SafetensorsFile
from hidiff_runtime.format.specs import TextEncoderRecord, VaeRecord
from hidiff_runtime.format.step_graph import LATENTS, step_inputs, step_outputs
from hidiff_runtime.phases import Phase
from hidiff_runtime.sampling.forecast import KEPT
from hidiff_runtime.sampling.scheduler_state import STATE
from hidiff_runtime.sampling.scheduler_table import SamplerTable


def phase_record(context: StageContext, phase: Phase) -> PhaseRecord:
    """Returns the record of a phase's graph, without engines."""
    recipe = context.recipe
    config = read_config(context.unet / CONFIG)
    size = (recipe.latent_height, recipe.latent_width)
    return PhaseRecord(
        phase=phase,
        graph=context.inside(context.graph(phase)),
        engines={},
        inputs=phase_inputs(
            config, recipe.unet_layout, phase, *size, recipe.batch_of(phase), **recipe.phase_options(phase)
        ),
        outputs=phase_outputs(
            config, recipe.unet_layout, phase, *size, recipe.batch_of(phase), reuse_depth=recipe.depth_of(phase)
        ),
    )


def controlnet_record(context: StageContext, *, unguided: bool = False) -> GraphRecord | None:
    """Returns the record of a graph of the ControlNet's, without engines; None where there is none.

    Args:
        context: of the bucket.
        unguided: whether of the one for phases without guidance.
    """
    if unguided not in context.controlled:
        return None
    recipe = context.recipe
    config = read_config(context.folder / "controlnet" / CONFIG)
    batch = recipe.batch if unguided else recipe.model_batch
    shape = (recipe.latent_height, recipe.latent_width, batch)
    return GraphRecord(
        graph=context.inside(context.controlnet_graph(unguided=unguided)),
        engines={},
        inputs=controlnet_inputs(config, *shape, prompt_tokens=recipe.prompt_tokens),
        outputs=controlnet_outputs(config, *shape),
    )


def step_records(context: StageContext) -> tuple[GraphRecord, ...]:
    """Returns the records of the step graphs, without engines: of the one after guided phases, which all bundles have,
    and of the one after the others, where there are any.
    """
    guided = phase_record(context, context.phases[0])
    latents = next(spec for spec in guided.inputs if spec.name == LATENTS)
    after = {phase.unguided: phase for phase in context.phases}
    records = []
    for unguided in sorted(after):
        noise_pred = phase_record(context, after[unguided]).outputs[0]
        due = (context.recipe.batch, noise_pred, latents, states(context))
        outputs = step_outputs(*due, unguided=len(after) > 1)
        path = context.inside(context.step_graph(unguided=unguided))
        records.append(GraphRecord(path, {}, step_inputs(*due), outputs))
    return tuple(records)


def text_encoder_records(context: StageContext) -> tuple[TextEncoderRecord, ...]:
    """Returns the records of the text encoders' graphs, without engines."""
    penultimate = context.recipe.family.is_sdxl
    return tuple(
        TextEncoderRecord(
            context.inside(context.text_encoder_graph(name)),
            {},
            text_encoder_inputs(),
            text_encoder_outputs(config, pooled=name == "text_encoder_2"),
            name=name,
            tokenizer=context.inside(context.tokenizer(name)),
            clip_skip=most_skipped(config, penultimate=penultimate),
        )
        for name, config in (
            (name, read_config(context.folder / name / CONFIG)) for name in context.recipe.text_encoders
        )
    )


def vae_record(context: StageContext) -> VaeRecord | None:
    """Returns the record of the VAE's graphs, without engines; None where the bundle has no VAE."""
    if not context.recipe.vae:
        return None
    config, tiles = read_config(context.folder / "vae" / CONFIG), context.recipe.tiles
    decoder, encoder = (context.inside(context.vae_graph(half)) for half in ("decoder", "encoder"))
    return VaeRecord(
        decoder=GraphRecord(decoder, {}, tiles.decoder_inputs(), tiles.decoder_outputs()),
        encoder=GraphRecord(encoder, {}, tiles.encoder_inputs(), tiles.encoder_outputs()),
        scaling_factor=config["scaling_factor"],
        overlap=tiles.overlap,
        preview=tuple(map(tuple, json.loads(context.preview.read_text(encoding="utf-8")))),
    )


def states(context: StageContext) -> int:
    """Returns how many states the recipe's samplers need at most, at least 1, by the tables that are there; where steps
    are forecast, the outputs that are kept for them too.
    """
    needed = [1]
    for sampler in context.recipe.sampler:
        with SafetensorsFile.open(table_path(context, sampler.value)) as table:
            needed.append(table.info("rows").shape[-1] - STATE)
    return max(needed) + (0 if context.recipe.forecast is None else KEPT)


def graph_records(context: StageContext) -> tuple[GraphRecord, ...]:
    """Returns the records of the bucket's own graphs, which engines are built from: phases in running order, then the
    others.
    """
    vae = vae_record(context) if context.has_vae else None
    controls = (controlnet_record(context, unguided=unguided) for unguided in context.controlled)
    return (
        *(phase_record(context, phase) for phase in context.phases),
        *(control for control in controls if control is not None),
        *step_records(context),
        *(text_encoder_records(context) if context.first else ()),
        *(() if vae is None else (vae.decoder, vae.encoder)),
    )


def bare_manifest(context: StageContext, tables: Mapping[str, SamplerTable], force_zeros: bool) -> Manifest:
    """Returns what a manifest says of recipe, configurations and tables, without engines, files and samples.

    Args:
        context: of the build, or of a finished bundle.
        tables: the recipe's, by name.
        force_zeros: the manifest's ``force_zeros_for_empty_prompt``, which the checkpoint says.
    """
    recipe = context.recipe
    # A scheduler need not run with every step count that was asked for.
    steps = set.intersection(*({*table.steps.tolist()} for table in tables.values()))
    return Manifest(
        tools={},
        recipe={},
        family=recipe.family.value,
        task=recipe.task.value,
        width=recipe.width,
        height=recipe.height,
        batch=recipe.batch,
        guidance=recipe.guidance,
        guidance_rescale=recipe.guidance_rescale or 0.0,
        forecast=recipe.forecast_record,
        force_zeros_for_empty_prompt=force_zeros,
        precision=recipe.precision.value,
        rule=context.rule,
        latent=recipe.latent_shape,
        windowed_blocks=recipe.unet_layout.windowed_blocks,
        phases=tuple(phase_record(context, phase) for phase in context.phases),
        samplers={sampler.value: context.inside(table_path(context, sampler.value)) for sampler in recipe.sampler},
        default_sampler=recipe.sampler[0].value,
        steps=tuple(sorted(steps)),
        weights={},
        files={},
        controlnet=controlnet_record(context),
        unguided_controlnet=controlnet_record(context, unguided=True),
        text_encoders=text_encoder_records(context),
        vae=vae_record(context),
    )
