"""The recipes that come with the package, and how one is found by its name or path."""

from __future__ import annotations

from pathlib import Path

from hidiff_export.errors import RecipeError
from hidiff_export.recipe.yaml_source import nearest


def shipped_recipes() -> dict[str, Path]:
    """Returns the recipes that come with the package, by name."""
    package = Path(__file__).parents[1]
    # A wheel carries them inside the package; a checkout keeps them beside it.
    folder = next(place for place in (package / "recipes", package.parent / "recipes") if place.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str | Path) -> Path:
    """Returns the file of a recipe given by path or by shipped name.

    Raises:
        RecipeError: it is neither.
    """
    shipped = shipped_recipes()
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    path = Path(recipe)
    if path.is_file() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    raise RecipeError(
        "There is no such recipe.",
        given=str(recipe),
        advice=f"{nearest(str(recipe), shipped)}Give a YAML file, or one of {', '.join(shipped)}.",
    )
