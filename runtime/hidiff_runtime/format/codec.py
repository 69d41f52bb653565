"""Strict reading of JSON objects: every field is asked for by type, and what is wrong is named by its path."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.regular_files import read_regular

T = TypeVar("T")

REBUILD = "Build the bundle again, or fetch an unbroken copy of it."


LARGEST_JSON = 4 * 2**20
"""Bytes that a bundle's JSON may have; a manifest of the largest recipe has a fiftieth of it. Parsed, the worst of this
size takes 115 MB."""

DEEPEST_JSON = 32
"""Objects and lists inside each other that a bundle's JSON may have."""

MOST_AXES = 8
"""Of a tensor that goes into an engine or comes out: the step graph's state, with five, has the most."""

INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
FLOAT32_MAX = (2 - 2**-23) * 2.0**127

_DIGITS = 20
"""Of a whole number: seeds, the longest there are, go up to 2**64 - 1."""

_SHOWN = 200
"""Characters of a bundle's own text that a message quotes."""


def read_object(path: Path, source: str, what: str) -> dict[str, Any]:
    """Reads a file that holds a JSON object; see `parse_object`.

    Args:
        path: of the file.
        source: what messages about its content call it.
        what: the subject of the message where it cannot be read: ``The reference samples``.

    Raises:
        BundleError: it cannot be read, is no regular file, is too large, or holds no such object.
    """
    try:
        content = read_regular(path, LARGEST_JSON)
    except OSError as error:
        raise BundleError(f"{what} cannot be read.", given=f"{path}: {error.strerror}", advice=REBUILD) from error
    return parse_object(content, source)


def parse_object(text: str | bytes, source: str) -> dict[str, Any]:
    """Returns the JSON object in ``text``, which is UTF-8.

    Refused are duplicate keys, anything but an object, deep nesting, numbers that are none or that no float64 holds,
    and halves of surrogate pairs, which no file name and no message can have.

    Raises:
        BundleError: ``text`` is not that; the message names ``source``.
    """
    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_short,
        )
        _check_tree(value)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source} is not whole JSON.", given=str(error)[:_SHOWN], advice=REBUILD) from error
    if not isinstance(value, dict):
        raise BundleError(f"{source} does not hold a JSON object.", given=type(value).__name__, advice=REBUILD)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key is written twice among {sorted(key for key, _ in pairs)}")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:_DIGITS]} is beyond the largest there is")
    return value


