"""Every bound that parity is judged by: one table, boundary by precision, each with its reason.

The reference is always float32 PyTorch on the weights as they are stored, after rounding to the recipe's precision.
So a bound measures what the engine's arithmetic adds, not what rounding the checkpoint took away.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING

from hidiff_runtime.verdict import Bound

if TYPE_CHECKING:
    from hidiff_export.recipe import Recipe


class Boundary(str, Enum):
    """What is compared with what; the value is how reports name it."""

    WEIGHTS = "weights against source"
    GRAPH = "graph against PyTorch"
    RANDOM = "engine against PyTorch, random inputs"
    TRAJECTORY = "engine against PyTorch, inputs of a run"
    RUN = "denoiser against diffusers, whole run"

    @property
    def whole_run(self) -> bool:
        """Whether a whole run is judged, not one evaluation."""
        return self is Boundary.RUN


_CALL = {
    "float32": Bound(
        snr_db=80,
        reason="Two float32 evaluations differ by rounding in another order, 110 to 125 dB; a wrong phase or one wrong "
        "shift is below 40 dB.",
    ),
    "float16": Bound(
        snr_db=40,
        reason="float16 keeps 11 bits, which leaves 50 to 60 dB after a UNet's depth; a wrong phase is below 35 dB.",
    ),
    "bfloat16": Bound(
        snr_db=30,
        reason="bfloat16 keeps 8 bits, which leaves 35 to 40 dB after a UNet's depth; a wrong phase is below 25 dB.",
    ),
}
_RUN = {
    "float32": Bound(
        snr_db=60,
        reason="Rounding is carried from step to step and guidance multiplies it; a run on other "
        "shifts is below 30 dB.",
    ),
    "float16": Bound(
        snr_db=35,
        reason="As for one evaluation, less what guidance and the steps add; 35 dB is also where a picture's "
        "difference stops being visible.",
    ),
    "bfloat16": Bound(
        snr_db=25,
        reason="As for one evaluation, less what guidance and the steps add.",
    ),
}
_COPIED = Bound(
    snr_db=200,
    reason="Weights are rounded and copied, never computed: bit for bit, and a tensor that is not counts as a fault.",
)

TOLERANCES: Mapping[tuple[Boundary, str], Bound] = {
    (boundary, precision): _COPIED
    if boundary is Boundary.WEIGHTS
    else (_RUN if boundary.whole_run else _CALL)[precision]
    for boundary in Boundary
    for precision in _CALL
}
"""The bound of each boundary at each precision."""


def bound_for(boundary: Boundary, recipe: Recipe) -> Bound:
    """The bound that a recipe's bundle is judged by: the table's, or the recipe's own where it sets another."""
    bound = TOLERANCES[boundary, recipe.precision.value]
    if boundary is Boundary.WEIGHTS:
        return bound
    own = recipe.parity.run_snr_db if boundary.whole_run else recipe.parity.call_snr_db
    return bound if own == bound.snr_db else Bound(own, f"Set by the recipe in place of {bound.snr_db:g} dB.")
