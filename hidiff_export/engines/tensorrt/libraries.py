"""The two libraries that one builder serves: what each is called, and how to get it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from hidiff_export.errors import EngineError

TOOL = "polygraphy"
"""Whose loaders build the engines."""


@dataclass(frozen=True)
class BuilderLibrary:
    """A TensorRT.

    Args:
        backend: its name in recipes, manifests and file names; also of the extra that installs it.
        title: its name for people.
        module: what to import.
        least: the oldest version that builds from weights in memory.
        ahead_of_time: whether it builds for GPUs that are not there.
    """

    backend: str
    title: str
    module: str
    least: tuple[int, int]
    ahead_of_time: bool

    @property
    def install(self) -> str:
        """The command that installs it and what building takes besides."""
        return f"pip install 'hidiff-export[{self.backend}]'"

    def missing(self) -> tuple[str, ...]:
        """Returns modules that building takes and this Python does not have; imports none."""
        return tuple(module for module in (self.module, TOOL) if find_spec(module) is None)

    def require(self) -> None:
        """Raises EngineError with the command to run where a module is missing."""
        if missing := self.missing():
            raise EngineError(
                f"{self.title} cannot build here: {' and '.join(missing)} is not installed.",
                given=f"backend: {self.backend}",
                advice=f"{self.install}, or choose another backend in the recipe.",
            )


TENSORRT = BuilderLibrary("tensorrt", "TensorRT", "tensorrt", (10, 13), ahead_of_time=False)
TENSORRT_RTX = BuilderLibrary("tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx", (1, 0), ahead_of_time=True)
