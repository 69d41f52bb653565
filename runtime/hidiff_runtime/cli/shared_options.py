"""Options that commands share: how the bundle is opened, and the fields of a request, as the one table of them says."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.request_fields import SETTINGS, Field, Kind

if TYPE_CHECKING:
    from hidiff_runtime.bundle import Bundle

NAMES = ("verify", "backend", "resident", "prefetch", "memory_limit", "loop", "allow_links")

FIELD_OPTIONS = tuple(field for field in SETTINGS.values() if field.group)
"""The settings that are options of ``hidiff-run generate``."""


def add_opening(command: argparse.ArgumentParser) -> None:
    """Adds how to open the bundle, as a group of its own."""
    group = command.add_argument_group("how the bundle is opened")
    group.add_argument("--backend", metavar="NAME", help="whose engines to run (default: the fastest here)")
    group.add_argument("--verify", choices=("hash", "size"), default="hash", help="how to check files (default: hash)")
    group.add_argument(
        "--resident", choices=("current", "all"), default="current", help="engines kept open (default: current)"
    )
    group.add_argument(
        "--prefetch", action="store_true", help="open the next phase's engine while the current one runs"
    )
    group.add_argument(
        "--memory-limit",
        type=byte_count,
        metavar="SIZE",
        help="keep engines open, of all sizes, up to so much memory, such as 6GiB; not with --resident all "
        "(default: one phase's)",
    )
    group.add_argument(
        "--loop",
        choices=("auto", "host", "device"),
        default="auto",
        help="where latents stay between steps (default: auto, on any device that is not the host itself)",
    )
    group.add_argument(
        "--option",
        metavar="NAME=VALUE",
        type=named_value,
        action="append",
        default=[],
        help="an option of the backend, such as threads=8 or device=cpu; may be given again",
    )
    add_allow_links(group)


def add_allow_links(command: argparse._ActionsContainer) -> None:
    """Adds where symbolic links in the bundle may lead, alone: for a command that opens no engine."""
    command.add_argument(
        "--allow-links",
        metavar="FOLDER",
        type=_absolute,
        action="append",
        default=[],
        help="a folder that symbolic links in the bundle may lead into; the store of a Hugging Face cache, of DVC or "
        "of git-annex that the bundle lies in needs none; may be given again",
    )


def _absolute(text: str) -> str:
    """Returns a path that means the same in a worker's process, which may have another current folder."""
    return str(Path(text).absolute())


def named_value(text: str) -> tuple[str, str | int | bool]:
    """Reads ``NAME=VALUE``: true, false and whole numbers as what they are, anything else as text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if value in ("true", "false"):
        return name, value == "true"
    return name, int(value) if value.isdecimal() else value


def byte_count(text: str) -> int:
    """Reads bytes, plain or in a unit: ``6GiB``, ``500MB``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", text, re.IGNORECASE | re.ASCII)
    size = 0 if found is None else int(Decimal(found[1]) * _UNITS.get(found[2].lower(), 0))
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes: write 6GiB, 500MB or 6442450944")
    return size


_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}


def opening(options: argparse.Namespace) -> dict[str, Any]:
    """Returns how the command's options say that the bundle is to be opened, as :func:`hidiff_runtime.open` takes it.

    Raises:
        InputError: an option of the backend is none of one.
    """
    given = {name: getattr(options, name) for name in NAMES}
    taken = [name for name, _ in options.option if name in (*given, "folder", "preload")]
    if taken:
        raise not_of_a_backend(taken[0])
    return {**given, **dict(options.option)}


def not_of_a_backend(name: str) -> InputError:
    """Returns the error for what ``--option`` names though the command has it itself, or nothing has."""
    advice = f"Use --{name.replace('_', '-')} if there is one."
    return InputError("This is no option of a backend.", given=name, advice=advice)


def open_bundle(options: argparse.Namespace, **changes: Any) -> Bundle:
    """Opens the command's bundle as its options, and then `changes`, say."""
    from hidiff_runtime import bundle

    return bundle.open(options.folder, **{**opening(options), **changes})


def add_group(command: argparse._ActionsContainer, group: str) -> None:
    """Adds the settings of a group. Those that are left out are None, or False where there is no value."""
    for field in FIELD_OPTIONS:
        if field.group == group:
            add_field(command, field)


def add_size(command: argparse._ActionsContainer) -> None:
    """Adds the size of the pictures, which `sides` reads."""
    told = "of the pictures in pixels, one that the bundle has (default: its first)"
    command.add_argument("--size", metavar="WxH", type=picture_size, help=told)


def sides(options: argparse.Namespace) -> dict[str, int]:
    """Returns the width and height that the command is given; neither where it is given no size."""
    return {} if options.size is None else dict(zip(("width", "height"), options.size, strict=True))


def picture_size(text: str) -> tuple[int, int]:
    """Reads ``WIDTHxHEIGHT`` in pixels."""
    height, width = _pair("x", "WIDTHxHEIGHT")(text)
    return width, height


def add_field(command: argparse._ActionsContainer, field: Field, **changes: Any) -> None:
    """Adds a field, by its name as the attribute of what is parsed; ``changes`` are this command's own arguments."""
    if field.kind == "flag":
        command.add_argument(*field.flags, dest=field.name, action="store_true", help=field.help, **changes)
        return
    arguments = {"type": _READ[field.kind], "choices": field.choices or None, "help": field.help, **changes}
    if metavar := field.metavar or _METAVARS.get(field.kind):
        arguments["metavar"] = metavar
    command.add_argument(*field.flags, dest=field.name, **arguments)


def _pair(mark: str, form: str) -> Callable[[str], tuple[int, int]]:
    """Returns a reader of two numbers with a mark between, which SDXL takes in the other order."""

    def read(text: str) -> tuple[int, int]:
        first, found, second = text.partition(mark)
        if not found or not first.isdecimal() or not second.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
        return int(second), int(first)

    return read


_READ: dict[Kind, Callable[[str], Any]] = {"text": str, "whole": int, "number": float, "picture": Path}
_READ |= {"size": _pair("x", "WIDTHxHEIGHT"), "place": _pair(",", "LEFT,TOP")}
_METAVARS: dict[Kind, str] = {"picture": "FILE", "size": "WxH", "place": "LEFT,TOP"}
