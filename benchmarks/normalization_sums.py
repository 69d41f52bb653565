"""What sums of 16 bits would cost a normalization, in decibels.

Sums are taken as a GPU takes them: a thread adds up every 32nd or 1024th element, and a tree the threads' sums; every
partial sum is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

TYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ELEMENTS = (320, 1280, 10 * 64 * 64, 10 * 128 * 128)
"""A token's channels, a group's elements."""

MEANS = (0, 1, 4, 20)
EPSILON = 1e-5
_TOKEN = 4096


def sums_db(elements: int, mean: float, dtype: str, *, wide: bool, seed: int = 0) -> float:
    """The signal-to-noise ratio of a normalization, in decibels; not a number where the output has such.

    Args:
        elements: that share a mean and a variance.
        mean: of the elements, whose deviation is 1.
        dtype: of the elements and the output.
        wide: whether sums are exact; else they are of ``dtype`` too.
        seed: of the elements.
    """
    kind = TYPES[dtype]

    def rounded(values: Any) -> Any:
        return np.asarray(values).astype(kind).astype(np.float64)

    given = rounded(np.random.default_rng(seed).standard_normal(elements) + mean)
    exact = _normalized(given, lambda values: values, np.sum)
    threads = 32 if elements < _TOKEN else 1024
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = rounded(exact) if wide else _normalized(given, rounded, lambda v: _rounded_sum(v, rounded, threads))
        return float(10 * np.log10((exact**2).sum() / ((exact - narrow) ** 2).sum()))


def _normalized(values: Any, rounded: Callable[[Any], Any], add: Callable[[Any], Any]) -> Any:
    """Values less their mean, over their deviation; each result is rounded."""
    offsets = rounded(values - rounded(add(values) / values.size))
    variance = rounded(add(rounded(offsets**2)) / values.size)
    return rounded(offsets / np.sqrt(variance + EPSILON))


def _rounded_sum(values: Any, rounded: Callable[[Any], Any], threads: int) -> Any:
    sums = np.zeros(threads)
    for row in values.reshape(-1, threads):
        sums = rounded(sums + row)
    while sums.size > 1:
        sums = rounded(sums[::2] + sums[1::2])
    return sums[0]
