"""The recipes that ship: the promised ones, each what its name says, found by name or path."""

from __future__ import annotations

from pathlib import Path

import pytest

from hidiff_export.families.family import Family, Task, default_scheduler
from hidiff_export.families.hidiffusion_rules import Layout, phase_rule
from hidiff_export.recipe import Recipe, find_recipe, shipped_recipes
from hidiff_export.recipe.field_types import TimestepSpacing
from hidiff_export.recipe.run_plan import RunPlan
from hidiff_export.scheduler_tables.diffusers_schedulers import build_scheduler

SHIPPED = shipped_recipes()
BUCKETS = [name for name in SHIPPED if "-buckets" in name]
TRAINED = {
    "sd15": [(512, 512), (512, 768), (768, 512)],
    "sdxl": [(1024, 1024), (832, 1216), (1216, 832), (896, 1152), (1152, 896)],
}
"""Sizes that the families learned, as the recipes list them."""


def test_the_promised_recipes_ship() -> None:
    assert set(SHIPPED) == {
        "demo",
        "tiny",
        "sd15-1024",
        "sd15-2048",
        "sd15-1536x1024",
        "sd21-1024",
        "sd21-2048",
        "sdxl-2048",
        "sdxl-2048x1536",
        "sdxl-4096",
        "sdxl-turbo-1024",
        "sdxl-inpainting-2048",
        "playground-2048",
        "sd15-controlnet-1024",
        "sd15-controlnet-img2img-1024",
        "sd21-controlnet-1024",
        "sdxl-controlnet-2048",
        "sdxl-controlnet-img2img-2048",
        "sdxl-hyper-4step-2048",
        "sdxl-hyper-8step-2048",
        "sdxl-lightning-4step-2048",
        "sdxl-lightning-8step-2048",
        "sd15-buckets",
        "sd15-buckets-1.5x",
        "sd15-buckets-2x",
        "sdxl-buckets",
        "sdxl-buckets-1.5x",
        "sdxl-buckets-2x",
    }


@pytest.mark.parametrize("name", sorted(SHIPPED.keys() - BUCKETS))
def test_a_shipped_recipe_is_what_its_name_says(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    if name in ("demo", "tiny"):
        assert recipe.unet_width.value == name
        return
    family, *_, size = name.split("-")
    width, _, height = size.partition("x")
    assert recipe.family.value.startswith(family)
    assert (recipe.width, recipe.height) == (int(width), int(height or width))


@pytest.mark.parametrize("name", BUCKETS)
def test_a_recipe_of_several_sizes_has_those_of_its_family_times_what_its_name_says(name: str) -> None:
    recipe = Recipe.load(name)
    family, times = name.split("-")[0], float(name.partition("-buckets-")[2].removesuffix("x") or 1)
    trained = TRAINED[family]
    assert recipe.family.value == family
    assert (recipe.width, recipe.height) == (times * trained[0][0], times * trained[0][0])
    for (width, height, batch), (usual_width, usual_height) in zip(recipe.shapes, trained, strict=True):
        assert (width, height) == pytest.approx((usual_width * times, usual_height * times), rel=0.03)
        assert width % 64 == height % 64 == batch - 1 == 0


@pytest.mark.parametrize("name", BUCKETS)
def test_hidiffusion_acts_beyond_the_training_size_alone_and_on_even_feature_maps(name: str) -> None:
    usual = Family(name.split("-")[0])
    for bucket in Recipe.load(name).buckets:
        phases = RunPlan(bucket, 50).phases
        assert all(not window.resized for phase in phases for window in phase.geometry.windows)
        if name.endswith("x"):
            assert bucket.phase_rule() == phase_rule(usual, Task.TEXT_TO_IMAGE, bucket.width, bucket.height)
            assert bucket.unet_layout == Layout.of(usual)
        else:
            assert (RunPlan(bucket, 50).saving, bucket.unet_layout.windowed_blocks) == (1, ())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_says_what_it_is_for(name: str) -> None:
    assert SHIPPED[name].read_text().startswith("# ")


def test_a_recipe_is_found_by_name_or_by_path(tmp_path: Path) -> None:
    assert find_recipe("demo") == SHIPPED["demo"]
    path = tmp_path / "demo"
    path.write_text(SHIPPED["demo"].read_text())
    assert find_recipe(path) == path


@pytest.mark.parametrize("name", [name for name in SHIPPED if "step" in name])
def test_a_recipe_for_few_steps_begins_at_the_end_and_names_its_lora(name: str) -> None:
    recipe = Recipe.load(name)
    (steps,) = recipe.steps
    assert f"-{steps}step-" in name
    assert f"{steps}step" in recipe.lora[0].path
    assert (recipe.guidance, recipe.timestep_spacing) == (False, TimestepSpacing.TRAILING)
    scheduler = build_scheduler(recipe.sampler[0].value, {**default_scheduler(recipe.family)[1], **TRAILING})
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps[0] == 999


TRAILING = {"timestep_spacing": "trailing"}
