"""Prompts in tables: CSV, with commas or tabs, and Parquet."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

from hidiff_runtime.errors import InputError
from hidiff_runtime.optional_libraries import optional_library
from hidiff_runtime.prompt_files.detection import header_of, looks_like
from hidiff_runtime.prompt_files.lines import refuse_other
from hidiff_runtime.prompt_files.raw_rows import Columns, Raw
from hidiff_runtime.text_safety import printable

_QUOTES = 'Put a value with commas, quotes or line ends into quotes, and write a quote in it twice: "a 5"" disk".'

_PARQUET = ("Prompts in Parquet need pyarrow", "pip install 'hidiff-runtime[bulk]'. Or write them as .jsonl.")


def read_csv(name: str, text: str, columns: Columns, delimiter: str = ",") -> list[Raw]:
    """Reads a table with a header row; all values are text.

    Raises:
        InputError: it is no such table, or has a column that is no field.
    """
    if looks_like(text) in ("json", "yaml"):
        refuse_other(name, text, "a table with a header row")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    raws: list[Raw] = []
    begun = 1
    try:
        header = [cell.strip() for cell in next(reader, [])]
        _check_delimiter(name, header, delimiter)
        _check_columns(name, header, columns)
        begun = reader.line_num + 1
        for cells in reader:
            if cells:
                raws.append(Raw(len(raws), f"line {begun}", _cells(header, cells), text=True))
            begun = reader.line_num + 1
    except csv.Error as error:
        unclosed = "end of data" in str(error)
        told = "a quote opens a value there and never closes it" if unclosed else str(error)
        raise InputError(
            "The prompts are no CSV file.", given=f"{name}, line {begun}: {told}", advice=_QUOTES
        ) from error
    return raws


def read_parquet(name: str, content: bytes, columns: Columns) -> list[Raw]:
    """Reads a Parquet file. NaN counts as left out: tables with gaps have it.

    Raises:
        InputError: it is none, or has a column that is no field.
        EngineError: pyarrow is not installed.
    """
    pyarrow, parquet = (optional_library(name, *_PARQUET) for name in ("pyarrow", "pyarrow.parquet"))
    try:
        table = parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            "The prompts are no Parquet file.",
            given=f"{name}: {error}",
            advice="Write it again, or give the file the ending of what it is.",
        ) from error
    _check_columns(name, table.column_names, columns)
    try:
        found: list[Any] = [_without_gaps(values) for values in table.to_pylist()]
    except (ValueError, OverflowError):  # a value that Python has none for: its row alone is refused
        found = [_one_row(table, number) for number in range(table.num_rows)]
    return [Raw(number, f"row {number}", values) for number, values in enumerate(found)]


def _one_row(table: Any, number: int) -> dict[str, Any] | InputError:
    try:
        (values,) = table.slice(number, 1).to_pylist()
    except (ValueError, OverflowError) as error:
        return InputError("The row has a value that cannot be read.", given=error, advice="Write text in UTF-8.")
    return _without_gaps(values)


def _without_gaps(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def _cells(header: list[str], cells: list[str]) -> dict[str, str] | InputError:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    return InputError(
        "The row does not have a value for each column.",
        given=f"{len(cells)} values, {len(header)} columns",
        advice=_QUOTES,
    )


def _check_delimiter(name: str, header: list[str], delimiter: str) -> None:
    """Refuses a table whose columns something else divides than its ending says."""
    found = header_of(header[0]) if len(header) == 1 else None
    if found is None or len(found[0]) < 2 or found[1] == delimiter:
        return
    called = {",": "commas", ";": "semicolons", "\t": "tabs"}
    raise InputError(
        f"The columns are divided by {called[found[1]]}, and expected are {called[delimiter]}.",
        given=f"{name}, line 1: {header[0][:60]!r}",
        advice="Save it with commas as .csv, or with tabs as .tsv.",
    )


def _check_columns(name: str, header: list[str], columns: Columns) -> None:
    """Refuses columns that are no fields, since a name that is misspelt would be passed over in every row."""
    unknown = sorted(set(header) - set(columns.names) - set(columns.ignored))
    if "prompt" not in header or len(set(header)) < len(header):
        raise InputError(
            "The prompts need one column called prompt, and no column twice.",
            given=f"{name}: {printable(', '.join(header)[:200])}",
            advice="Name the columns in the first line of a CSV file.",
        )
    if unknown:
        raise InputError(
            "The prompts have columns that are no fields of a request.",
            given=f"{name}: {printable(', '.join(unknown)[:200])}",
            advice=f"Fields are {', '.join(columns.names)}. {columns.unknown.format(name=printable(unknown[0]))}",
        )
