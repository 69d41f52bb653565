"""JSON with nothing passed over: a name given twice, NaN and numbers without end are faults, each where it stands."""

from __future__ import annotations

import json
from typing import Any

from hidiff_runtime.errors import InputError

MOST_DIGITS = 40
"""Of a whole number: float64 and every field of a request hold less."""


def loads(text: str) -> Any:
    """Returns what JSON says, with an `InputError` in the place of each value that has a fault of its own.

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
