"""Checks that the options of several backends share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from hidiff_runtime.errors import EngineError, InputError


def check_names(library: str, kind: type[Any], given: Iterable[str]) -> None:
    """Refuses options that are no fields of the dataclass ``kind``. Raises InputError, which names the library."""
    known = [field.name for field in fields(kind)]
    for name in given:
        if name not in known:
            raise InputError(f"{library} has no such option here.", given=name, advice=f"There are {', '.join(known)}.")


def check_threads(threads: object) -> None:
    """Refuses a number of threads that is no whole number of 0 or more. Raises InputError."""
    if type(threads) is not int or threads < 0:
        raise InputError("threads must be a whole number.", given=repr(threads), advice="0 means all cores.")


def check_switch(name: str, given: object, *, default: bool) -> None:
    """Refuses what is neither true nor false. Raises InputError, which names the option."""
    if not isinstance(given, bool):
        left_out = "true" if default else "false"
        raise InputError(f"{name} must be true or false.", given=repr(given), advice=f"It is {left_out} if left out.")


def no_profile(engine: object) -> EngineError:
    """Returns the error for a session that was to tell of its operators, and noted nothing of them."""
    return EngineError("The engine was opened without a profile.", given=engine, advice="Use profile=True.")
