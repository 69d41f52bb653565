"""What a text plainly is, whatever its name says."""

from __future__ import annotations

import re

from hidiff_runtime.pipeline.request_fields import BY_NAME
from hidiff_runtime.prompt_files.field_values import ID
from hidiff_runtime.prompt_files.raw_rows import strict_json

_HEADER = frozenset((*BY_NAME, ID, "cfg_scale", "width", "height", "sampler_name", "negative"))
_JSON = re.compile(r'\[\s*([{"].*)?|\{')
_YAML = re.compile(r"---( .*)?|(- )?(prompt|negative_prompt|id|seed)\s*:(\s.*)?|prompts\s*:")
_DELIMITERS = {",": "csv", ";": "csv", "\t": "tsv"}


def line_ends(text: str) -> list[str]:
    """Returns the lines of a text as editors show them; U+2028 and its like are no line ends, but parts of a text."""
    return re.split(r"\r\n|\n|\r", text)


def looks_like(text: str) -> str | None:
    """Returns the ending that fits a text which is plainly JSON, a table or YAML; None where it may be prompts."""
    lines = [line.strip(" ") for line in line_ends(text) if line.strip()]
    if not lines:
        return None
    first = lines[0]
    if _JSON.fullmatch(first) or (first.startswith("{") and not _is_json(first) and _is_json(text)):
        return "json"
    header = header_of(first)
    if header is not None and (len(header[0]) > 1 or len(lines) > 1):
        return _DELIMITERS[header[1]]
    if _YAML.fullmatch(first) or (len(lines) > 1 and all(line.startswith("- ") for line in lines)):
        return "yaml"
    return None


def header_of(line: str) -> tuple[list[str], str] | None:
    """Returns the columns and the delimiter of a table's first line; None where it is none."""
    for delimiter in _DELIMITERS:
        names = [name.strip().strip('"').strip().lower() for name in line.split(delimiter)]
        known = sum(name in _HEADER for name in names)
        if "prompt" in names and (known >= min(len(names), 2) or " " not in line):
            return names, delimiter
    return None


def _is_json(text: str) -> bool:
    try:
        strict_json(text)
    except (ValueError, RecursionError):
        return False
    return True