def _short(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a whole number has {len(text)} digits, and at most {_DIGITS} are read")
    return int(text)


def _check_tree(value: Any) -> None:
    """Raises ValueError for what is nested too deeply, and for text that has no bytes."""
    level: list[Any] = [value]
    for depth in itertools.count():
        below: list[Any] = []
        for found in level:
            if depth == DEEPEST_JSON and isinstance(found, (dict, list)):
                raise ValueError(f"it is nested more than {DEEPEST_JSON} deep")
            if isinstance(found, str):
                _check_encodable(found)
            elif isinstance(found, dict):
                for key in found:
                    _check_encodable(key)
                below.extend(found.values())
            elif isinstance(found, list):
                below.extend(found)
        if not below:
            return
        level = below


def _check_encodable(text: str) -> None:
    if not text.isascii():
        text.encode()  # raises UnicodeEncodeError, a ValueError, for half of a surrogate pair


class Fields:
    """One JSON object being taken apart.

    Each getter removes its key; :meth:`done` then refuses whatever is left, so that no misspelt or newer key is
    passed over in silence.

    Args:
        data: the object.
        source: the file it comes from, for messages.
        where: the object's path inside the file, empty for the outermost.
    """

    def __init__(self, data: Any, source: str, where: str = "") -> None:
        self.source = source
        self._where = where
        if not isinstance(data, Mapping):
            raise self.wrong("", "must be an object", data)
        self._left = dict(data)

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def below(self, key: str) -> Fields:
        """Returns what names the fields of an object that was taken apart already."""
        return Fields({}, self.source, f"{self._where}.{key}".strip("."))

    def wrong(self, key: str, rule: str, given: object) -> BundleError:
        """Returns the error for field ``key``: it broke ``rule``."""
        path = f"{self._where}.{key}".strip(".")[:_SHOWN] or "the outermost object"
        return BundleError(f"{self.source}: {path} {rule[: _SHOWN * 4]}.", given=repr(given)[:_SHOWN], advice=REBUILD)

    def take(self, key: str) -> Any:
        """Returns the field as it is.

        Raises:
            BundleError: there is no such field.
        """
        if key not in self._left:
            raise self.wrong(key, "is missing", sorted(self._left))
        return self._left.pop(key)

    def text(self, key: str, *, empty: bool = False) -> str:
        """Returns a string that is not empty, or may be."""
        value = self.take(key)
        if not isinstance(value, str) or not (value or empty):
            raise self.wrong(key, "must be a text", value)
        return value

    def choice(self, key: str, names: Iterable[str]) -> str:
        """Returns one of ``names``."""
        value, known = self.text(key), list(names)
        if value not in known:
            raise self.wrong(key, f"must be one of {', '.join(known)}", value)
        return value

    def whole(self, key: str, least: int = 0, most: int = INT32_MAX) -> int:
        """Returns a whole number from ``least`` to ``most``."""
        value = self.take(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(key, f"must be a whole number of {least} or more", value)
        if value > most:
            raise self.wrong(key, f"must be a whole number of {most} at most", value)
        return value

    def number(self, key: str) -> float:
        """Returns a number that float32 can hold."""
        value = self.take(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(key, "must be a number", value)
        if not -FLOAT32_MAX <= value <= FLOAT32_MAX:
            raise self.wrong(key, "must be a number that float32 can hold", value)
        return float(value)

    def flag(self, key: str) -> bool:
        """Reads true or false."""
        value = self.take(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false", value)
        return value

    def wholes(self, key: str, least: int = 0) -> tuple[int, ...]:
        """Returns a list of whole numbers of ``least`` or more."""
        return self.listed(key, lambda inner, place: inner.whole(place, least))

    def shape(self, key: str, least: int = 1) -> tuple[int, ...]:
        """Returns a tensor's shape: whole numbers of 1 or more, ``least`` to `MOST_AXES` of them."""
        found = self.wholes(key, 1)
        if not least <= len(found) <= MOST_AXES:
            raise self.wrong(key, f"must have {least} to {MOST_AXES} axes", found)
        return found

    def optional(self, key: str, read: Callable[[str], T]) -> T | None:
        """Returns ``read(key)``, or ``None`` where the field is null."""
        if key in self._left and self._left[key] is None:
            self._left.pop(key)
            return None
        return read(key)

    def listed(self, key: str, read: Callable[[Fields, str], T]) -> tuple[T, ...]:
        """Returns a list whose values are read by ``read(fields, place)``; places are called ``list[0]``, …"""
        places = {f"{key}[{index}]": value for index, value in enumerate(self.items(key))}
        inner = Fields(places, self.source, self._where)
        return tuple(read(inner, place) for place in places)

    def each(self, key: str, read: Callable[[Fields], T]) -> tuple[T, ...]:
        """Returns a list of objects, each taken apart by ``read`` to its last key."""
        return self.listed(key, lambda inner, place: inner.nested(place, read))

    def nested(self, key: str, read: Callable[[Fields], T]) -> T:
        """Returns one object, taken apart by ``read`` to its last key."""
        inner = Fields(self.take(key), self.source, f"{self._where}.{key}".strip("."))
        result = read(inner)
        inner.done()
        return result

    def mapping(self, key: str) -> dict[str, Any]:
        """Returns an object with free keys."""
        value = self.take(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "must be an object", value)
        return value

    def named(self, key: str, read: Callable[[Fields, str], T]) -> dict[str, T]:
        """Returns an object with free keys whose values are read by ``read(fields, key)``."""
        inner = Fields(self.mapping(key), self.source, f"{self._where}.{key}".strip("."))
        return {name: read(inner, name) for name in list(inner._left)}

    def done(self) -> None:
        """Refuses what no getter asked for.

        Raises:
            BundleError: a key is left over.
        """
        for key, value in self._left.items():
            raise self.wrong(key, "is not a field of this format", value)

    def items(self, key: str) -> list[Any]:
        """Returns a list of anything."""
        value = self.take(key)
        if not isinstance(value, list):
            raise self.wrong(key, "must be a list", value)
        return value
