"""A row of a file of prompts as it was read, before anybody knows what its values mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hidiff_runtime.errors import InputError


@dataclass(frozen=True)
class Raw:
    """A row as it was read.

    Args:
        number: from 0, counted over all rows of the file.
        where: it stands, for messages.
        values: by column; or why there are none.
        text: whether all values are text, as CSV has them.
    """

    number: int
    where: str
    values: Mapping[str, Any] | InputError
    text: bool = False

    def given(self) -> dict[str, Any]:
        """Returns the values that are there; an empty text is not, where all are text. Raises why there are none."""
        if isinstance(self.values, InputError):
            raise self.values
        return {name: value for name, value in self.values.items() if value is not None and (value or not self.text)}


@dataclass(frozen=True)
class Columns:
    """What a table's columns may be called.

    Args:
        names: of fields.
        ignored: others that may be there.
        unknown: what to do about a column that is neither, with ``{name}`` for it.
    """

    names: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    unknown: str = "Take the column out."


EXAMPLE = '{"prompt": "a lighthouse", "seed": 3}'

MOST_DIGITS = 40
"""Of a whole number: float64 and every field of a request hold less."""


def strict_json(text: str) -> Any:
    """Returns what JSON says, with an `InputError` in the place of each value that has a fault of its own.

    Nothing is passed over: a name given twice, NaN and numbers without end are faults, each where it stands.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_whole)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | InputError:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    return InputError("An object has one name twice.", given=repr(twice[:60]), advice="Leave one of them out.")


def _constant(text: str) -> InputError:
    return InputError("A value is no JSON.", given=text, advice="Write a number, or null where there is none.")


def _whole(text: str) -> int | InputError:
    if len(text) > MOST_DIGITS:
        given = f"{text[:MOST_DIGITS]}… of {len(text)} characters"
        return InputError("A whole number is too long.", given=given, advice="Seeds go up to 18446744073709551615.")
    return int(text)


def row_values(item: object) -> dict[str, Any] | InputError:
    """Returns the values of one element of JSON or YAML: text is the prompt alone, an object has fields."""
    if isinstance(item, str):
        return {"prompt": item}
    if isinstance(item, InputError):
        return item
    if not isinstance(item, dict):
        return InputError(
            "A row must be text, or an object with a prompt.", given=kind_name(item), advice=f"Such as {EXAMPLE}."
        )
    odd = next((name for name in item if not isinstance(name, str)), None)
    if odd is not None:
        return InputError("A field's name must be text.", given=repr(odd), advice=f"Such as {EXAMPLE}.")
    return next((value for value in item.values() if isinstance(value, InputError)), item)


def kind_name(value: object) -> str:
    """Returns what JSON calls a value of this type."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
