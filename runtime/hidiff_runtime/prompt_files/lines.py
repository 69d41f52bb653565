"""Prompts a line each: text, or JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from hidiff_runtime.errors import InputError
from hidiff_runtime.prompt_files.detection import line_ends, looks_like
from hidiff_runtime.prompt_files.raw_rows import EXAMPLE, Raw, row_values, strict_json
from hidiff_runtime.prompt_files.web_ui import refuse_web_ui
from hidiff_runtime.text_safety import json_text

_CALLED = {"json": "a JSON document", "csv": "a table with a header row", "tsv": "a table with tabs", "yaml": "YAML"}


def read_text(name: str, text: str) -> list[Raw]:
    """Reads lines of text, or of JSON where one begins with ``{``; ``#`` and a space begin a comment.

    Raises:
        InputError: the file is plainly something else than lines of prompts.
    """
    refuse_other(name, text, "lines of text")
    return _rows(text, _text_line, comments=True)


def read_json_lines(name: str, text: str) -> list[Raw]:
    """Reads lines of JSON, each an object or a text.

    Raises:
        InputError: the file is one document instead.
    """
    if looks_like(text) == "json":
        refuse_other(name, text, "a line of JSON for each prompt")
    return _rows(text, json_line)


def refuse_other(name: str, text: str, wanted: str) -> None:
    """Refuses a file that is plainly of another ending than its own.

    Raises:
        InputError: it is; the ending that fits is named.
    """
    fitting = looks_like(text)
    if fitting is None:
        return
    number, first = next((number, line) for number, line in enumerate(line_ends(text), 1) if line.strip())
    stem = name.replace("\\", "/").rpartition("/")[2].rpartition(".")[0]
    raise InputError(
        f"The file is {_CALLED[fitting]}, and its ending says {wanted}.",
        given=f"{name}, line {number}: {first.strip()[:60]!r}",
        advice=f"Call it {stem}.{fitting}. A prompt that only looks so goes into a line of JSON: {EXAMPLE}",
    )


def json_line(line: str) -> dict[str, Any] | InputError:
    """Returns the values of a line of JSON, or why there are none."""
    try:
        return row_values(strict_json(line))
    except (ValueError, RecursionError) as error:
        told = str(error)
        if isinstance(error, json.JSONDecodeError):
            told = f"{error.msg} at position {error.pos + 1}"
        advice = f"Such as {EXAMPLE}."
        if not re.match(r'\{\s*"|\{\s*\}|["\[]', line):  # a prompt, though one that may begin as JSON does
            advice = f"Write a prompt as {json_text({'prompt': line[:200]})}."
        return InputError("The line is not JSON.", given=f"{told} of {line[:60]!r}", advice=advice)


def _rows(text: str, read: Callable[[str], dict[str, Any] | InputError], *, comments: bool = False) -> list[Raw]:
    numbered = ((number, line.strip()) for number, line in enumerate(line_ends(text), 1))
    lines = [(number, line) for number, line in numbered if line and not (comments and line.partition(" ")[0] == "#")]
    return [Raw(place, f"line {number}", read(line)) for place, (number, line) in enumerate(lines)]


def _text_line(line: str) -> dict[str, Any] | InputError:
    if line.startswith("{"):
        return json_line(line)
    try:
        refuse_web_ui(line)
    except InputError as error:
        return error
    return {"prompt": line}
