"""Strict reading of JSON objects: every field is asked for by type, and what is wrong is named by its path."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hidiff_runtime.errors import BundleError

T = TypeVar("T")

REBUILD = "Build the bundle again, or fetch an unbroken copy of it."


def parse_object(text: str, source: str) -> dict[str, Any]:
    """The JSON object in ``text``; duplicate keys, NaN and anything but an object are refused.

    Raises:
        BundleError: ``text`` is not that; the message names ``source``.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source} is not whole JSON.", given=error, advice=REBUILD) from error
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
        self._source = source
        self._where = where
        if not isinstance(data, Mapping):
            raise self.wrong("", "must be an object", data)
        self._left = dict(data)

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def wrong(self, key: str, rule: str, given: object) -> BundleError:
        """The error for field ``key``: it broke ``rule``."""
        path = f"{self._where}.{key}".strip(".") or "the outermost object"
        return BundleError(f"{self._source}: {path} {rule}.", given=repr(given)[:200], advice=REBUILD)

    def take(self, key: str) -> Any:
        """The field as it is.

        Raises:
            BundleError: there is no such field.
        """
        if key not in self._left:
            raise self.wrong(key, "is missing", sorted(self._left))
        return self._left.pop(key)

    def text(self, key: str) -> str:
        """A string that is not empty."""
        value = self.take(key)
        if not isinstance(value, str) or not value:
            raise self.wrong(key, "must be a text", value)
        return value

    def whole(self, key: str, least: int = 0) -> int:
        """A whole number not below ``least``."""
        return self._whole(key, self.take(key), least)

    def _whole(self, key: str, value: Any, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(key, f"must be a whole number of {least} or more", value)
        return value

    def number(self, key: str) -> float:
        """A number."""
        value = self.take(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(key, "must be a number", value)
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.take(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false", value)
        return value

    def wholes(self, key: str, least: int = 0) -> tuple[int, ...]:
        """A list of whole numbers not below ``least``."""
        return tuple(self._whole(f"{key}[{index}]", value, least) for index, value in enumerate(self._list(key)))

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self._list(key)
        for index, value in enumerate(values):
            if not isinstance(value, str):
                raise self.wrong(f"{key}[{index}]", "must be a text", value)
        return tuple(values)

    def optional(self, key: str, read: Callable[[str], T]) -> T | None:
        """``read(key)``, or ``None`` where the field is null."""
        if key in self._left and self._left[key] is None:
            self._left.pop(key)
            return None
        return read(key)

    def each(self, key: str, read: Callable[[Fields], T]) -> tuple[T, ...]:
        """A list of objects, each taken apart by ``read`` to its last key."""
        return tuple(self._nested(f"{key}[{index}]", value, read) for index, value in enumerate(self._list(key)))

    def nested(self, key: str, read: Callable[[Fields], T]) -> T:
        """One object, taken apart by ``read`` to its last key."""
        return self._nested(key, self.take(key), read)

    def mapping(self, key: str) -> dict[str, Any]:
        """An object with free keys."""
        value = self.take(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "must be an object", value)
        return value

    def named(self, key: str, read: Callable[[Fields, str], T]) -> dict[str, T]:
        """An object with free keys whose values are read by ``read(fields, key)``."""
        inner = Fields(self.mapping(key), self._source, f"{self._where}.{key}".strip("."))
        return {name: read(inner, name) for name in list(inner._left)}

    def done(self) -> None:
        """Refuses what no getter asked for.

        Raises:
            BundleError: a key is left over.
        """
        for key, value in self._left.items():
            raise self.wrong(key, "is not a field of this format", value)

    def _list(self, key: str) -> list[Any]:
        value = self.take(key)
        if not isinstance(value, list):
            raise self.wrong(key, "must be a list", value)
        return value

    def _nested(self, key: str, value: Any, read: Callable[[Fields], T]) -> T:
        inner = Fields(value, self._source, f"{self._where}.{key}".strip("."))
        result = read(inner)
        inner.done()
        return result
