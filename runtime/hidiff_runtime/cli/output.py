"""What commands print: results to standard output, progress to standard error."""

from __future__ import annotations

import sys
from typing import TextIO


def progress(text: str, end: str = "") -> None:
    """Writes over the last line of a terminal; elsewhere writes lines that end."""
    if sys.stderr.isatty():
        write(f"\r\x1b[K{text}{end}", sys.stderr)
    elif end:
        write(f"{text}{end}", sys.stderr)


def write(text: str, stream: TextIO) -> None:
    """Writes at once, so that both streams come in turn; escapes what the terminal cannot show."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()
