"""Dataclasses as JSON objects: the one reading and writing of them, by their fields and type hints.

A field is text, a whole number of 0 or more, a number, true or false, an enumeration, another dataclass, or anything
(``Any``); these with ``| None``, in ``tuple[X, ...]`` or in ``Mapping[str, X]``; or what a `Form` says. `Fields`
refuses what is something else. Keys are the fields' names in their order, if no metadata says otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hidiff_runtime.format.codec import INT32_MAX, Fields
from hidiff_runtime.format.paths import path_error

T = TypeVar("T")

LATER = {"absent": True}
"""Metadata of a field that older files do not have: it is at its default there."""

OMITTED = {"absent": True, "omitted": True}
"""Of one that is not written either as long as it is at its default."""

FLAT = {"flat": True}
"""Of a dataclass whose fields are written among those of the dataclass that it is in."""

UNWRITTEN = {"unwritten": True}
"""Of a field that the JSON object does not have: `decode` is given it."""


def key(name: str) -> Mapping[str, str]:
    """Returns the metadata of a field that is called otherwise in JSON."""
    return {"key": name}


@dataclasses.dataclass(frozen=True)
class Form:
    """How a value is read and written where its type does not say it: ``Annotated[int, Form(...)]``.

    Args:
        read: takes the value out of an object by its key, as the getters of `Fields` do.
        write: gives the JSON value; without it, it is written as any of the type.
    """

    read: Callable[[Fields, str], Any]
    write: Callable[[Any], Any] | None = None


def whole(least: int = 0, most: int = INT32_MAX) -> Form:
    """Returns the form of a whole number within bounds."""
    return Form(lambda fields, name: fields.whole(name, least, most))


def wholes(count: int, rule: str, least: int = 0) -> Form:
    """Returns the form of a list of so many whole numbers; ``rule`` is what messages say of another number of them."""

    def read(fields: Fields, name: str) -> tuple[int, ...]:
        found = fields.wholes(name, least)
        if len(found) != count:
            raise fields.wrong(name, rule, found)
        return found

    return Form(read)


def _bundle_path(fields: Fields, name: str) -> str:
    path = fields.text(name)
    if fault := path_error(path):
        raise fields.wrong(name, fault, path)
    return path


def _float_or_inf(fields: Fields, name: str) -> float:
    value = fields.take(name)
    if value in ("inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise fields.wrong(name, "must be a number, 'inf' or '-inf'", value)
    return float(value)


Positive = Annotated[int, whole(1)]
Float = Annotated[float, Form(Fields.number, float)]
"""A number that is written as it is read, 0 as 0.0, so that a digest stays the same."""

FloatOrInf = Annotated[float, Form(_float_or_inf, lambda value: value if math.isfinite(value) else str(value))]
"""A number that may be infinite, which JSON has as the text ``inf`` or ``-inf``."""

AnyText = Annotated[str, Form(lambda fields, name: fields.text(name, empty=True))]
Shape = Annotated[tuple[int, ...], Form(Fields.shape)]
BundlePath = Annotated[str, Form(_bundle_path)]
"""The relative path of a file that is inside the bundle."""

_GETTERS: dict[Any, Callable[[Fields, str], Any]] = {
    str: Fields.text,
    int: Fields.whole,
    float: Fields.number,
    bool: Fields.flag,
    Any: Fields.take,
}


@cache
def _members(cls: type) -> tuple[tuple[dataclasses.Field[Any], str, Any], ...]:
    """Returns the fields of a dataclass, each with its key and its type."""
    hints = get_type_hints(cls, include_extras=True)
    return tuple((field, field.metadata.get("key", field.name), hints[field.name]) for field in dataclasses.fields(cls))


def decode(cls: type[T], fields: Fields, **given: Any) -> T:
    """Takes a dataclass out of a JSON object, which holds nothing else.

    Args:
        cls: the dataclass.
        fields: the object.
        given: values of fields that are not to be read.

    Raises:
        BundleError: a field is missing, is not what its type says or is none of the dataclass's; its path is named.
    """
    record = _decode(cls, fields, given)
    fields.done()
    return record


def _decode(cls: type[T], fields: Fields, given: Mapping[str, Any]) -> T:
    """Takes a dataclass out of a JSON object, and leaves keys that are none of its."""
    values = dict(given)
    for field, name, hint in _members(cls):  # type: ignore[arg-type]  # classes can be hashed
        if field.name in given or ("absent" in field.metadata and name not in fields):
            continue
        values[field.name] = _decode(hint, fields, {}) if "flat" in field.metadata else _read(hint, fields, name)
    return cls(**values)


def _read(hint: Any, fields: Fields, name: str) -> Any:
    if hint in _GETTERS:
        return _GETTERS[hint](fields, name)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return arguments[1].read(fields, name)
    if origin in (Union, UnionType):
        return fields.optional(name, lambda name: _read(_some(arguments), fields, name))
    if origin is tuple:
        return fields.listed(name, lambda inner, place: _read(arguments[0], inner, place))
    if origin in (Mapping, dict):
        return fields.named(name, lambda inner, place: _read(arguments[1], inner, place))
    if issubclass(hint, Enum):
        return hint(fields.choice(name, [member.value for member in hint]))
    return fields.nested(name, lambda inner: decode(hint, inner))


def _some(arguments: tuple[Any, ...]) -> Any:
    """Returns what ``X | None`` is when it is not None."""
    return next(argument for argument in arguments if argument is not NoneType)


def encode(record: Any) -> dict[str, Any]:
    """Returns the JSON object of a dataclass, which `decode` reads."""
    content: dict[str, Any] = {}
    for field, name, hint in _members(record.__class__):
        value, marks = getattr(record, field.name), field.metadata
        if "unwritten" in marks or ("omitted" in marks and value == _default(field)):
            continue
        content |= encode(value) if "flat" in marks else {name: _write(hint, value)}
    return content


def _write(hint: Any, value: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        form: Form = arguments[1]
        return _write(arguments[0], value) if form.write is None else form.write(value)
    if value is None or hint is Any:
        return value
    if dataclasses.is_dataclass(value):
        return encode(value)
    if origin in (Union, UnionType):
        return _write(_some(arguments), value)
    if origin is tuple:
        return [_write(arguments[0], item) for item in value]
    if origin in (Mapping, dict):
        return {name: _write(arguments[1], item) for name, item in value.items()}
    return value.value if isinstance(value, Enum) else value


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
