"""How close to PyTorch each precision has to be: one evaluation and a whole run, each bound with its reason."""

from __future__ import annotations

from typing import NamedTuple

from hidiff_export.recipe.field_types import Precision


class ParityBound(NamedTuple):
    """The least signal-to-noise ratio, in decibels, and why it is that."""

    snr_db: float
    reason: str


# Measured on fabricated weights of every family. One evaluation: 110 to 125 dB in float32, 55 to 61 in float16, 37 to
# 42 in bfloat16, every result rounded (the CPU's engines, which round less often, 60 to 66 in float16); with a single
# window shift wrong 18 to 36, in another phase's graph below 8. Graphs that round keep to the same bounds as engines:
# PyTorch's own half precision is as far off.
CALL_BOUNDS = {
    Precision.FLOAT32: ParityBound(
        80, "Rounding in another order leaves 110 to 125 dB; one wrong shift gives 36 at most."
    ),
    Precision.FLOAT16: ParityBound(40, "11 bits leave 55 dB after a UNet's depth; one wrong shift gives 36 at most."),
    Precision.BFLOAT16: ParityBound(
        30, "8 bits leave 37 dB after a UNet's depth; a wrong phase gives 8 at most, one wrong shift 18 to 36."
    ),
    Precision.INT8: ParityBound(
        20, "8 bits over a tensor's range leave 27 dB after a UNet's depth; a wrong phase gives 9, wrong shifts 16."
    ),
    Precision.FP8: ParityBound(
        15, "4 significant bits leave 18 to 25 dB after a UNet's depth; a wrong phase gives 9 at most."
    ),
}
"""Of one evaluation."""

RUN_BOUNDS = {
    Precision.FLOAT32: ParityBound(
        60, "Steps carry rounding on and guidance multiplies it, which leaves 100 to 115 dB in a short run."
    ),
    Precision.FLOAT16: ParityBound(
        35, "Steps carry rounding on and guidance multiplies it; 35 dB is where a difference stops being visible."
    ),
    Precision.BFLOAT16: ParityBound(
        25, "Steps carry rounding on and guidance multiplies it; with other shifts all through it is below 15 dB."
    ),
    Precision.INT8: ParityBound(
        15, "Steps carry the error on and guidance multiplies it, which leaves 24 dB in a short run."
    ),
    Precision.FP8: ParityBound(
        10, "Steps carry the error on and guidance multiplies it, which leaves 15 dB in a short run."
    ),
}
"""Of a whole run's latents."""
