"""Options of commands that are fields of a request, as the one table of them says."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hidiff_runtime.pipeline.request_fields import SETTINGS, Field, Kind

OPTIONS = tuple(field for field in SETTINGS.values() if field.group)
"""The settings that are options of ``hidiff-run generate``."""


def add_group(command: argparse._ActionsContainer, group: str) -> None:
    """Adds the settings of a group. Those that are left out are None, or False where there is no value."""
    for field in OPTIONS:
        if field.group == group:
            add_field(command, field)


def add_field(command: argparse._ActionsContainer, field: Field, **changes: Any) -> None:
    """Adds a field, by its name as the attribute of what is parsed.

    Args:
        changes: arguments of ``add_argument`` that are others for this command.
    """
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
