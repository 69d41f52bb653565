"""Window shifts as they are drawn, for a run or for each of its pictures, and as a phase's graph takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.errors import InputError


def graph_shifts(shifts: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Returns what a phase's graph takes as ``window_shifts``.

    Args:
        shifts: ``[windowed blocks]`` for all pictures alike, or ``[pictures, windowed blocks]``.
        shape: that the graph takes: ``[windowed blocks]``, or a row for each latent of its batch. With guidance that is
            the pictures twice, once for the negative prompts and once for the prompts.

    Raises:
        InputError: pictures have shifts of their own, and the graph takes them for all alike.
    """
    if not shape[-1]:
        return np.zeros(shape, np.int32)  # no block is windowed
    rows = shifts.reshape(-1, shape[-1]).astype(np.int32, copy=False)
    if len(shape) > 1:
        return np.tile(rows, (shape[0] // len(rows), 1))
    if (rows != rows[0]).any():
        raise own_seeds_refused()
    only: NDArray[np.int32] = rows[0]
    return only


def own_seeds_refused() -> InputError:
    """Returns the error for pictures with seeds of their own where the graphs shift all windows of a batch alike."""
    return InputError(
        "This bundle shifts the windows of all pictures of a batch alike: they cannot have seeds of their own.",
        given="a seed for each picture",
        advice="Give one seed for the batch, or build the bundle again, which gives each picture its own shifts.",
    )
