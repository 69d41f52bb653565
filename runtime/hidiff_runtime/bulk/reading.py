"""Prompts of a bulk job, from a folder or a bucket."""

from __future__ import annotations

from collections.abc import Iterable

from hidiff_runtime.bulk.storage import Location, Store
from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.request_fields import BY_NAME
from hidiff_runtime.prompt_files.field_values import ID
from hidiff_runtime.prompt_files.formats import check_ending, read_rows
from hidiff_runtime.prompt_files.raw_rows import Columns, Raw


def read_prompts(place: Location, ignored: Iterable[str] = ()) -> list[Raw]:
    """Returns the rows of a file, by its ending.

    Args:
        place: of the file.
        ignored: columns that may be there and are no fields.

    Raises:
        InputError: there is no such file, it cannot be read, has no rows, or a table has a column that is no field.
        EngineError: a library for files of its ending is not installed.
        StorageError: the place cannot be read.
    """
    check_ending(place.url)
    content = Store(place).read()
    if content is None:
        raise InputError("The prompts cannot be read.", given=f"{place.url}: no such file", advice="Mend the name.")
    columns = Columns((ID, *BY_NAME), tuple(ignored), "Leave columns out with --ignore {name}.")
    return read_rows(place.url, content, columns)
