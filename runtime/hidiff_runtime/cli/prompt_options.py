"""Prompts for `generate`, from a file, with what each settles for itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.request_fields import BY_NAME, ORDERS, SETTINGS
from hidiff_runtime.pipeline.request_values import DATA
from hidiff_runtime.prompt_files.field_values import parse_value, plain_value
from hidiff_runtime.prompt_files.formats import check_ending, read_rows
from hidiff_runtime.prompt_files.raw_rows import Columns, Raw, kind_name
from hidiff_runtime.text_safety import printable

_PAIRS = tuple(name for name, field in SETTINGS.items() if field.kind in ORDERS)
_COLUMNS = Columns((*BY_NAME, *_PAIRS), unknown="Take {name} out: hidiff-run bulk has ids, and --ignore for others.")


@dataclass(frozen=True)
class Prompt:
    """A prompt with what it settles for itself.

    Args:
        text: the prompt; several for a batch.
        settings: by the names of `Settings`; pictures are paths.
        where: it stands in the file; empty where it comes from the command line.
    """

    text: str | tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    where: str = ""


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Reads the prompts of a file, by its ending.

    Raises:
        InputError: it cannot be read, has no prompt, or a row is not one; the row is named.
        EngineError: a library for files of its ending is not installed.
    """
    check_ending(str(path))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            "The prompts cannot be read.", given=f"{path}: {error.strerror}", advice="Mend the name."
        ) from error
    return tuple(_prompt(path, raw) for raw in read_rows(str(path), content, _COLUMNS))


@contextmanager
def located(path: Path | None, where: str) -> Iterator[None]:
    """Names the row of a file in the error of a prompt that is refused."""
    try:
        yield
    except InputError as error:
        if path is None:
            raise
        given = f"{path}, {where}" + (f": {error.given}" if error.given is not None else "")
        raise InputError(error.summary, given=given, advice=error.advice) from error


def _prompt(path: Path, raw: Raw) -> Prompt:
    with located(path, raw.where):
        settings = {name: _value(path, name, value, text=raw.text) for name, value in raw.given().items()}
        if "prompt" not in settings:
            raise InputError("The prompt is missing.", advice="Say what the picture is to show.")
        return Prompt(settings.pop("prompt"), settings, raw.where)


def _value(path: Path, name: str, given: Any, *, text: bool) -> Any:
    if name in _PAIRS:
        return _pair(name, given.split(",") if text else given)
    if name not in BY_NAME:
        raise InputError(
            "There is no such field.",
            given=printable(name[:60]),
            advice=f"Expected one of {', '.join(_COLUMNS.names)}. {_COLUMNS.unknown.format(name='it')}",
        )
    if BY_NAME[name].many and isinstance(given, list):
        return tuple(plain_value(name, part) for part in given)
    value = parse_value(name, given) if text else plain_value(name, given)
    if BY_NAME[name].kind != "picture":
        return value
    if str(value).startswith(DATA):
        raise InputError(
            f"The {name} must be the path of a file.",
            given="bytes",
            advice="Give a path from the file's folder on; hidiff-run bulk takes bytes.",
        )
    return path.parent / str(value)


def _pair(name: str, given: Any) -> list[int]:
    words = [str(part).strip() for part in given] if isinstance(given, (list, tuple)) else []
    if len(words) != 2 or not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        told = repr(given) if isinstance(given, (str, int, float)) else kind_name(given)
        raise InputError(
            f"{name} must be {ORDERS[SETTINGS[name].kind]}, two whole numbers.",
            given=told,
            advice="Such as [1024, 1024].",
        )
    return [int(word) for word in words]
