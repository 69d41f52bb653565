"""Prompts of a bulk job from a table or from lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from typing import Any

from hidiff_runtime.bulk.rows import ID, Raw
from hidiff_runtime.bulk.storage import Place, Store, arrow
from hidiff_runtime.errors import InputError
from hidiff_runtime.serving.fields import BY_NAME

_NO_TABLE = "Give a .parquet, .csv, .jsonl or text file in UTF-8."


def read_prompts(place: Place, ignored: Iterable[str] = ()) -> list[Raw]:
    """The rows of a file, by its ending: ``.parquet``, ``.csv``, and lines of text or JSON for any other.

    Args:
        place: of the file.
        ignored: columns that may be there and are no fields.

    Raises:
        InputError: there is no such file, it cannot be read, has no rows, or a table has a column that is no field.
        StorageError: the place cannot be read.
    """
    content = Store(place).read()
    if content is None:
        raise InputError("The prompts cannot be read.", given=f"{place.url}: no such file", advice=_NO_TABLE)
    ending = place.url.rpartition(".")[2].lower()
    if ending == "parquet":
        raws = _parquet(place, content, ignored)
    elif ending == "csv":
        raws = _csv(place, _text(place, content), ignored)
    else:
        raws = _lines(_text(place, content))
    if not raws:
        raise InputError("There are no prompts in the file.", given=place.url, advice="Write one prompt a line or row.")
    return raws


def _parquet(place: Place, content: bytes, ignored: Iterable[str]) -> list[Raw]:
    pyarrow = arrow()
    from pyarrow import parquet

    try:
        table = parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError("The prompts are no Parquet file.", given=f"{place.url}: {error}", advice=_NO_TABLE) from error
    _check_columns(place, table.column_names, ignored)
    return [Raw(number, f"row {number}", values) for number, values in enumerate(table.to_pylist())]


def _csv(place: Place, text: str, ignored: Iterable[str]) -> list[Raw]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    raws: list[Raw] = []
    try:
        header = next(reader, [])
        _check_columns(place, header, ignored)
        for cells in reader:
            if cells:
                where = f"line {reader.line_num}"
                raws.append(Raw(len(raws), where, _cells(header, cells), text=True))
    except csv.Error as error:
        given = f"{place.url}, line {reader.line_num}: {error}"
        raise InputError("The prompts are no CSV file.", given=given, advice=_NO_TABLE) from error
    return raws


def _cells(header: list[str], cells: list[str]) -> dict[str, str] | InputError:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    return InputError(
        "The row does not have a value for each column.",
        given=f"{len(cells)} values, {len(header)} columns",
        advice="Put values with a comma into quotes.",
    )


def _check_columns(place: Place, columns: list[str], ignored: Iterable[str]) -> None:
    """Refuses columns that are no fields, since a name that is misspelt would be passed over in every row."""
    unknown = sorted({name for name in columns if name not in BY_NAME and name != ID} - set(ignored))
    if unknown:
        raise InputError(
            "The prompts have columns that are no fields of a request.",
            given=f"{place.url}: {', '.join(unknown)}",
            advice=f"Fields are {ID}, {', '.join(BY_NAME)}. Leave columns out with --ignore {unknown[0]}.",
        )
    if "prompt" not in columns or len(set(columns)) < len(columns):
        raise InputError(
            "The prompts need one column called prompt, and no column twice.",
            given=f"{place.url}: {', '.join(columns)}",
            advice="Name the columns in the first line of a CSV file.",
        )


def _lines(text: str) -> list[Raw]:
    """Lines as `hidiff-run generate --prompts` takes them: text, or JSON where a line begins with ``{``."""
    lines = [(f"line {place}", line.strip()) for place, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [Raw(number, where, _line(line)) for number, (where, line) in enumerate(lines)]


def _line(line: str) -> dict[str, Any] | InputError:
    if not line.startswith("{"):
        return {"prompt": line}
    try:
        values: dict[str, Any] = json.loads(line)
    except (ValueError, RecursionError) as error:
        return InputError("The line is not JSON.", given=str(error), advice='Such as {"id": "a", "prompt": "a tree"}.')
    return values


def _text(place: Place, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("The prompts cannot be read.", given=f"{place.url}: {error}", advice=_NO_TABLE) from error
