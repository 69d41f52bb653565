"""Every bound that parity is judged by: one table, boundary by precision, each with its reason.

The reference is always float32 PyTorch on the weights as they are stored, after rounding to the recipe's precision.
So a bound measures what the engine's arithmetic adds, not what rounding the checkpoint took away.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING

from hidiff_export.recipe.values import Precision
from hidiff_runtime.verdict import Bound

if TYPE_CHECKING:
    from hidiff_export.recipe import Recipe


class Boundary(str, Enum):
    """What is compared; the value is how reports name it.

    - ``WEIGHTS``: the stored tensors with a source's;
    - ``TRAJECTORY``: an engine with PyTorch, on inputs of a whole run; ``RANDOM``: on random ones;
    - ``GRAPH``: the portable graph, as it is before a backend's lowering, with PyTorch;
    - ``FLOAT16_GRAPH``: the float16 graph that a quantised portable graph was made from, with PyTorch;
    - ``CONTROLNET``: the ControlNet's engine with PyTorch, the worst of its residuals;
    - ``RUN``: the denoiser's latents with those of diffusers' pipeline;
    - ``RECORDED_CALL``, ``RECORDED_STEP``, ``RECORDED_RUN``: engine and denoiser with what the build recorded.
    """

    WEIGHTS = "weights"
    TRAJECTORY = "engine, in a run"
    RANDOM = "engine, random"
    GRAPH = "graph, random"
    FLOAT16_GRAPH = "float16 graph, random"
    CONTROLNET = "ControlNet, random"
    RUN = "whole run"
    RECORDED_CALL = "recorded call"
    RECORDED_STEP = "recorded step"
    RECORDED_RUN = "recorded run"

    @property
    def whole_run(self) -> bool:
        """Whether steps of a run are judged, not one evaluation."""
        return self in (Boundary.RUN, Boundary.RECORDED_STEP, Boundary.RECORDED_RUN)

    @property
    def quantised(self) -> bool:
        """Whether a quantised recipe has it quantised: the phases and what runs them."""
        return self not in (Boundary.WEIGHTS, Boundary.FLOAT16_GRAPH, Boundary.CONTROLNET)


# Measured on fabricated weights of every family. One evaluation: 110 to 125 dB in float32, 56 to 58 in float16, 38 to
# 40 in bfloat16; with a single window shift wrong 18 to 36, in another phase's graph below 8.
_CALL = {
    "float32": Bound(
        snr_db=80,
        reason="Rounding in another order leaves 110 to 125 dB; one wrong shift gives 36 at most.",
    ),
    "float16": Bound(
        snr_db=40,
        reason="11 bits leave 56 dB after a UNet's depth; one wrong shift gives 36 at most.",
    ),
    "bfloat16": Bound(
        snr_db=30,
        reason="8 bits leave 38 dB after a UNet's depth; a wrong phase gives 8 at most, one wrong shift 18 to 36.",
    ),
    "int8": Bound(
        snr_db=20,
        reason="8 bits over a tensor's range leave 27 dB after a UNet's depth; a wrong phase gives 9, wrong shifts 16.",
    ),
    "fp8": Bound(
        snr_db=15,
        reason="4 significant bits leave 18 to 25 dB after a UNet's depth; a wrong phase gives 9 at most.",
    ),
}
_RUN = {
    "float32": Bound(
        snr_db=60,
        reason="Steps carry rounding on and guidance multiplies it, which leaves 100 to 115 dB in a short run.",
    ),
    "float16": Bound(
        snr_db=35,
        reason="Steps carry rounding on and guidance multiplies it; 35 dB is where a difference stops being visible.",
    ),
    "bfloat16": Bound(
        snr_db=25,
        reason="Steps carry rounding on and guidance multiplies it; with other shifts all through it is below 15 dB.",
    ),
    "int8": Bound(
        snr_db=15,
        reason="Steps carry the error on and guidance multiplies it, which leaves 24 dB in a short run.",
    ),
    "fp8": Bound(
        snr_db=10,
        reason="Steps carry the error on and guidance multiplies it, which leaves 15 dB in a short run.",
    ),
}
_COPIED = Bound(
    snr_db=200,
    reason="Weights are rounded and copied, never computed: bit for bit, and a tensor that is not counts as a fault.",
)


def _bound(boundary: Boundary, precision: Precision) -> Bound:
    if boundary is Boundary.WEIGHTS:
        return _COPIED
    judged = precision if boundary.quantised else precision.stored
    return (_RUN if boundary.whole_run else _CALL)[judged.value]


TOLERANCES: Mapping[tuple[Boundary, str], Bound] = {
    (boundary, precision.value): _bound(boundary, precision) for boundary in Boundary for precision in Precision
}
"""The bound of each boundary at each precision."""


def bound_for(boundary: Boundary, recipe: Recipe) -> Bound:
    """The bound that a recipe's bundle is judged by: the table's, or the recipe's own where it sets another."""
    bound = TOLERANCES[boundary, recipe.precision.value]
    if boundary is Boundary.WEIGHTS or (recipe.precision.quantised and not boundary.quantised):
        return bound
    own = recipe.parity.run_snr_db if boundary.whole_run else recipe.parity.call_snr_db
    return bound if own == bound.snr_db else Bound(own, f"Set by the recipe in place of {bound.snr_db:g} dB.")
