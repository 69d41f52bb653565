"""The JSON Schema: it takes what a recipe may say, and refuses the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import hidiff_export
from hidiff_export.recipe import Recipe, shipped_recipes
from hidiff_export.recipe.json_schema import recipe_schema

SHIPPED = shipped_recipes()
LEAST: dict[str, Any] = {"family": "sdxl", "source": "random:0", "width": 2048, "height": 1024}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_fits_the_schema(name: str) -> None:
    jsonschema.validate(yaml.safe_load(SHIPPED[name].read_text()), recipe_schema())


def test_the_shipped_schema_is_the_generated_one() -> None:
    shipped = Path(hidiff_export.__file__).parent / "recipe.schema.json"
    assert json.loads(shipped.read_text()) == recipe_schema(), "run: hidiff-export recipes schema > " + str(shipped)


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())


@pytest.mark.parametrize(
    "values",
    [
        {"windth": 1024},
        {"width": 1020},
        {"width": "1024"},
        {"sampler": "dpm"},
        {"steps": "many"},
        {"targets": []},
        {"targets": "sm90"},
        {"backend": []},
        {"layout": "merged"},
        {"hidiffusion": {"thresholds": "usual"}},
        {"hidiffusion": {"thresholds": {"pooled": 1.5}}},
        {"hidiffusion": {"thresholds": {"pooled": {"start": 0.5}}}},
    ],
)
def test_the_schema_refuses_what_is_wrong(values: dict[str, object]) -> None:
    jsonschema.validate(LEAST, recipe_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(LEAST | values, recipe_schema())


@pytest.mark.parametrize(
    "values",
    [
        {"sizes": "1024x1024"},
        {"sizes": ["1024x1024", "832x1216"], "batches": [1, 4]},
        {"width": 1024, "height": 1024, "also": "832x1216x4"},
    ],
)
def test_a_size_is_written_in_either_way(values: dict[str, object]) -> None:
    recipe = {"family": "sdxl", "source": "random:0", **values}
    jsonschema.validate(recipe, recipe_schema())
    jsonschema.validate(Recipe.from_dict(recipe).to_dict(), recipe_schema())
    for lacking in ({}, {"width": 1024}, {"batches": [1, 4]}, {"sizes": "1024"}, {"sizes": [1024]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"family": "sdxl", "source": "random:0", **lacking}, recipe_schema())


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"sampler": ["euler", "ddim"], "steps": [4, "10-20"], "targets": "cuda"},
        {"hidiffusion": {"thresholds": {"strided": "16%", "pooled": {"start": 0.16, "end": "40%"}}}},
        {"hidiffusion": {"raunet": False, "windows": False}},
        {"backend": "tensorrt"},
        {"backend": ["tensorrt-rtx", "onnxruntime"], "targets": ["sm75", "sm121", "cpu"], "layout": "per-phase"},
        {"task": "controlnet", "controlnet": "random:1", "hidiffusion": {"thresholds": {"control": 1}}},
    ],
)
def test_the_schema_takes_both_what_is_written_and_what_is_stored(values: dict[str, object]) -> None:
    jsonschema.validate(LEAST | values, recipe_schema())
    jsonschema.validate(Recipe.from_dict(LEAST | values).to_dict(), recipe_schema())
