"""The picture of a verification: what its panels show, and how the difference is amplified."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hidiff_export.verification.side_by_side import SideBySide

GREY = np.full((2, 3, 24, 40), 0.5, np.float32)


def off_by(amount: float) -> np.ndarray:
    """``GREY`` with one pixel's red off by ``amount``."""
    candidate = GREY.copy()
    candidate[0, 0, 3, 5] += amount
    return candidate


@pytest.mark.parametrize(("amount", "factor"), [(0.03, 10), (0.002, 100), (0.0009, 1000), (0.5, 1)])
def test_the_difference_is_amplified_by_the_power_of_ten_that_still_fits(amount: float, factor: float) -> None:
    sheet = SideBySide.of(GREY, off_by(amount), "onnxruntime")

    assert sheet.factor == factor
    difference = sheet.panels[2]
    assert difference[3, 5, 0] == pytest.approx(255 * amount * factor, abs=1)
    assert difference[3, 5, 0] > 25
    assert np.count_nonzero(difference) == 1
    assert f"difference x {factor:,}" in sheet.caption


def test_equal_pictures_show_a_black_difference() -> None:
    sheet = SideBySide.of(GREY, GREY, "onnxruntime")
    assert not sheet.panels[2].any()
    assert sheet.factor == 1


def test_a_large_picture_is_shown_smaller_and_no_difference_gets_lost() -> None:
    reference = np.zeros((1, 3, 1024, 2050), np.float32)
    candidate = reference.copy()
    candidate[0, 1, 1000, 2000] = 0.9

    sheet = SideBySide.of(reference, candidate, "onnxruntime")

    assert sheet.panels[0].shape == (341, 683, 3)
    assert sheet.panels[2][333, 666].tolist() == [0, 230, 0]


def test_the_file_has_the_panels_in_their_order_with_titles(tmp_path: Path) -> None:
    sheet = SideBySide.of(GREY, off_by(0.4), "onnxruntime")

    sheet.save(tmp_path / "picture.png")

    with Image.open(tmp_path / "picture.png") as picture:
        shown = np.asarray(picture)
    assert shown.shape == (24 + 18, 3 * 40 + 2 * 8, 3)
    for index, panel in enumerate(sheet.panels):
        np.testing.assert_array_equal(shown[18:, 48 * index : 48 * index + 40], panel)
    assert (shown[:18] < 128).any()
