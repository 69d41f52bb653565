"""What a manifest says of single files and graphs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hidiff_runtime.phases import Phase

DTYPES = {"float32": 4, "int32": 4}
"""Types a graph's inputs and outputs may have, and their bytes; other precisions stay inside the graph."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, static shape and type (``float32`` or ``int32``) of a graph's input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """The tensor's size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and the SHA-256 of its content, in hexadecimal."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """The record of the file at ``path`` as it is now."""
        digest = hashlib.sha256()
        size = 0
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
        return cls(size, digest.hexdigest())


@dataclass(frozen=True)
class GraphRecord:
    """A graph, the engines built from it, and what goes in and out.

    Args:
        graph: path of the portable ONNX graph.
        engines: backend name to the path of its engine.
        inputs: in the graph's order.
        outputs: in the graph's order.
    """

    graph: str
    engines: Mapping[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def input(self, name: str) -> TensorSpec | None:
        """The input called ``name``, if the graph has one."""
        return next((spec for spec in self.inputs if spec.name == name), None)


@dataclass(frozen=True)
class PhaseRecord(GraphRecord):
    """One phase of the UNet.

    Args:
        phase: which phase.
    """

    phase: Phase

    @property
    def residuals(self) -> tuple[TensorSpec, ...]:
        """The inputs that take a ControlNet's residuals: ``down_residual_00``, …, ``mid_residual``."""
        return tuple(spec for spec in self.inputs if spec.name.startswith(("down_residual_", "mid_residual")))
