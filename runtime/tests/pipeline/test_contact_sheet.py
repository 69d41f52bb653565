from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.contact_sheet import GAP, Cell, contact_sheet, spread

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]


def cells(size: tuple[int, int] = (60, 30)) -> list[Cell]:
    return [Cell(Image.new("RGB", size, colour), f"seed {number}") for number, colour in enumerate(COLOURS)]


def test_every_picture_is_there_once_row_by_row() -> None:
    sheet = contact_sheet(cells(), columns=2, side=60)
    assert sheet.width == GAP + 2 * (60 + GAP)
    found = np.asarray(sheet).reshape(-1, 3)
    for colour in COLOURS:
        assert (found == colour).all(axis=1).sum() == 60 * 30
    pitch = (sheet.height - GAP) // 3
    places = [(GAP + 5 + column * (60 + GAP), GAP + 5 + row * pitch) for row in range(3) for column in range(2)]
    assert [sheet.getpixel(place) for place in places[:5]] == COLOURS


def test_a_sheet_is_about_square_and_places_may_stay_empty() -> None:
    five = contact_sheet(cells((50, 50)), side=50)
    assert five.width == GAP + 3 * (50 + GAP)
    gap = contact_sheet([cells()[0], None, cells()[1]], columns=3, side=60)
    assert gap.getpixel((GAP + 60 + GAP + 5, GAP + 5)) == (250, 250, 250)
    assert gap.getpixel((GAP + 2 * (60 + GAP) + 5, GAP + 5)) == COLOURS[1]


def test_pictures_are_fitted_and_captions_stay_below_their_own() -> None:
    long = "a very long prompt that says everything twice, " * 8
    words = [Cell(Image.new("RGB", (1000, 500), (0, 0, 0)), text) for text in (long, "", "é" * 300)]
    sheet = np.asarray(contact_sheet(words, columns=3, side=100)).astype(int)
    below = sheet[GAP + 50 :]
    inked = np.flatnonzero((below < 200).all(axis=2).any(axis=0)) - GAP
    assert {int(column) // (100 + GAP) for column in inked} == {0, 2}
    assert all(column % (100 + GAP) < 100 for column in inked)


def test_what_a_font_does_not_have_becomes_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hidiff_runtime.pipeline.contact_sheet.FONTS", ())
    black = Image.new("RGB", (100, 50))
    found, plain, other = (
        np.asarray(contact_sheet([Cell(black, words)], side=100)) for words in ("灯 x", "? x", "! x")
    )
    assert np.array_equal(found, plain)
    assert not np.array_equal(found, other)


def test_nothing_is_no_sheet() -> None:
    for nothing in ([], [None]):
        with pytest.raises(InputError, match="needs pictures"):
            contact_sheet(nothing)


def test_places_are_spread_from_the_first_to_the_last() -> None:
    assert spread(3, 8) == (0, 1, 2)
    assert spread(20, 8)[0] == 0
    assert spread(20, 8)[-1] == 19
    assert len(set(spread(20, 8))) == 8
