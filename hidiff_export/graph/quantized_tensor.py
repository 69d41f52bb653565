"""What calibration finds: the tensors to quantize, each with its scale and the layers that read it so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

INT8_LARGEST, FP8_LARGEST = 127, 448
"""The largest number of each type."""

MODELOPT_FP8 = FP8_LARGEST / INT8_LARGEST**2
"""What NVIDIA ModelOpt 0.47 multiplies the largest number that it saw by for an fp8 scale.

It makes the scale from int8's, and multiplies by 448 / 127 where it should divide.
"""


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor that layers read in few bits: rounded to ``scale`` times a number of the type, which is symmetric.

    Args:
        tensor: name of the float16 tensor, a weight or an activation.
        scale: float16 values; one, or one for each channel.
        axis: of the channels; None for one scale.
        uses: name of a node and position of its input, for each place that reads the quantized tensor.
    """

    tensor: str
    scale: tuple[float, ...]
    axis: int | None
    uses: tuple[tuple[str, int], ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantizedTensor:
        """Reads what `dataclasses.asdict` gave, after its way through JSON, which keeps float16 values exactly."""
        uses = tuple((node, position) for node, position in data["uses"])
        return cls(data["tensor"], tuple(data["scale"]), data["axis"], uses)


def fp8_tensor(measured: QuantizedTensor) -> QuantizedTensor:
    """Gives the tensor a scale that uses fp8's range, in place of ModelOpt's, which makes the largest number 36 of 448.

    A weight is what it is: its largest number becomes fp8's largest. What a layer reads differs from run to run, and
    what is out of range is cut off; so activations have room for 3.5 times the largest number that was measured.

    Args:
        measured: with one of ModelOpt's fp8 scales; a weight has an axis.
    """
    share = 1 / (INT8_LARGEST if measured.axis is None else FP8_LARGEST)
    return replace(measured, scale=tuple(_rounded_up(scale / MODELOPT_FP8 * share) for scale in measured.scale))


def _rounded_up(scale: float) -> float:
    """Rounds to float16, never so that what should just fit is cut off, and never to 0, which cannot divide."""
    nearest = np.float16(scale)
    return float(nearest if float(nearest) >= scale else np.nextafter(nearest, np.float16(np.inf)))
