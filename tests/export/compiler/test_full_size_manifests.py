"""Every shipped recipe at full size: a manifest that the runtime opens, without a weight being made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hidiff_export.compiler import graph_specs as stage_records
from hidiff_export.compiler.graph_specs import bare_manifest, step_records
from hidiff_export.compiler.stages.stage import StageContext
from hidiff_export.families import family
from hidiff_export.recipe import Recipe, shipped_recipes
from hidiff_runtime import BundleError
from hidiff_runtime.format.manifest import FileDigest, Manifest

SAMPLER_STATES = 4


def manifest(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """As the end of a build assembles it, from configurations alone."""
    networks: dict[str, Any] = {
        "unet": recipe.unet_config(),
        **family.text_encoder_configs(recipe.family, recipe.unet_width),
    }
    networks["vae"] = family.vae_config(recipe.family, recipe.unet_width)
    if recipe.controlnet is not None:
        networks["controlnet"] = recipe.controlnet_config()
    for name, config in networks.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "vae/preview.json").write_text(json.dumps([[0.0] * 3] * 5), encoding="utf-8")
    monkeypatch.setattr(stage_records, "states", lambda _context: SAMPLER_STATES)
    context = StageContext(recipe, folder)
    tables: dict[str, Any] = {name.value: SimpleNamespace(steps=np.array(recipe.steps)) for name in recipe.sampler}
    bare = replace(bare_manifest(context, tables, True), step=step_records(context)[0])
    stores = {name: f"{name}/weights.safetensors" for name in networks}
    whole = replace(bare, weights=stores)
    # Of more bytes than int32 counts, as SDXL's are.
    return replace(whole, files={path: FileDigest(10_269_600_000, "a" * 64) for _, path in whole.paths()})


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_shipped_recipe_gives_a_manifest_that_opens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(name, ())
    made = manifest(recipe, tmp_path, monkeypatch)
    read = Manifest.from_json(json.loads(json.dumps(made.to_json())))
    assert read == made
    assert {spec.shape[0] for phase in read.phases for spec in phase.outputs} == {recipe.model_batch}


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 4096, "height": 4096, "batch": 4},
        {"width": 8192, "height": 8192},
        {"width": 1024, "height": 1024, "batch": 64},
        {"width": 1024, "height": 1024, "batch": 8, "prompt_chunks": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["sd15-2048", "sdxl-2048"])
def test_what_is_largest_opens_too(
    name: str, changes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(name, tuple(f"{key}={value}" for key, value in changes.items()))
    made = manifest(recipe, tmp_path, monkeypatch)
    assert Manifest.from_json(made.to_json()) == made


def test_a_picture_of_another_size_than_its_graphs_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = manifest(Recipe.load("sdxl-2048", ()), tmp_path, monkeypatch)
    with pytest.raises(BundleError, match="latent must be channels, and a latent for each 8 pixels"):
        Manifest.from_json(replace(made, width=made.width + 8).to_json())
