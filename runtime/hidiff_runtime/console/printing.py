"""What commands print: results to standard output, progress to standard error."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from hidiff_runtime.errors import HidiffError, StorageError
from hidiff_runtime.text_safety import printable


def progress(text: str, end: str = "") -> None:
    """Writes over the last line of a terminal; elsewhere writes lines that end."""
    if sys.stderr.isatty():
        write(f"\r\x1b[K{text}{end}", sys.stderr)
    elif end:
        write(f"{text}{end}", sys.stderr)


def tell_error(error: HidiffError) -> None:
    """Writes an error to standard error; what was given may hold what terminals obey, which is escaped."""
    lines = [printable(line) for line in str(error).split("\n")]
    write("error: " + "\n".join(lines) + "\n", sys.stderr)


def write(text: str, stream: TextIO) -> None:
    """Writes at once, so that both streams come in turn; escapes what the terminal cannot show.

    Raises:
        StorageError: results have no place, or nobody reads them; what is shown of progress may be lost.
    """
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError as error:
        _discard(stream)
        if stream is not sys.stderr:
            raise StorageError(
                "The results cannot be printed.", given=error.strerror, advice="Print them elsewhere."
            ) from error


def _discard(stream: TextIO) -> None:
    """Lets go of what the stream still holds, which would fail once more when Python ends."""
    with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
