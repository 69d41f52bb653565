"""Recipes: what to build, as frozen, checked values, and everything that follows from them without torch."""

from hidiff_export.recipe.recipe import Recipe, find_recipe, shipped_recipes

__all__ = ["Recipe", "find_recipe", "shipped_recipes"]
