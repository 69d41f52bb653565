"""Rescaled guidance beside diffusers' own: models that predict v with zero terminal SNR, which it was made for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest

from hidiff_export.families.family import Family, default_scheduler
from hidiff_export.recipe import Recipe
from hidiff_export.scheduler_tables import noise_schedule
from hidiff_runtime.format.manifest import Manifest
from tests.parity.pictures import Picture, diffusers_pipeline, expected, generated, module_bundle, opened
from tests.parity.test_pictures import ASKED, BOUND, PROMPT, assert_alike, recipe, snr_db

ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
RESCALE = 0.7
RECIPES = {
    "sd21": recipe("sd21", sampler="ddim", guidance_rescale=RESCALE),
    "sd21, two pictures": recipe("sd21", sampler="ddim", batch=2, guidance_rescale=RESCALE),
    "sdxl": recipe("sdxl", sampler=["ddim", "euler"], guidance_rescale=RESCALE),
}
Folders = Callable[[str], Path]


def schedule(family: Family) -> dict[str, Any]:
    return {**default_scheduler(family)[1], **ZERO_SNR}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The bundle of a recipe by its name, as of a checkpoint that says how it was trained."""
    base = tmp_path_factory.mktemp("rescaled")

    @cache
    def of(name: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(noise_schedule, "find_scheduler_config", lambda _source: schedule(RECIPES[name].family))
            return module_bundle(RECIPES[name], base / name.replace(" ", "-"))

    return of


def asked(recipe: Recipe, **changes: Any) -> dict[str, Any]:
    prompts = {"prompt": [PROMPT, "a harbour"], "negative_prompt": ["", "fog"]} if recipe.batch == 2 else {}
    return {**ASKED, **prompts, "steps": recipe.steps[0], **changes}


def reference(recipe: Recipe, sampler: str, rescale: float, **changes: Any) -> Picture:
    kind = f"StableDiffusion{'XL' if recipe.family.is_sdxl else ''}Pipeline"
    classes = {"ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}
    pipe = diffusers_pipeline(recipe, kind, classes[sampler].from_config(schedule(recipe.family)))
    return expected(pipe, recipe, {**asked(recipe, **changes), "guidance_rescale": rescale})


@pytest.mark.parametrize(("name", "sampler"), [(name, "ddim") for name in RECIPES] + [("sdxl", "euler")])
def test_a_bundles_own_rescale_gives_diffusers_picture(bundle: Folders, name: str, sampler: str) -> None:
    recipe, folder = RECIPES[name], bundle(name)
    assert Manifest.read(folder).guidance_rescale == RESCALE
    due = reference(recipe, sampler, RESCALE)
    with opened(folder, recipe) as pipe:
        assert_alike(due, generated(pipe, **asked(recipe), sampler=sampler))
        plain = generated(pipe, **asked(recipe), sampler=sampler, guidance_rescale=0.0)
        assert snr_db(due, plain) < BOUND
        assert snr_db(due, generated(pipe, **asked(recipe), sampler=sampler, guidance_rescale=0.6)) < BOUND
    assert_alike(reference(recipe, sampler, 0.0), plain)


def test_with_guidance_off_it_does_nothing(bundle: Folders) -> None:
    recipe = RECIPES["sdxl"]
    due = reference(recipe, "ddim", RESCALE, guidance_scale=1.0)
    with opened(bundle("sdxl"), recipe) as pipe:
        assert_alike(due, generated(pipe, **asked(recipe, guidance_scale=1.0), sampler="ddim"))
