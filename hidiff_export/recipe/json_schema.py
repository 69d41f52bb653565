"""The JSON Schema of a recipe, with which editors complete and check one."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from hidiff_export.recipe.recipe import Recipe


class _FileSchema(GenerateJsonSchema):
    """Without the titles that pydantic makes up from the names."""

    def field_title_should_be_set(self, schema: object) -> bool:  # noqa: ARG002 - pydantic's signature
        return False


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a recipe file, for editors; `recipe.schema.json` holds it."""
    schema = Recipe.model_json_schema(schema_generator=_FileSchema)
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "hidiff-export recipe",
        "description": "What to build: checkpoint, picture, phases, precision, engines and proof. Sizes are in pixels.",
    }
    # A size is written in one of two ways; pydantic knows of the fields alone, the width and height of each recipe.
    schema["required"] = [key for key in schema["required"] if key not in ("width", "height")]
    schema["anyOf"] = [{"required": ["width", "height"]}, {"required": ["sizes"]}]
    return head | {key: value for key, value in schema.items() if key not in head}
