"""What a check on a CPU does not say of a bundle's half-precision arithmetic, and what the bundle's own report does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hidiff_runtime.format.codec import Fields, read_object

if TYPE_CHECKING:
    from hidiff_runtime.bundle import Bundle

GRAPHS = "graphs"
"""Key of a parity report: how the portable graphs were judged, and what came of it."""

_FULL = "float32"


def half_note(bundle: Bundle) -> str:
    """Returns what the figures of engines on the CPU leave open.

    Empty for float32, and for engines that compute in half precision: on another device, and OpenVINO's.

    Raises:
        BundleError: the bundle's parity report is broken.
        EngineError: the device is missing here.
    """
    precision = bundle.manifest.precision
    if precision == _FULL or not bundle.widens_halves:
        return ""
    half = "bfloat16" if precision == "bfloat16" else "float16"
    return (
        f"The engines ran on the CPU, which keeps float32 between the operations of a {half} network: these figures "
        f"hold for the CPU, and do not say whether numbers overflow or lose digits in a GPU's {half} arithmetic. "
        f"{_judged(bundle, half)}"
    )


def _judged(bundle: Bundle, half: str) -> str:
    """Returns what the bundle's parity report says of its graphs in half-precision arithmetic."""
    nothing = f"The bundle holds no verdict on that: 'hidiff-export verify' judges its graphs in {half} arithmetic."
    path = bundle.manifest.report
    if path is None:
        return nothing
    report = read_object(bundle.file(path), path, "The parity report")
    if GRAPHS not in report:  # written by a version that did not judge it
        return nothing
    fields = Fields(report[GRAPHS], path, GRAPHS)
    if fields.text("arithmetic") != half:
        return nothing
    outcome = "within bounds" if fields.flag("ok") else "FAILED"
    return f"By the bundle's parity report its graphs in {half} arithmetic: {outcome}."
