"""The checkpoint becomes a weight store in the recipe's precision, with the configuration of its networks beside it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import Checkpoint, load
from hidiff_export.checkpoints.lora import fuse, lora_fingerprint, read_lora, settings_fingerprint
from hidiff_export.checkpoints.model_index import ModelIndex, read_model_index
from hidiff_export.checkpoints.sources import source_fingerprint
from hidiff_export.checkpoints.stored_configs import CONFIG, SCHEDULER_CONFIG, WEIGHTS
from hidiff_export.checkpoints.tokenizer import tokenizer_json
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.compiler.stages.stage import Report, Stage, StageContext
from hidiff_export.errors import CheckpointError
from hidiff_export.files import write_json
from hidiff_export.graph.float32_ops import precision_of
from hidiff_export.recipe import Recipe
from hidiff_export.scheduler_tables.noise_schedule import resolve_noise_schedule


class WeightsStage(Stage):
    """``weights.safetensors`` and ``config.json`` of each network, the tokenizers and the scheduler's configuration."""

    name = "weights"
    title = "weights"
    needs = ()

    def inputs(self, context: StageContext) -> Any:
        """Returns the checkpoint by its content, not its path, the noise schedule, and the precision of the weights."""
        recipe = context.recipe
        schedule, index = resolve_noise_schedule(recipe), model_index(recipe)
        for notice in (*index.notices, *schedule.notices):
            context.notice(notice)
        hashes: dict[Path, str] = {}
        return {
            "sources": {
                network.value: source_fingerprint(source, network, hashes) for network, source in _sources(recipe)
            },
            "lora": [
                [lora_fingerprint(Path(lora.path)), settings_fingerprint(Path(lora.path)), lora.scale]
                for lora in recipe.lora
            ],
            "tokenizers": [sha256(text.encode()).hexdigest() for text in tokenizers(recipe).values()],
            "scheduler": schedule.config,
            "zeros": index.force_zeros_for_empty_prompt,
            "family": recipe.family.value,
            "task": recipe.task.value,
            "width": recipe.unet_width.value,
            "precision": recipe.precision.stored.value,
        }

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Reads, rounds and writes the tensors one by one."""
        recipe = context.recipe
        # All are looked at before the first is written, so that a checkpoint that lacks one is refused at once.
        networks = checkpoints(recipe)
        scheduler = context.folder / SCHEDULER_CONFIG
        scheduler.parent.mkdir(parents=True, exist_ok=True)
        write_json(scheduler, resolve_noise_schedule(recipe).config)
        written = [scheduler]
        for network, checkpoint in networks.items():
            for notice in checkpoint.notices:
                context.notice(notice)
            folder = context.folder / network.value
            folder.mkdir(exist_ok=True)
            progress = partial(_show, report, network.value)
            write_json(folder / CONFIG, {**network.written_as, **checkpoint.config})
            precision = precision_of(network.value, recipe.precision)
            WeightStore.write(checkpoint.state_dict, folder / WEIGHTS, precision, progress)
            written += [folder / CONFIG, folder / WEIGHTS]
        for name, text in tokenizers(recipe).items():
            context.tokenizer(name).write_text(text, encoding="utf-8")
            written.append(context.tokenizer(name))
        return tuple(written)


def checkpoints(recipe: Recipe) -> dict[Component, Checkpoint]:
    """Returns the networks of a bundle, LoRA files fused; nothing is read but names and shapes.

    Raises:
        CheckpointError: a checkpoint lacks a network, is of another pipeline, or it or a LoRA is broken or another
            family's.
    """
    model_index(recipe)
    kind = (recipe.family, recipe.task, recipe.unet_width)
    loras = [read_lora(Path(lora.path), lora.scale, *kind) for lora in recipe.lora]
    sources = dict(_sources(recipe))
    for lora in loras:
        if not lora.pairs.keys() & sources.keys():
            raise CheckpointError(
                "A LoRA changes nothing in the bundle, which has no text encoders.",
                given=lora.path,
                advice="Set text: true in the recipe, or leave the LoRA out.",
            )
    found = {network: fuse(network, load(network, source, *kind), loras) for network, source in sources.items()}
    unet = found[Component.UNET]
    told = tuple(notice for lora in loras for notice in lora.notices)
    return {**found, Component.UNET: unet._replace(notices=(*told, *unet.notices))}


def model_index(recipe: Recipe) -> ModelIndex:
    """Returns what the recipe's checkpoint says of its pipeline. Raises CheckpointError where that is no bundle's."""
    return read_model_index(recipe.source, recipe.family, [network for network, _ in _sources(recipe)])


def _sources(recipe: Recipe) -> Iterator[tuple[Component, str]]:
    """Yields the networks of a bundle, and the checkpoint that each comes from."""
    yield Component.UNET, recipe.source
    if recipe.controlnet is not None:
        yield Component.CONTROLNET, recipe.controlnet
    yield from ((Component(name), recipe.source) for name in recipe.text_encoders)
    if recipe.vae:
        yield Component.VAE, recipe.source


def tokenizers(recipe: Recipe) -> dict[str, str]:
    """Returns each text encoder's ``tokenizer.json``. Raises CheckpointError where a checkpoint has none."""
    return {
        name: tokenizer_json(recipe.source, Component(name), recipe.family, recipe.unet_width)
        for name in recipe.text_encoders
    }


def _show(report: Report, network: str, done: int, total: int) -> None:
    report(done, total, network)
