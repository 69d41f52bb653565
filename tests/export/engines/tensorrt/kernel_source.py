"""What the kernels of a plan of TensorRT-RTX say of themselves: the plan carries them as CUDA source."""

from __future__ import annotations

import re
from pathlib import Path

from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord

PREBUILT_NORMALIZATION = "__myl_Inor"
"""A kernel that comes compiled with the library, so that nothing is to be read of it.

It stands in for a generated one where a group's channels are no multiple of two or four, which happens at tiny widths.
"""


def source(plan: Path) -> str:
    """The text of a plan that is one file."""
    return plan.read_bytes().decode("latin-1")


def source_of(record: Path) -> str:
    """The text of the plan that a record is of."""
    return b"".join(part.read_bytes() for part in PlanRecord.read(record).paths(record)).decode("latin-1")


def kernels(text: str) -> list[str]:
    """Names of the kernels in the order that they run in."""
    return re.findall(r"function=\{ name=(\w+)", text)


def reductions(text: str, operation: str) -> set[str]:
    """Types in which reductions by ``Add``, ``Max`` or the like are computed."""
    return set(re.findall(rf"\b{operation}Op<__myln_(\w+)>,", text))


def group_sums(text: str) -> set[str]:
    """Types in which fused group normalizations take means and variances."""
    return set(re.findall(r"norm\w*<__myln_(\w+),", text))
