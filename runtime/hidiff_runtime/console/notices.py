"""What the library tells while it works, as lines on standard error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hidiff_runtime.console.printing import write
from hidiff_runtime.text_safety import printable

NOTICES = logging.getLogger("hidiff_runtime.backend_choice")
"""Whose notices are for whoever runs a command, beside everybody's warnings."""


class _Lines(logging.Handler):
    """Writes each record as a line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes it at once, for what it announces may take long."""
        write(f"{printable(record.getMessage())}\n", sys.stderr)


@contextmanager
def notices_shown() -> Iterator[None]:
    """Shows what the library tells while the block runs."""
    lines, level = _Lines(), NOTICES.level
    NOTICES.addHandler(lines)
    NOTICES.setLevel(logging.INFO)
    try:
        yield
    finally:
        NOTICES.removeHandler(lines)
        NOTICES.setLevel(level)
