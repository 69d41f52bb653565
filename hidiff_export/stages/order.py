"""The stages in their order, and the manifest that lists what they made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hidiff_export.model.lora import lora_fingerprint
from hidiff_export.recipe import Recipe
from hidiff_export.stages import Stage, StageContext
from hidiff_export.stages.engines import Engines, with_engines
from hidiff_export.stages.graphs import Graphs
from hidiff_export.stages.quantisation import Quantisation
from hidiff_export.stages.records import (
    controlnet_record,
    phase_record,
    step_record,
    text_encoder_records,
    vae_record,
)
from hidiff_export.stages.reference import FOLDER as REFERENCE_FOLDER
from hidiff_export.stages.reference import Reference
from hidiff_export.stages.samplers import FOLDER, Samplers
from hidiff_export.stages.weights import WEIGHTS, Weights, model_index
from hidiff_export.versions import tool_versions
from hidiff_runtime.manifest import FileRecord, Manifest
from hidiff_runtime.proof.samples import INDEX
from hidiff_runtime.sampler import SamplerTable

# The reference comes last: it takes longest, and whatever else is wrong shows before it.
STAGES: tuple[Stage, ...] = (Weights(), Samplers(), Graphs(), Engines(), Reference())
QUANTISED_STAGES: tuple[Stage, ...] = (
    Weights(),
    Samplers(),
    Graphs(),
    Reference(),
    Quantisation(),
    Engines(Quantisation.name),
)
"""Those of a quantised recipe: ranges are measured on what the reference was given."""


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages that a recipe takes."""
    return QUANTISED_STAGES if recipe.precision.quantised else STAGES


def assemble_manifest(context: StageContext, files: Mapping[str, FileRecord]) -> Manifest:
    """The manifest of a finished build.

    Args:
        context: the build.
        files: every file the stages wrote, by path relative to the bundle.
    """
    recipe, control = context.recipe, controlnet_record(context)
    samplers = {name.value: f"{FOLDER}/{name.value}.safetensors" for name in recipe.sampler}
    vae = vae_record(context)
    networks = ("unet", "controlnet", *recipe.text_encoders, "vae")
    stores = {name: path for name in networks if (path := f"{name}/{WEIGHTS}") in files}
    return Manifest(
        tools=tool_versions(),
        recipe=recipe.to_dict(),
        family=recipe.family.value,
        task=recipe.task.value,
        width=recipe.width,
        height=recipe.height,
        batch=recipe.batch,
        guidance=recipe.guidance,
        guidance_rescale=recipe.guidance_rescale or 0.0,
        force_zeros_for_empty_prompt=model_index(recipe).force_zeros_for_empty_prompt,
        precision=recipe.precision.value,
        rule=context.rule,
        latent=recipe.latent_shape,
        windowed_blocks=recipe.unet_layout.windowed_blocks,
        phases=tuple(with_engines(context, phase_record(context, phase)) for phase in context.phases),
        samplers=samplers,
        default_sampler=recipe.sampler[0].value,
        steps=_tabulated(context.folder, samplers),
        weights=stores,
        controlnet=None if control is None else with_engines(context, control),
        step=with_engines(context, step_record(context)),
        text_encoders=tuple(with_engines(context, record) for record in text_encoder_records(context)),
        vae=None
        if vae is None
        else replace(vae, decoder=with_engines(context, vae.decoder), encoder=with_engines(context, vae.encoder)),
        files=files,
        reference=f"{REFERENCE_FOLDER}/{INDEX}",
        fingerprints={
            "recipe": recipe.fingerprint(),
            "weights": files[stores["unet"]].sha256,
            **{name: files[path].sha256 for name, path in stores.items() if name != "unet"},
            **{f"lora.{index}": lora_fingerprint(Path(lora.path)) for index, lora in enumerate(recipe.lora)},
        },
    )


def _tabulated(folder: Path, samplers: Mapping[str, str]) -> tuple[int, ...]:
    """The step counts that every table holds; a scheduler need not run with all that were asked for."""
    tables = [set(SamplerTable.read(folder / path).steps.tolist()) for path in samplers.values()]
    return tuple(sorted(set.intersection(*tables)))
