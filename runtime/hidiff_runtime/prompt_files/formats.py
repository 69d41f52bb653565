"""The rows of a file of prompts, which its ending says how to read."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from hidiff_runtime.errors import InputError
from hidiff_runtime.prompt_files.documents import read_json, read_yaml
from hidiff_runtime.prompt_files.lines import read_json_lines, read_text
from hidiff_runtime.prompt_files.raw_rows import Columns, Raw
from hidiff_runtime.prompt_files.tables import read_csv, read_parquet

_READERS: dict[str, Callable[[str, str, Columns], list[Raw]]] = {
    "txt": lambda name, text, _: read_text(name, text),
    "jsonl": lambda name, text, _: read_json_lines(name, text),
    "ndjson": lambda name, text, _: read_json_lines(name, text),
    "json": lambda name, text, _: read_json(name, text),
    "csv": read_csv,
    "tsv": lambda name, text, columns: read_csv(name, text, columns, "\t"),
    "yaml": lambda name, text, _: read_yaml(name, text),
    "yml": lambda name, text, _: read_yaml(name, text),
}
ENDINGS = (*(f".{ending}" for ending in _READERS), ".parquet")
"""Of files that can be read."""

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins as UTF-16's does
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def check_ending(name: str) -> str:
    """Returns the ending of a file, in lower case and without its dot.

    Raises:
        InputError: it is not one of `ENDINGS`.
    """
    ending = name.replace("\\", "/").rpartition("/")[2].rpartition(".")[2].lower()
    if f".{ending}" not in ENDINGS or "." not in name:
        raise InputError(
            "The ending of the prompts' file does not say how to read it.",
            given=name,
            advice=f"Expected one of {', '.join(ENDINGS)}; lines of text are .txt, lines of JSON .jsonl.",
        )
    return ending


def read_rows(name: str, content: bytes, columns: Columns) -> list[Raw]:
    """Reads the rows of a file, by the ending of its path or URL.

    Raises:
        InputError: the ending is none that is known, the file is not what it says, or it has no rows.
        EngineError: a library for it is not installed.
    """
    ending = check_ending(name)
    if ending == "parquet":
        raws = read_parquet(name, content, columns)
    else:
        raws = _READERS[ending](name, _text(name, content), columns)
    if not raws:
        raise InputError("There are no prompts in the file.", given=name, advice="Write one prompt a line or row.")
    return raws


def _text(name: str, content: bytes) -> str:
    """Returns the text of a file in UTF-8, with or without a byte order mark."""
    encoding = next((called for mark, called in _MARKS.items() if content.startswith(mark)), "")
    head = content[:1000]
    if not encoding and len(head) > 1 and 2 * max(head[::2].count(0), head[1::2].count(0)) > len(head) // 2:
        encoding = "UTF-16"  # without its mark: every other byte of English is zero
    if encoding:
        raise InputError(f"The prompts' file is {encoding}.", given=name, advice="Save it as UTF-8.")
    if content.startswith(b"PAR1"):
        raise InputError("The prompts' file is a Parquet file.", given=name, advice="Give it the ending .parquet.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            "The prompts' file is not UTF-8.",
            given=f"{name}, line {line}: byte 0x{content[error.start]:02X}",
            advice="Save it as UTF-8; text of Windows is often in its own encoding (cp1252).",
        ) from error
