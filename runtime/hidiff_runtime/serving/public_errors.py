"""What a client is told of an error: one short line without paths, tracebacks or what else is the server's alone."""

from __future__ import annotations

import re

from hidiff_runtime.errors import Cancelled, Expired, HidiffError, InputError

LONGEST = 300
"""Characters of a message."""

INTERNAL = "Internal error."

_PATH = re.compile(r"(?<![\w.])(?:~?/|[A-Za-z]:[/\\])[^\s'\",;:)]+")


def public_message(error: BaseException) -> str:
    """Returns the line: what was given and what to do for a refused request, what went wrong for everything else."""
    if isinstance(error, Expired):
        return _line(error.summary)
    if isinstance(error, Cancelled):
        return "The request was cancelled."
    if isinstance(error, InputError):
        given = "" if error.given is None else f" Given: {error.given}."
        return _line(f"{error.summary}{given} {error.advice}")
    if isinstance(error, HidiffError):
        return _line(error.summary)
    return INTERNAL


def kind_of(error: BaseException) -> str:
    """Names the kind of an error: ``input``, ``expired``, ``cancelled``, ``engine`` or ``internal``."""
    if isinstance(error, HidiffError):
        names = {InputError: "input", Expired: "expired", Cancelled: "cancelled"}
        return next((name for kind, name in names.items() if isinstance(error, kind)), "engine")
    return "internal"


def _line(text: str) -> str:
    whole = text.encode("utf-8", "replace").decode()  # half a surrogate pair, which JSON may hold, cannot be sent
    plain = " ".join(_PATH.sub("(path)", whole).split())
    return plain if len(plain) <= LONGEST else plain[: LONGEST - 1] + "…"
