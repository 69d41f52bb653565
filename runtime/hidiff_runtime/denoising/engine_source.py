"""What a denoising run needs of an open bundle."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from hidiff_runtime.backends.device_tensors import DeviceTensors
from hidiff_runtime.backends.protocol import Session
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.phases import Phase
from hidiff_runtime.sampling.scheduler_table import SamplerTable


class EngineSource(Protocol):
    """An open bundle as a run sees it: what it holds, and its engines; `hidiff_runtime.bundle.Bundle` is one."""

    @property
    def root(self) -> Path:
        """The bundle's folder, for messages."""
        ...

    @property
    def manifest(self) -> Manifest:
        """What the bundle holds."""
        ...

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held by a run, since engines are shared by all runs."""
        ...

    @property
    def backend(self) -> str:
        """The name of the backend whose engines run."""
        ...

    def sampler(self, name: str | None = None) -> SamplerTable:
        """Returns a sampler's table; the default sampler's without a name."""
        ...

    def engine(self, phase: Phase, *, upcoming: Phase | None = None) -> Session:
        """Returns a phase's session; ``upcoming`` will be asked for next."""
        ...

    def controlnet_engine(self) -> Session:
        """Returns the ControlNet's session."""
        ...

    def step_engine(self) -> Session:
        """Returns the step graph's session."""
        ...

    def tensors(self) -> DeviceTensors | None:
        """Returns what runs keep on the device; None where the host keeps it."""
        ...
