"""What counts as finite, in numbers and in arrays."""

import math
from typing import Any

import numpy as np
import pytest

from hidiff_runtime.finite_values import count_nonfinite, is_finite


@pytest.mark.parametrize("value", [0, -3, 1.5, 10**300, np.float16(2), np.int64(-1)])
def test_numbers_that_a_float_holds_are_finite(value: Any) -> None:
    assert is_finite(value)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 10**400, np.float32("inf"), True, "1", None, [1.0]])
def test_anything_else_is_not(value: Any) -> None:
    assert not is_finite(value)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nan_and_infinite_values_are_counted(dtype: Any) -> None:
    array = np.zeros((3, 4), dtype)
    assert count_nonfinite(array) == 0
    array[0, 0], array[1, 2], array[2, 3] = np.nan, np.inf, -np.inf
    assert count_nonfinite(array) == 3
    assert count_nonfinite(array[:, 1:2]) == 0


def test_whole_numbers_and_empty_arrays_have_none() -> None:
    assert count_nonfinite(np.arange(3)) == count_nonfinite(np.zeros((0, 2))) == 0
