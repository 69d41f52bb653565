"""Values of a row, by the one table of a request's fields."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

from hidiff_runtime.errors import InputError
from hidiff_runtime.finite_values import is_finite
from hidiff_runtime.pipeline.prompt_encoding import check_text
from hidiff_runtime.pipeline.request_fields import BY_NAME, CALLED, Field, fits
from hidiff_runtime.pipeline.request_values import DATA
from hidiff_runtime.prompt_files.raw_rows import kind_name
from hidiff_runtime.text_safety import encodable, printable

Value = str | int | float | bool
ID = "id"

_SHOWN = 200
_MOST_BITS = 256
_EXACT = 2**53
"""Float64 holds every whole number up to it, and not every one beyond."""

_WHOLE = re.compile(r"[+-]?[0-9]{1,40}(\.0+)?")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def field_of(name: str) -> Field:
    """Returns the field of this name.

    Raises:
        InputError: there is none.
    """
    if name not in BY_NAME:
        raise InputError(
            "There is no such field.", given=printable(name[:60]), advice=f"There are {ID}, {', '.join(BY_NAME)}."
        )
    return BY_NAME[name]


def parse_value(name: str, text: str) -> Value:
    """Reads a value written as text, as on the command line and in CSV.

    Raises:
        InputError: there is no such field, or it is not of its kind.
    """
    known, word = field_of(name), text.strip()
    if known.kind == "whole" and _WHOLE.fullmatch(word):
        return int(word.partition(".")[0])
    if known.kind == "number" and _NUMBER.fullmatch(word):
        return plain_value(name, float(word))
    if known.kind == "flag" and word.lower() in ("true", "false"):
        return word.lower() == "true"
    if known.kind in ("text", "picture"):
        return plain_value(name, text)
    raise wrong_type(known, text)


def plain_value(name: str, given: Any) -> Value:
    """Checks a value of JSON, YAML or Parquet. Whole numbers may come as floats, as tables with gaps have them.

    Raises:
        InputError: there is no such field, it is not of its kind, or it is text that cannot be encoded.
    """
    known = field_of(name)
    value: Any = given
    if known.kind == "picture":
        return _picture(known, value)
    if known.kind == "whole" and isinstance(given, float) and given.is_integer():
        if abs(given) > _EXACT:
            raise InputError(
                f"{name} has lost its last digits: it is a floating-point number.",
                given=given,
                advice="Write whole numbers beyond 2^53 as such; in Parquet as a column of int64 or uint64.",
            )
        return int(given)
    if not fits(known.kind, given):
        raise wrong_type(known, given)
    if known.kind == "number" and not is_finite(value):
        raise wrong_type(known, given)
    if isinstance(given, str):
        check_text(name.replace("_", " "), given)
    checked: Value = value
    return checked


def check_encodable(name: str, text: str) -> None:
    """Refuses text with half of a surrogate pair, of which no file and no file name can be made.

    Raises:
        InputError: names the character and its position, counted from 1.
    """
    if encodable(text) == text:
        return
    position = next(place for place, mark in enumerate(text, 1) if "\ud800" <= mark <= "\udfff")
    raise InputError(
        f"The {name} has half of a surrogate pair.",
        given=f"U+{ord(text[position - 1]):04X} at position {position} of {text[:60]!r}",
        advice="Take it out.",
    )


def shown(value: object) -> Any:
    """Returns what is shown of a value: one that JSON has, and not a long one."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:  # Python writes none of thousands of digits
        return f"(a whole number of {value.bit_length()} bits)"
    if isinstance(value, (bool, int)) or (isinstance(value, float) and is_finite(value)):
        return value
    if isinstance(value, (bytes, Mapping, list)):
        return f"({type(value).__name__})"
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def wrong_type(known: Field, given: object) -> InputError:
    """Returns the error of a value that is not of its field's kind."""
    told = repr(shown(given)) if isinstance(given, (str, int, float)) else kind_name(given)
    advice = "Put text into quotes." if known.kind == "text" else "Mend the row."
    wanted = CALLED.get(known.kind, "a path, a URL or bytes")
    return InputError(f"{known.name} must be {wanted}.", given=told, advice=advice)


def _picture(known: Field, given: Any) -> str:
    """Returns a path or URL as it is, bytes as a ``data:`` URL; a table of data sets has both in one value."""
    if isinstance(given, Mapping):
        given = given.get("bytes") or given.get("path")
    if isinstance(given, bytes):
        return f"{DATA};base64,{base64.b64encode(given).decode()}"
    if not isinstance(given, str) or not given:
        raise wrong_type(known, given)
    if not given.startswith(DATA):
        check_text(f"path ({known.name})", given)
    return given
