"""What the parent asks of a worker, and how the answer calls a failure: JSON, for both sides and people to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hidiff_runtime.format.manifest import TensorSpec

REFUSED, SIGNATURE, STORAGE, MEMORY, MISSING = "refused", "signature", "storage", "memory", "missing"
"""What a failure is of: the library, the graph's inputs and outputs, the disk, memory, something not installed."""


@dataclass(frozen=True)
class Initializer:
    """A weight of the graph: its name there, and its bytes in the weight store."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class BuildRequest:
    """One engine to build.

    Args:
        graph: path of the lowered ONNX file.
        weights: path of the weight store, if the graph has weights.
        initializers: the graph's weights.
        targets: compute capabilities such as ``sm89``; none for the GPU of this machine.
        inputs: what the engine must take, in any order.
        outputs: what it must give, in any order.
        plan: path of the file to write.
        layers: path of the list of layers to write.
        timing_cache: path of the file that keeps the timings of kernels, where the library has one.
    """

    graph: str
    weights: str | None
    initializers: tuple[Initializer, ...]
    targets: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    plan: str
    layers: str
    timing_cache: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns as JSON types."""
        return {"do": "build", **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BuildRequest:
        """Reads what `to_json` gave."""
        values = {field.name: data[field.name] for field in fields(cls)}
        specs = {
            key: tuple(TensorSpec(spec["name"], tuple(spec["shape"]), spec["dtype"]) for spec in data[key])
            for key in ("inputs", "outputs")
        }
        weights = tuple(Initializer(**given) for given in data["initializers"])
        return cls(**{**values, **specs, "initializers": weights, "targets": tuple(data["targets"])})
