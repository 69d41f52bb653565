"""The largest magnitudes that a float16 network computes, as float32 PyTorch has them, beside float16's range.

What exceeds float16's largest number is an infinity on a device that computes in float16, and the picture black.
ONNX Runtime on a CPU keeps float32 between operators, so comparing engines there does not show it; these figures do.

A value in the reference is one of few: other prompts and seeds give larger ones, sums are larger on their way than at
their end, and a bias may be added after rounding. Hence the margin: what comes within a factor of `MARGIN` is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hidiff_export.errors import CheckpointError
from hidiff_export.files import write_json
from hidiff_export.recipe.field_types import Target
from hidiff_runtime.format.codec import Fields, read_object
from hidiff_runtime.format.record_codec import AnyText, FloatOrInf, Form, decode, encode, key

if TYPE_CHECKING:
    from hidiff_export.recipe import Recipe

FILE = "magnitudes.json"
"""Beside the reference samples."""

FLOAT16_MAX = 65504.0
"""The largest finite number of float16."""

RANGE = "float16 range"
"""What reports call the comparison."""

MARGIN = 4.0
"""How many times a tensor's magnitude has to fit into float16's range to go without a notice."""

_NAMED = 3
"""How many tensors a notice names."""


@dataclass(frozen=True)
class Magnitude:
    """The largest magnitude of one tensor over all evaluations.

    Args:
        network: whose tensor it is, as the bundle's folders are named.
        tensor: the module that computes it, by the name that its weights have in the bundle; empty for the network
            itself.
        operator: PyTorch's name of the operator: ``linear``, ``mul``, ``add``.
        value: infinite where float32 holds no number either: an infinity or NaN.
        phase: of the UNet's graph; None for other networks.
        step: logical step of that evaluation, from 0; None for a text encoder.
        steps: of its run.
        random: whether its inputs were random ones, not those of a run.
    """

    network: str
    tensor: AnyText
    operator: str
    value: FloatOrInf = field(metadata=key("magnitude"))
    phase: str | None = None
    step: int | None = None
    steps: int | None = None
    random: bool = False

    @property
    def graph(self) -> str:
        """What stands for the graph: a phase's name, or the network's."""
        return self.phase or self.network

    @property
    def headroom(self) -> float:
        """How many times the value fits into float16's range."""
        return FLOAT16_MAX / self.value if self.value else math.inf

    @property
    def name(self) -> str:
        """The tensor, for people."""
        return f"{self.tensor or 'the network itself'} ({self.operator})"

    @property
    def place(self) -> str:
        """Where the tensor is so large."""
        step = "" if self.step is None else f", step {self.step + 1} of {self.steps}"
        return f"{self.graph}{step}{' on random inputs' if self.random else ''}"

    def __str__(self) -> str:
        reaches = "is infinite or NaN in float32 too" if math.isinf(self.value) else f"reaches {figure(self.value)}"
        return f"{self.name} {reaches} in {self.place}"


def _read(fields: Fields, name: str) -> Magnitude:
    def read(inner: Fields) -> Magnitude:
        inner.take("headroom")  # for people
        return decode(Magnitude, inner)

    return fields.nested(name, read)


def _content(one: Magnitude) -> dict[str, Any]:
    return {**encode(one), "headroom": "inf" if math.isinf(one.headroom) else one.headroom}


Entry = Annotated[Magnitude, Form(_read, _content)]


@dataclass(frozen=True)
class Magnitudes:
    """What a record comes to.

    Args:
        largest: of each graph, the largest first.
        near: all that come within a factor of `MARGIN` of float16's largest number or exceed it, the largest first;
            a tensor of several phases once.
    """

    largest: tuple[Entry, ...] = ()
    near: tuple[Entry, ...] = ()

    @classmethod
    def of(cls, found: Iterable[Magnitude]) -> Magnitudes:
        """Makes them of the largest magnitude of each tensor."""
        descending = sorted(found, key=lambda one: -one.value)
        graphs: dict[str, Magnitude] = {}
        near: dict[tuple[str, str, str], Magnitude] = {}
        for one in descending:
            graphs.setdefault(one.graph, one)
            if one.headroom < MARGIN:
                near.setdefault((one.network, one.tensor, one.operator), one)
        return cls(tuple(graphs.values()), tuple(near.values()))

    @property
    def beyond(self) -> tuple[Magnitude, ...]:
        """Those that float16 does not hold."""
        return tuple(one for one in self.near if one.headroom < 1)

    @property
    def notices(self) -> tuple[str, ...]:
        """What a person should know though nothing failed: tensors within the margin."""
        within = tuple(one for one in self.near if one.headroom >= 1)
        if not within:
            return ()
        tensors = "1 tensor comes" if len(within) == 1 else f"{len(within)} tensors come"
        return (
            f"{tensors} within a factor of {MARGIN:g} of float16's largest number, {figure(FLOAT16_MAX)}: "
            f"{_first(within)}. Other prompts and seeds may exceed it; bfloat16 and float32 have room.",
        )

    def refuse_overflow(self, recipe: Recipe) -> None:
        """Raises CheckpointError where a tensor exceeds what float16 holds.

        It is not computed in float32 instead: which tensors are is the same for all weights of a family, so that
        graphs can be kept when the weights are replaced.
        """
        if not self.beyond:
            return
        lower = ", or give its LoRA a lower weight" if recipe.lora else ""
        if math.isinf(self.beyond[0].value):
            raise CheckpointError(
                "The checkpoint computes infinities or NaN, in PyTorch and float32 too.",
                given=_first(self.beyond),
                advice=f"Get the checkpoint again from where it was published{lower}.",
            )
        wider = "float32" if Target.CPU in recipe.targets else "bfloat16 or float32"  # no kernels there for bfloat16
        raise CheckpointError(
            f"The checkpoint computes values beyond float16's largest number, {figure(FLOAT16_MAX)}: infinities, and "
            "black pictures.",
            given=_first(self.beyond),
            advice=f"Build with --set precision={wider}{lower}.",
        )

    @property
    def lines(self) -> tuple[str, ...]:
        """The largest of each graph in a line, with how many times it fits."""
        return tuple(
            f"float16 range: {one}, headroom {figure(one.headroom)}{'' if one.headroom >= 1 else ': FAILED'}"
            for one in self.largest
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as JSON values."""
        return {"limit": FLOAT16_MAX, "margin": MARGIN, **encode(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str) -> Magnitudes:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            BundleError: a field is missing, unknown or of a wrong type.
        """
        fields = Fields(data, source)
        fields.number("limit")
        fields.number("margin")
        return decode(cls, fields)

    def write(self, folder: Path) -> Path:
        """Writes the record into ``folder``; returns the file's path."""
        write_json(folder / FILE, self.to_dict())
        return folder / FILE

    @classmethod
    def read(cls, path: Path) -> Magnitudes:
        """Reads what :meth:`write` wrote. Raises BundleError where it is damaged."""
        return cls.from_dict(read_object(path, path.name, "The record of magnitudes"), path.name)


def figure(value: float) -> str:
    """Returns a magnitude for people."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _first(found: tuple[Magnitude, ...]) -> str:
    more = "" if len(found) <= _NAMED else f"; and {len(found) - _NAMED} more"
    return "; ".join(map(str, found[:_NAMED])) + more
