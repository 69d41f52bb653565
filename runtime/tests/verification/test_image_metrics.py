"""PSNR and SSIM beside their definitions written out, window by window."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hidiff_runtime.verification.image_metrics import psnr, ssim, unit

RNG = np.random.default_rng(0)
SMOOTH = np.clip(np.cumsum(RNG.normal(0, 0.05, (3, 24, 31)), axis=-1) + 0.5, 0, 1)


def ssim_by_definition(one: np.ndarray, other: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, for each window on its own."""
    place = np.arange(-5, 6)
    window = np.exp(-(place[:, None] ** 2 + place[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for a, b in zip(one, other, strict=True):
        for row in range(a.shape[0] - 10):
            for column in range(a.shape[1] - 10):
                x, y = (picture[row : row + 11, column : column + 11] for picture in (a, b))
                mean_x, mean_y = (window * x).sum(), (window * y).sum()
                var_x, var_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
                covariance = (window * (x - mean_x) * (y - mean_y)).sum()
                numerator = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
                found.append(numerator / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)))
    return float(np.mean(found))


@pytest.mark.parametrize("noise", [0.002, 0.05, 0.5])
def test_ssim_is_its_definition(noise: float) -> None:
    other = np.clip(SMOOTH + RNG.normal(0, noise, SMOOTH.shape), 0, 1)
    assert ssim(SMOOTH, other) == pytest.approx(ssim_by_definition(SMOOTH, other), abs=1e-12)
    assert ssim(SMOOTH, other) == pytest.approx(ssim(other, SMOOTH), abs=1e-12)


def test_a_picture_of_many_bands_is_the_same_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    other = np.clip(SMOOTH + RNG.normal(0, 0.1, SMOOTH.shape), 0, 1)
    whole = ssim(SMOOTH, other)
    monkeypatch.setattr("hidiff_runtime.verification.image_metrics._BAND", 3)
    assert ssim(SMOOTH, other) == pytest.approx(whole, abs=1e-12)


def test_equal_pictures_and_opposite_ones() -> None:
    assert ssim(SMOOTH, SMOOTH) == pytest.approx(1, abs=1e-12)
    assert psnr(SMOOTH, SMOOTH) == math.inf
    checked = np.indices((24, 31)).sum(axis=0) % 2.0
    assert ssim(checked, 1 - checked) < -0.9
    assert psnr(checked, 1 - checked) == 0


def test_psnr_is_of_the_mean_square_with_a_peak_of_one() -> None:
    assert psnr(np.full((3, 16, 16), 0.5), np.full((3, 16, 16), 0.51)) == pytest.approx(40)


def test_a_picture_from_minus_one_to_one_is_clipped() -> None:
    np.testing.assert_array_equal(unit(np.array([-2.0, -1, 0, 0.5, 3])), [0, 0, 0.5, 0.75, 1])


def test_a_picture_smaller_than_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="10x16"):
        ssim(np.zeros((10, 16)), np.zeros((10, 16)))
