"""Shifts become what the graph takes: the same for all, or those of each picture in each half of its batch."""

from __future__ import annotations

import numpy as np
import pytest

from hidiff_runtime import InputError
from hidiff_runtime.denoising.window_shifts import graph_shifts

ROWS = np.array([[0, 1, 2], [3, 3, 1]])


@pytest.mark.parametrize(
    ("shifts", "shape", "expected"),
    [
        (ROWS[0], (3,), [0, 1, 2]),
        (ROWS[:1], (3,), [0, 1, 2]),
        (ROWS[[1, 1]], (3,), [3, 3, 1]),
        (ROWS, (2, 3), [[0, 1, 2], [3, 3, 1]]),
        (ROWS, (4, 3), [[0, 1, 2], [3, 3, 1], [0, 1, 2], [3, 3, 1]]),
        (ROWS[0], (2, 3), [[0, 1, 2], [0, 1, 2]]),
        (ROWS[0, :0], (0,), []),
    ],
)
def test_every_latent_gets_its_pictures_shifts(shifts: np.ndarray, shape: tuple[int, ...], expected: list[int]) -> None:
    found = graph_shifts(shifts, shape)
    assert found.dtype == np.int32
    assert found.tolist() == expected


def test_a_graph_that_shifts_all_alike_takes_no_others() -> None:
    with pytest.raises(InputError, match="seeds of their own"):
        graph_shifts(ROWS, (3,))
