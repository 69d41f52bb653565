"""The tensors of the models: names, Triton's types, and which of the models has them."""

from __future__ import annotations

from dataclasses import dataclass

from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.pipeline.request_fields import FIELDS, Kind

MOST_ROWS = 8
"""Rows of a request: what the models' ``max_batch_size`` is."""

OUTPUT, PREVIEWS = "output", "previews"
"""Inputs beside the request's fields."""

OUTPUTS = ("png", "base64", "uint8")
"""What ``output`` may be; the first where it is left out."""

_DATATYPES: dict[Kind, str] = {
    "text": "TYPE_STRING",
    "whole": "TYPE_INT64",
    "number": "TYPE_FP64",  # float32 has no 0.7: a strength of that would take a step less than the same one elsewhere
    "flag": "TYPE_BOOL",
    "picture": "TYPE_STRING",
}


@dataclass(frozen=True)
class Tensor:
    """A tensor as ``config.pbtxt`` declares it.

    Args:
        name: on the wire.
        datatype: Triton's name of its type.
        dims: without the rows, which come first.
        optional: whether a request may leave it out.
    """

    name: str
    datatype: str
    dims: tuple[int, ...] = (1,)
    optional: bool = False


INPUTS = (
    *(Tensor(field.name, _DATATYPES[field.kind], optional=field.name != "prompt") for field in FIELDS),
    Tensor(OUTPUT, "TYPE_STRING", optional=True),
    Tensor(PREVIEWS, "TYPE_INT64", optional=True),
)
"""Of both models; each has one value a row."""

PROGRESS = (
    Tensor("event", "TYPE_STRING"),
    Tensor("row", "TYPE_INT32"),
    Tensor("step", "TYPE_INT32"),
    Tensor("steps", "TYPE_INT32"),
    Tensor("phase", "TYPE_STRING"),
    Tensor("preview", "TYPE_STRING"),
)
"""Of the stream's messages: ``event`` is ``progress``, ``result`` or, where the front asks, ``error``."""


RESULT = ("image", "pixels", "parameters")
"""Of a finished row: the pictures, in one of the first two tensors, and how they were made."""


def results(manifest: Manifest) -> tuple[Tensor, ...]:
    """Returns the tensors of `RESULT` for a bundle; -1 is a side that its buckets differ in."""
    batch, every = manifest.batch, manifest.whole.manifests
    heights, widths = ({getattr(bucket, side) for bucket in every} for side in ("height", "width"))
    height, width = (sides.pop() if len(sides) == 1 else -1 for sides in (heights, widths))
    return (
        Tensor(RESULT[0], "TYPE_STRING", (batch,)),
        Tensor(RESULT[1], "TYPE_UINT8", (batch, height, width, 3)),
        Tensor(RESULT[2], "TYPE_STRING", (batch,)),
    )
