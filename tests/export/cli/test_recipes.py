"""`recipes` on the command line."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from hidiff_export.cli import main
from hidiff_export.recipe import Recipe, shipped_recipes
from hidiff_export.recipe.json_schema import recipe_schema


def _recipes(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(main, ["recipes", *arguments])


def test_list_names_every_recipe_and_its_purpose() -> None:
    result = _recipes("list")
    assert result.exit_code == 0
    assert "…" not in result.output
    for name in shipped_recipes():
        assert name in result.output
    assert "SDXL at 16x its training pixels." in result.output
    assert "1024x1024 +4" in result.output


def test_list_as_json() -> None:
    listed = json.loads(_recipes("list", "--json").stdout)
    assert [recipe["name"] for recipe in listed] == list(shipped_recipes())
    assert all(recipe.pop("purpose") for recipe in listed)
    assert listed == [Recipe.load(name).to_dict() for name in shipped_recipes()]


@pytest.mark.parametrize("name", ["demo", "sdxl-controlnet-2048"])
def test_show_prints_the_file(name: str) -> None:
    assert _recipes("show", name).stdout == shipped_recipes()[name].read_text()


def test_show_as_json_resolves_every_value() -> None:
    shown = json.loads(_recipes("show", "demo", "--json").stdout)
    assert shown.pop("fingerprint") == Recipe.load("demo").fingerprint()
    assert Recipe.from_dict(shown) == Recipe.load("demo")


def test_schema() -> None:
    assert json.loads(_recipes("schema").stdout) == recipe_schema()


def test_show_refuses_what_is_not_there() -> None:
    result = _recipes("show", "dem")
    assert result.exit_code == 2
    assert "Did you mean demo?" in result.stderr
