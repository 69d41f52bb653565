"""Contact sheets: pictures side by side with what they are, and the previews of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.image_processing import pillow

if TYPE_CHECKING:
    from PIL.Image import Image

CELL = 384
"""The longer side of a picture in a sheet, in pixels."""

FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "Arial Unicode.ttf", "Helvetica.ttc")
"""Fonts for captions, the first that is installed."""

GAP = 12
_TEXT, _LINE = 13, 17
_PAPER, _INK = (250, 250, 250), (40, 40, 40)
_LINES = 2
_UNASSIGNED = "\U0010fffd"


@dataclass(frozen=True)
class Cell:
    """A picture and what is written below it, at most two lines of it."""

    image: Image
    caption: str


def contact_sheet(cells: Sequence[Cell | None], columns: int | None = None, side: int = CELL) -> Image:
    """Returns all pictures in rows, each fitted into a square of ``side`` pixels, with its caption below.

    Args:
        cells: row by row; None leaves a place empty.
        columns: pictures in a row; as many as make the sheet about square, if left out.
        side: of a square, in pixels; smaller pictures are enlarged to it.

    Raises:
        InputError: there are no pictures.
        EngineError: Pillow is not installed.
    """
    taken = [(place, cell) for place, cell in enumerate(cells) if cell is not None]
    if not taken:
        raise InputError("A sheet needs pictures.", given="none", advice="Give at least one.")
    image_module = pillow()
    from PIL import ImageDraw

    columns = columns or math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / columns)
    pictures = [_fitted(cell.image, side) for _, cell in taken]
    wide, tall = max(picture.width for picture in pictures), max(picture.height for picture in pictures)
    text = _LINES * _LINE + GAP
    size = (GAP + columns * (wide + GAP), GAP + rows * (tall + text + GAP // 2))
    sheet: Image = image_module.new("RGB", size, color=_PAPER)
    draw, font = ImageDraw.Draw(sheet), _font()
    for (place, cell), picture in zip(taken, pictures, strict=True):
        left = GAP + place % columns * (wide + GAP)
        top = GAP + place // columns * (tall + text + GAP // 2)
        sheet.paste(picture, (left, top))
        for line, words in enumerate(_wrapped(cell.caption, wide, font)):
            draw.text((left, top + picture.height + 4 + line * _LINE), words, fill=_INK, font=font)
    return sheet


def spread(count: int, most: int) -> tuple[int, ...]:
    """Picks at most ``most`` of the places 0 to ``count`` - 1, evenly spread, the first and the last among them."""
    if count <= most:
        return tuple(range(count))
    return tuple(round(place * (count - 1) / (most - 1)) for place in range(most))


def _fitted(image: Image, side: int) -> Image:
    """Returns the picture with its longer side of this length."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resampling = pillow().Resampling
    return image.convert("RGB").resize(size, resampling.LANCZOS if scale <= 1 else resampling.BICUBIC)


def _font() -> Any:
    """Returns a font of this machine that has most letters, or Pillow's own, which has English alone."""
    from PIL import ImageFont

    for name in FONTS:
        try:
            return ImageFont.truetype(name, _TEXT)
        except OSError:
            continue
    return ImageFont.load_default(_TEXT)


def _drawable(text: str, font: Any) -> str:
    """Returns the text with a question mark for each character that the font draws as it draws what is none."""
    missing = bytes(font.getmask(_UNASSIGNED))
    return "".join(letter if letter.isspace() or bytes(font.getmask(letter)) != missing else "?" for letter in text)


def _wrapped(caption: str, width: int, font: Any) -> list[str]:
    """Returns the caption in lines that fit; what has no place becomes an ellipsis."""
    lines: list[str] = []
    rest = _drawable(" ".join(caption.split()), font)
    while rest and len(lines) < _LINES:
        last = len(lines) == _LINES - 1
        cut = _fitting(rest, width, font)
        if cut == len(rest):
            return [*lines, rest]
        if last:
            return [*lines, rest[: max(1, _fitting(rest, width - font.getlength("…"), font))].rstrip() + "…"]
        space = rest.rfind(" ", 1, cut + 1)
        cut = space if space > 0 else max(1, cut)
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return lines


def _fitting(text: str, width: float, font: Any) -> int:
    """Returns how many characters of the text fit the width."""
    count = len(text)
    while count and font.getlength(text[:count]) > width:
        count -= 1
    return count
