"""What calibration finds: the tensors to quantise, each with its scale and the layers that read it so."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class QuantisedTensor:
    """A tensor that layers read in few bits: rounded to ``scale`` times a number of the type, which is symmetric.

    Args:
        tensor: name of the float16 tensor, a weight or an activation.
        scale: float16 values; one, or one for each channel.
        axis: of the channels; None for one scale.
        uses: name of a node and position of its input, for each place that reads the quantised tensor.
    """

    tensor: str
    scale: tuple[float, ...]
    axis: int | None
    uses: tuple[tuple[str, int], ...]


def to_json(tensors: Iterable[QuantisedTensor]) -> str:
    """As JSON; float16 values keep their exact value."""
    return json.dumps([asdict(tensor) for tensor in tensors])


def from_json(text: str) -> tuple[QuantisedTensor, ...]:
    """Reads what `to_json` wrote."""
    return tuple(
        QuantisedTensor(
            entry["tensor"],
            tuple(entry["scale"]),
            entry["axis"],
            tuple((node, position) for node, position in entry["uses"]),
        )
        for entry in json.loads(text)
    )
