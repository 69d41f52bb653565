"""The figures in the table of float32 operations for sums of 16 bits, which are not true of float32 sums."""

from __future__ import annotations

import math

import pytest

from benchmarks.normalization_sums import sums_db


def mean_db(elements: int, mean: float, dtype: str, *, wide: bool) -> float:
    return sum(sums_db(elements, mean, dtype, wide=wide, seed=seed) for seed in range(5)) / 5


@pytest.mark.parametrize("mean", [0, 20])
@pytest.mark.parametrize("elements", [320, 163840])
@pytest.mark.parametrize(("dtype", "due"), [("float16", 73), ("bfloat16", 55)])
def test_float32_sums_leave_what_the_output_type_holds(dtype: str, due: float, elements: int, mean: float) -> None:
    assert sums_db(elements, mean, dtype, wide=True) == pytest.approx(due, abs=4)


@pytest.mark.parametrize(
    ("dtype", "mean", "due"), [("float16", 0, 68), ("float16", 20, 46), ("bfloat16", 0, 50), ("bfloat16", 20, 29)]
)
def test_16_bit_sums_over_channels_leave_less(dtype: str, mean: float, due: float) -> None:
    assert mean_db(320, mean, dtype, wide=False) == pytest.approx(due, abs=4)


def test_float16_sums_over_a_group_leave_nothing() -> None:
    assert sums_db(163840, 0, "float16", wide=False) == pytest.approx(0, abs=0.1)
    assert math.isnan(sums_db(163840, 1, "float16", wide=False))


def test_bfloat16_sums_over_a_group_lose_a_large_mean() -> None:
    assert sums_db(163840, 0, "bfloat16", wide=False) == pytest.approx(41, abs=2)
    assert sums_db(163840, 20, "bfloat16", wide=False) < 3
