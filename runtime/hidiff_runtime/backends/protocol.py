"""What a backend is to the runtime: something that opens an engine file, and a session that evaluates it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from numpy.typing import NDArray

from hidiff_runtime.manifest import GraphRecord

WeightMap = Mapping[str, Path]
"""The weight stores by model name (``unet``): files that every session of a bundle maps, so that they share memory."""


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run on this machine.

    Args:
        usable: whether its library is there and finds a device.
        detail: version and devices where it is usable, else what is missing.
        advice: how to get it; empty where it is usable.
    """

    usable: bool
    detail: str
    advice: str = ""


class Session(Protocol):
    """An open engine. A context manager: leaving it gives its memory back."""

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluates the engine on one array for each input of its record; outputs are by name.

        Raises:
            EngineError: the engine refuses an input, or fails.
        """
        ...


class Backend(Protocol):
    """A way to run engines."""

    @property
    def name(self) -> str:
        """Its name in manifests and options."""
        ...

    def available(self) -> Availability:
        """Whether it can run here; imports its library if there is one, and never raises."""
        ...

    def open(self, engine: Path, weights: WeightMap, record: GraphRecord, options: Mapping[str, Any]) -> Session:
        """Opens an engine file.

        Args:
            engine: the file.
            weights: the stores it may point into.
            record: of its graph: what goes in and out.
            options: of this backend.

        Raises:
            EngineError: the library is missing, or the engine does not load.
            InputError: an option is not one of this backend's.
        """
        ...
