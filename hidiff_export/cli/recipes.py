"""`hidiff-export recipes`: what ships with the package, and what a recipe may say."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hidiff_export.cli.console import console
from hidiff_export.cli.options import recipe_argument


@click.group(short_help="List and show recipes, print their schema.")
def recipes() -> None:
    """List and show recipes, and print their JSON Schema."""


@recipes.command(
    "list",
    epilog="""\b
Example:
  hidiff-export recipes list
""",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_recipes(as_json: bool) -> None:
    """List the recipes that come with the package."""
    from hidiff_export.recipe import Recipe, shipped_recipes

    loaded = [(Recipe.load(path), _purpose(path)) for path in shipped_recipes().values()]
    if as_json:
        click.echo(json.dumps([recipe.to_dict() | {"purpose": purpose} for recipe, purpose in loaded], indent=1))
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("recipe", "family", "pixels"):
        table.add_column(column, no_wrap=True)
    table.add_column("what it is for")
    for recipe, purpose in loaded:
        others = f" +{len(recipe.shapes) - 1}" if recipe.shapes[1:] else ""
        table.add_row(recipe.name, recipe.family.value, f"{recipe.width}x{recipe.height}{others}", purpose)
    console().print(table)


@recipes.command(
    short_help="Print a recipe after checking it.",
    epilog="""\b
Examples:
  hidiff-export recipes show sdxl-2048 > my-recipe.yaml
  hidiff-export recipes show sdxl-2048 --json
""",
)
@recipe_argument
@click.option("--json", "as_json", is_flag=True, help="Print every value, defaults included, and the fingerprint.")
def show(recipe: str, as_json: bool) -> None:
    """Print RECIPE (a file, or the name of a shipped one) as it is written, after checking it."""
    from hidiff_export.recipe import Recipe, find_recipe

    loaded = Recipe.load(recipe)
    if as_json:
        click.echo(json.dumps(loaded.to_dict() | {"fingerprint": loaded.fingerprint()}, indent=1))
    else:
        click.echo(find_recipe(recipe).read_text(encoding="utf-8"), nl=False)


@recipes.command(
    short_help="Print the JSON Schema of a recipe.",
    epilog="""\b
Example:
  hidiff-export recipes schema > recipe.schema.json
""",
)
def schema() -> None:
    """Prints the JSON Schema of a recipe, with which editors complete and check one."""
    from hidiff_export.recipe.json_schema import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=1))


def _purpose(path: Path) -> str:
    """Returns the comment on a recipe's first line."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
