"""Where tables are printed, and how far long work has come: on standard error, as standard output is for results."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from hidiff_export.compiler.stages.stage import Report

_PIPED_WIDTH = 100


def console() -> Console:
    """Returns standard output, as wide as the terminal; 100 columns where it goes to a file or a pipe."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else _PIPED_WIDTH)


class ProgressDisplay:
    """One bar a stage, with the time it has taken and the time left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @contextmanager
    def stage(self, title: str, *, reused: bool) -> Iterator[Report]:
        """Shows a stage's bar until it ends; a reused stage is shown as done."""
        task = self._progress.add_task(title, total=None, note="")

        def report(done: float, total: float, note: str) -> None:
            self._progress.update(task, completed=done, total=total, note=note)

        yield report
        note = "already there" if reused else "done"
        self._progress.update(task, completed=1, total=1, note=note)
        self._progress.stop_task(task)

    def notice(self, text: str) -> None:
        """Prints a line above the bars."""
        self._progress.console.print(f"note: {text}", style="yellow", markup=False, highlight=False)


@contextmanager
def progress_display(*, quiet: bool) -> Iterator[ProgressDisplay]:
    """Yields a display on standard error, so that standard output stays for results."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True, quiet=quiet)) as progress:
        yield ProgressDisplay(progress)
