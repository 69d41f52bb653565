"""How a run is shown while it goes on: step, phase, seconds a step and time left."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hidiff_runtime.console.printing import progress
from hidiff_runtime.pipeline.contact_sheet import Cell, contact_sheet, spread

if TYPE_CHECKING:
    from PIL.Image import Image

    from hidiff_runtime.pipeline.pipeline import PictureStep

PREVIEWS = 8
"""The most previews that are kept of a run."""


@dataclass
class RunProgress:
    """Shows steps and tiles of runs of so many steps as they are done; may keep previews of each first picture."""

    steps: Sequence[int]
    previews: bool
    run: int = 0
    _kept: list[list[Cell]] = field(default_factory=list)
    _done: int = 0
    _seconds: float = 0.0

    def step(self, info: PictureStep) -> None:
        """Shows a finished step."""
        self._done += 1
        self._seconds += info.seconds
        mean = self._seconds / self._done
        left = clock(mean * (sum(self.steps) - self._done))
        self._show(
            f"step {info.step + 1}/{info.steps}  {info.phase.name}  {info.seconds:.3g} s/step  {left} left",
            last=info.step + 1 == info.steps,
        )
        if self.previews and info.step in spread(info.steps, PREVIEWS):
            if info.step == 0:
                self._kept.append([])
            self._kept[-1].append(Cell(info.preview(), f"step {info.step + 1}/{info.steps} {info.phase.name}"))

    def tile(self, done: int, total: int) -> None:
        """Shows a tile that was decoded."""
        if sys.stderr.isatty() and total > 1:
            self._show(f"decoding {done}/{total}", last=done == total)

    def sheet(self) -> Image:
        """Returns the previews that were kept, a row for each run."""
        columns = max(len(run) for run in self._kept)
        cells = [cell for run in self._kept for cell in (*run, *[None] * (columns - len(run)))]
        return contact_sheet(cells, columns, side=192)

    def _show(self, text: str, *, last: bool) -> None:
        place = f"run {self.run + 1}/{len(self.steps)}  " if len(self.steps) > 1 else ""
        progress(place + text, end="\n" if last or not sys.stderr.isatty() else "")


def clock(seconds: float) -> str:
    """Returns ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
