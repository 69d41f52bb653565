"""How alike two pictures are: PSNR and SSIM, in float64.

Pictures are ``[..., height, width]``, from 0 to 1; every leading axis is a channel or another picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_RADIUS = 5
_SIGMA = 1.5
_SMALL = (0.01**2, 0.03**2)
_BAND = 256
"""Rows that are looked at at once, so that large pictures take little memory."""


def unit(image: Array) -> Array:
    """Returns a picture from -1 to 1 as one from 0 to 1, what lies outside clipped, as diffusers saves it."""
    clipped: Array = np.clip(image / 2 + 0.5, 0, 1)
    return clipped


def psnr(reference: Array, candidate: Array) -> float:
    """Computes the peak signal-to-noise ratio in decibels, the peak being 1; infinite when they are equal."""
    error = float(np.mean(np.square(np.asarray(candidate, np.float64) - np.asarray(reference, np.float64))))
    return -10 * math.log10(error) if error else math.inf


def ssim(reference: Array, candidate: Array) -> float:
    """Computes the structural similarity, from -1 to 1; 1 when they are equal.

    Wang, Bovik, Sheikh and Simoncelli 2004 (https://doi.org/10.1109/TIP.2003.819861): means, variances and covariance
    under a Gaussian window of 11x11 with a deviation of 1.5, the mean over every window inside the picture and over
    the channels.

    Raises:
        ValueError: a side is shorter than the window.
    """
    height, width = reference.shape[-2:]
    if min(height, width) <= 2 * _RADIUS:
        raise ValueError(f"SSIM needs sides of {2 * _RADIUS + 1} pixels, not {height}x{width}")
    channels = zip(reference.reshape(-1, height, width), candidate.reshape(-1, height, width), strict=True)
    total = count = 0.0
    for one, other in channels:
        for first in range(0, height - 2 * _RADIUS, _BAND):
            rows = slice(first, first + _BAND + 2 * _RADIUS)
            similar = _similarity(one[rows].astype(np.float64), other[rows].astype(np.float64))
            total, count = total + float(similar.sum()), count + similar.size
    return total / count


def _similarity(one: Array, other: Array) -> Array:
    """Of each window, in the order of their places."""
    mean, other_mean = _windowed(one), _windowed(other)
    variance = _windowed(one * one) - mean**2
    other_variance = _windowed(other * other) - other_mean**2
    covariance = _windowed(one * other) - mean * other_mean
    low, high = _SMALL
    alike = (2 * mean * other_mean + low) * (2 * covariance + high)
    whole: Array = alike / ((mean**2 + other_mean**2 + low) * (variance + other_variance + high))
    return whole


def _windowed(values: Array) -> Array:
    """Returns the weighted mean of every window inside ``values``, first along the rows and then along the columns."""
    tall = values.shape[0] - 2 * _RADIUS
    wide = values.shape[1] - 2 * _RADIUS
    rows: Array = sum((weight * values[shift : shift + tall] for shift, weight in _weights()), np.zeros(1))
    columns: Array = sum((weight * rows[:, shift : shift + wide] for shift, weight in _weights()), np.zeros(1))
    return columns


def _weights() -> Iterator[tuple[int, float]]:
    bell = [math.exp(-(place**2) / (2 * _SIGMA**2)) for place in range(-_RADIUS, _RADIUS + 1)]
    return ((shift, value / sum(bell)) for shift, value in enumerate(bell))
