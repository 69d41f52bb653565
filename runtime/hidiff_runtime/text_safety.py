"""Text from anywhere, made fit for files and terminals: half of a surrogate pair has no bytes, and controls act."""

from __future__ import annotations

import json
from typing import Any


def encodable(text: str) -> str:
    r"""Returns the text with halves of surrogate pairs written as ``\udXXX``; UTF-8 has no bytes for them."""
    return text.encode("utf-8", "backslashreplace").decode()


def json_text(value: Any, indent: int | None = None) -> str:
    """Returns a value as JSON that can be encoded and is read back as the same value."""
    return encodable(json.dumps(value, ensure_ascii=False, indent=indent))


def printable(text: str) -> str:
    """Returns the text with line ends, control characters and the like escaped, for one line of a terminal."""
    if text.isprintable():
        return text
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)
