"""What a builder is: something that turns a phase's portable graph into what a backend's session opens."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Builder(Protocol):
    """Builds engines for one backend."""

    @property
    def name(self) -> str:
        """The backend's name, in the manifest and in recipes."""
        ...

    def engine_path(self, graph: Path) -> Path:
        """Where the engine of the portable graph at ``graph`` goes: beside it."""
        ...

    def build(self, graph: Path, engine: Path) -> None:
        """Builds an engine.

        Args:
            graph: the portable graph; the weight store lies beside it.
            engine: the file to write, in the same folder.

        Raises:
            ExportError: the graph cannot be lowered for this backend.
            OSError: the file cannot be written.
        """
        ...
