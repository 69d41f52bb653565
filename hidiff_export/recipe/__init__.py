"""Recipes: what to build, as frozen, checked values, and everything that follows from them without torch."""

from hidiff_export.recipe.library import find_recipe, shipped_recipes
from hidiff_export.recipe.recipe import Recipe

__all__ = ["Recipe", "find_recipe", "shipped_recipes"]
