"""Where tiles lie, and that what they count adds up to a whole."""

from __future__ import annotations

import numpy as np
import pytest

from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.tiling import TileAxis, TilePlan

AXES = [(8, 8, 0), (9, 8, 0), (9, 8, 3), (16, 8, 0), (17, 8, 1), (30, 8, 2), (64, 8, 7), (256, 80, 8), (512, 80, 8)]


@pytest.mark.parametrize("axis", AXES)
def test_tiles_reach_from_end_to_end_and_overlap_enough(axis: tuple[int, int, int]) -> None:
    length, tile, overlap = axis
    starts = TileAxis(*axis).starts
    assert (starts[0], starts[-1] + tile) == (0, length)
    gaps = np.diff(starts)
    assert len(starts) == 1 or (gaps.max() <= tile - overlap and gaps.min() >= gaps.max() - 1)
    fewer = len(starts) - 1
    assert fewer * tile - max(0, fewer - 1) * overlap < length  # one tile less would not do


@pytest.mark.parametrize("scale", [1, 8])
@pytest.mark.parametrize("axis", AXES)
def test_shares_add_up_to_one_and_fall_towards_the_edges(axis: tuple[int, int, int], scale: int) -> None:
    found = TileAxis(*axis)
    shares = found.shares(scale)
    assert shares.dtype == np.float32
    total = np.zeros(found.length * scale)
    for start, share in zip(found.starts, shares, strict=True):
        total[start * scale : (start + found.tile) * scale] += share
        assert (share > 0).all()
        peak = int(share.argmax())
        assert (np.diff(share[: peak + 1]) >= 0).all()
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert (shares[0][: found.tile * scale // 8] == 1).all() or len(shares) > 2


def test_two_tiles_change_over_in_a_straight_line() -> None:
    left, right = TileAxis(12, 8, 4).shares()
    np.testing.assert_allclose(left, [1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125])
    np.testing.assert_allclose(right, left[::-1])


def test_a_plan_goes_row_by_row_at_any_scale() -> None:
    plan = TilePlan.of((12, 8), (8, 5), 1)
    assert len(plan) == 4
    corners = [(rows.start, columns.start) for rows, columns in plan.places()]
    assert corners == [(0, 0), (0, 3), (4, 0), (4, 3)]
    assert [(rows.stop, columns.stop) for rows, columns in plan.places(8)] == [(64, 40), (64, 64), (96, 40), (96, 64)]
    whole = np.zeros((96, 64))
    for (rows, columns), share in zip(plan.places(8), plan.shares(8), strict=True):
        whole[rows, columns] += share
    np.testing.assert_allclose(whole, 1, rtol=1e-6)


def test_an_axis_of_one_tile_needs_no_overlap() -> None:
    plan = TilePlan.of((20, 4), (8, 4), 6)
    assert (len(plan.rows.starts), plan.columns.starts) == (7, (0,))
    assert (plan.columns.shares() == 1).all()


@pytest.mark.parametrize("axis", [(7, 8, 0), (16, 8, 8), (16, 8, -1), (16, 0, 0)])
def test_tiles_that_cannot_be(axis: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="Tiles must be"):
        TileAxis(*axis)
