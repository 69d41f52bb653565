"""Random inputs for a phase's graph, with the statistics of a real run, from seeds that a bundle can keep in place of
the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from hidiff_export.families.geometry import SHIFTS
from hidiff_runtime.format.manifest import TensorSpec
from hidiff_runtime.format.validation import CONDITIONING_SCALE, CONTROL_IMAGE
from hidiff_runtime.verification.reference_samples import Drawn

Array = NDArray[np.float32]
Given = Array | Drawn
"""An input as numbers, or as the seed they are drawn from."""

_CONDITIONING = 0.8


def drawn(name: str, shape: tuple[int, ...], seed: int) -> Drawn:
    """Returns random numbers for the input ``name``; names differ in their numbers at one seed.

    Standard normal ones: latents scaled by the sampler, CLIP's layer-normalized embeddings and a ControlNet's residuals
    all have a standard deviation of about one. A control image's lie between 0 and 1.
    """
    return Drawn(crc32(f"{name}/{seed}".encode()), shape, uniform=name == CONTROL_IMAGE)


def random_inputs(
    specs: Iterable[TensorSpec], *, timestep: float, width: int, height: int, seed: int
) -> dict[str, Given]:
    """Returns every input but the window shifts; the halves of a doubled batch differ, so that neither is the other.

    Args:
        specs: the graph's inputs.
        timestep: of the training schedule, 0 to 999.
        width: of the picture, in pixels; ``height`` likewise.
        seed: of all numbers.
    """
    inputs: dict[str, Given] = {}
    for spec in specs:
        if spec.name == "timestep":
            inputs[spec.name] = np.array([timestep], dtype=np.float32)
        elif spec.name == CONDITIONING_SCALE:
            inputs[spec.name] = np.array([_CONDITIONING], dtype=np.float32)
        elif spec.name == "time_ids":
            inputs[spec.name] = uncropped(width, height, spec.shape[0])
        elif spec.name != "window_shifts":
            inputs[spec.name] = drawn(spec.name, spec.shape, seed)
    return inputs


def uncropped(width: int, height: int, batch: int) -> Array:
    """Returns SDXL's ``time_ids``, ``[batch, 6]``: original size, no crop, and target size of an uncropped picture."""
    return np.tile(np.array([height, width, 0, 0, height, width], dtype=np.float32), (batch, 1))


def mixed_shifts(shape: tuple[int, ...], seed: int) -> NDArray[np.int32]:
    """Returns window shifts in which every value occurs (with four blocks or more) and no two neighbours are alike, in
    a row or from row to row.
    """
    shifts: NDArray[np.int32] = ((np.indices(shape).sum(axis=0) + seed) % SHIFTS).astype(np.int32)
    return shifts


def arrays(inputs: Mapping[str, Given]) -> dict[str, Array]:
    """Returns the inputs as numbers."""
    return {name: given.array() if isinstance(given, Drawn) else given for name, given in inputs.items()}
