"""Reference, candidate and their difference side by side, for people to look at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_LARGEST = 1024
"""Longest side of a panel in pixels; larger pictures are shown smaller."""

_TITLE = 18
_GAP = 8


@dataclass(frozen=True)
class SideBySide:
    """Three panels of the first picture of a batch.

    Args:
        panels: uint8 ``[height, width, 3]`` each: reference, candidate, and how far each colour is off, amplified.
        titles: of the panels.
        factor: what the difference is multiplied by: the power of ten that makes the largest one show best.
    """

    panels: tuple[Array, Array, Array]
    titles: tuple[str, str, str]
    factor: float

    @classmethod
    def of(cls, reference: Array, candidate: Array, candidate_name: str) -> SideBySide:
        """Makes them of pictures ``[batch, 3, height, width]`` from 0 to 1.

        A picture that is too large is averaged, but of the difference each block's largest is shown: nothing hides.
        """
        one, other = reference[0].astype(np.float32), candidate[0].astype(np.float32)
        off = np.abs(other - one)
        step = math.ceil(max(off.shape[1:]) / _LARGEST)
        largest = float(off.max())
        factor = 10.0 ** math.floor(-math.log10(largest)) if largest else 1.0
        panels = (_bytes(_blocks(one, step).mean((2, 4))), _bytes(_blocks(other, step).mean((2, 4))))
        difference = _bytes(_blocks(off, step).max((2, 4)) * factor)
        return cls((*panels, difference), ("PyTorch", candidate_name, f"difference x {factor:,.0f}"), factor)

    @property
    def caption(self) -> str:
        """What the panels are, for people."""
        return f"From left to right: {self.titles[0]}, {self.titles[1]}, and their {self.titles[2]}"

    def save(self, path: Path) -> None:
        """Writes a PNG with a title above each panel."""
        from PIL import Image, ImageDraw

        height, width = self.panels[0].shape[:2]
        sheet = Image.new("RGB", (3 * width + 2 * _GAP, _TITLE + height), "white")
        draw = ImageDraw.Draw(sheet)
        for index, (panel, title) in enumerate(zip(self.panels, self.titles, strict=True)):
            left = index * (width + _GAP)
            sheet.paste(Image.fromarray(panel), (left, _TITLE))
            draw.text((left + 2, 3), title, fill="black")
        sheet.save(path)


def _blocks(picture: Array, step: int) -> Array:
    """Returns ``[3, rows, step, columns, step]``: the picture in squares of ``step`` pixels, what is over left out."""
    rows, columns = (side // step for side in picture.shape[1:])
    cut = picture[:, : rows * step, : columns * step]
    return cut.reshape(3, rows, step, columns, step)


def _bytes(picture: Array) -> Array:
    shown: Array = np.rint(np.moveaxis(picture, 0, -1).clip(0, 1) * 255).astype(np.uint8)
    return shown
