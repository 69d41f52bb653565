"""Window shifts: by how many quarters of a window each windowed block is rolled in one UNet evaluation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.sampling.torch_rng import TorchGenerator

_EDGES = np.array([0.25, 0.5, 0.75], dtype=np.float32)


def draw_window_shifts(generator: TorchGenerator, count: int) -> NDArray[np.int32]:
    """Shifts of ``count`` windowed blocks in the order they run: int32 ``[count]``, each 0 to 3.

    One uniform r a block, as HiDiffusion draws them: 0 up to r = 0.25, 1 up to 0.5, 2 up to 0.75, else 3.
    """
    return np.searchsorted(_EDGES, generator.rand(count), side="left").astype(np.int32)
