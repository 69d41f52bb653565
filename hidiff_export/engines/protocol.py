"""What a builder is: something that turns portable graphs into what a backend's sessions open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hidiff_runtime.format.manifest import GraphRecord

Report = Callable[[float, float, str], None]
"""``report(done, total, note)``: how far the work is, in units of its own, and what it is doing."""


@dataclass(frozen=True)
class PortableGraph:
    """A graph to build an engine from.

    Args:
        path: of the portable ONNX file; the weight store that it points into lies beside it.
        record: what goes in and out; a `PhaseRecord` for a phase of the UNet.
    """

    path: Path
    record: GraphRecord


class Builder(Protocol):
    """Builds engines for one backend."""

    @property
    def name(self) -> str:
        """The backend's name, in the manifest and in recipes."""

    def check(self) -> None:
        """Refuses early, before anything is written.

        Raises:
            EngineError: the backend's library is missing, or builds nothing for a target of the recipe on this machine.
        """

    def key(self) -> Any:
        """Returns what engines depend on beside graphs and weights: targets, options, the library's version; JSON."""

    def engines(self, graphs: Sequence[PortableGraph]) -> tuple[Path, ...]:
        """Returns where the engine of each graph goes: beside the graph."""

    def build(self, graphs: Sequence[PortableGraph], report: Report) -> tuple[Path, ...]:
        """Builds the engine of each graph; leaves nothing half-written when it fails.

        Args:
            graphs: all graphs of the bundle.
            report: told how far the building is.

        Returns:
            Every file that was written, the engines among them.

        Raises:
            ExportError: a graph cannot be lowered for this backend.
            EngineError: the backend's library failed.
            OSError: a file cannot be written.
        """
