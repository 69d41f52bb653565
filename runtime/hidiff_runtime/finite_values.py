"""NaN and infinite values: whether a number or an array holds any."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def is_finite(value: Any) -> bool:
    """Tells whether it is a number that a float can hold, Python's or numpy's."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def count_nonfinite(array: NDArray[Any]) -> int:
    """Counts the NaN and infinite values of an array."""
    return int(array.size - np.count_nonzero(np.isfinite(array)))
