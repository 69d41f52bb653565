"""Turns a validation error into one a person can act on: file, line, key, value, and what would be valid."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hidiff_export.errors import RecipeError
from hidiff_export.recipe.yaml_source import Key, RecipeSource, dotted, nearest

_Base = TypeVar("_Base")
_SHOWN = 80
_WORDING = {
    "int_type": "should be a whole number",
    "bool_type": "should be true or false",
    "string_type": "should be text",
    "float_type": "should be a number",
    "model_type": "should be a mapping of keys",
    "tuple_type": "should be a list",
    "missing": "is missing",
    "extra_forbidden": "is not a recipe key",
}


def recipe_error(error: ValidationError, source: RecipeSource, model: type[BaseModel]) -> RecipeError:
    """Returns the first problem in the recipe's order, and a word on the others.

    Args:
        error: what validating ``source.data`` as ``model`` raised.
    """
    # A default that follows other values is missing where one of those is wrong, which is no problem of its own.
    own = [problem for problem in error.errors() if problem["type"] != "default_factory_not_called"]
    problems = sorted(own, key=lambda problem: source.position(_key(problem)))
    first, others = problems[0], problems[1:]
    key = _key(first)
    advice = _advice(first, key, model)
    if others:
        places = ", ".join(f"`{dotted(_key(other))}` ({source.place(_key(other))})" for other in others)
        advice = f"{advice}\nAlso wrong: {places}."
    given = None if first["type"] == "missing" else _shown(_given(first, key, source))
    return RecipeError(f"{source.place(key)}: `{dotted(key)}` {_what(first)}.", given=given, advice=advice)


def _key(problem: ErrorDetails) -> Key:
    """Returns where the problem is; a check over several values names the one to change."""
    return tuple(problem.get("ctx", {}).get("key", ())) or problem["loc"]


def _what(problem: ErrorDetails) -> str:
    if problem["type"] == "recipe":
        return str(problem["ctx"]["what"])
    return _WORDING.get(problem["type"]) or re.sub("^(Input|String) ", "", problem["msg"])


def _given(problem: ErrorDetails, key: Key, source: RecipeSource) -> Any:
    value: Any = source.data
    for part in key:
        if not (isinstance(value, Mapping) and part in value):
            return None if problem.get("ctx", {}).get("key") else problem["input"]
        value = value[part]
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _advice(problem: ErrorDetails, key: Key, model: type[BaseModel]) -> str:
    if problem["type"] == "extra_forbidden":
        keys = list(_model_at(model, key[:-1]).model_fields)
        return f"{nearest(str(key[-1]), keys)}Keys here are {', '.join(keys)}."
    if advice := problem.get("ctx", {}).get("advice"):
        return str(advice)
    names = tuple(part for part in key if isinstance(part, str))
    field = _model_at(model, names[:-1]).model_fields[names[-1]]
    choices = [str(member.value) for kind in _classes(field.annotation, Enum) for member in kind]
    guess = nearest(problem["input"], choices) if isinstance(problem["input"], str) else ""
    return f"{guess}{field.description or ''}"


def _model_at(model: type[BaseModel], key: Key) -> type[BaseModel]:
    for part in key:
        model = next(_classes(model.model_fields[str(part)].annotation, BaseModel))
    return model


def _classes(annotation: Any, base: type[_Base]) -> Iterator[type[_Base]]:
    """Yields the subclasses of ``base`` that an annotation names, at whatever depth."""
    if isinstance(annotation, type) and issubclass(annotation, base):
        yield annotation
    for inner in get_args(annotation):
        yield from _classes(inner, base)
