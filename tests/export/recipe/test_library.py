"""The recipes that ship: the promised ones, each what its name says, found by name or path."""

from __future__ import annotations

from pathlib import Path

import pytest

from hidiff_export.families.family import default_scheduler
from hidiff_export.recipe import Recipe, find_recipe, shipped_recipes
from hidiff_export.recipe.field_types import TimestepSpacing
from hidiff_export.scheduler_tables.diffusers_schedulers import build_scheduler

SHIPPED = shipped_recipes()


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
    }


@pytest.mark.parametrize("name", SHIPPED)
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
