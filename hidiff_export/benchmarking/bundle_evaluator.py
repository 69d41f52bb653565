"""A bundle's UNet, run by the runtime with one of its backends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.backends.protocol import ProfiledSession, Session
from hidiff_runtime.bundle import Bundle
from hidiff_runtime.bundle import open as open_bundle
from hidiff_runtime.denoising.denoiser import OUTPUT
from hidiff_runtime.errors import EngineError


def evaluator(_kind: str, settings: Mapping[str, Any]) -> BundleEvaluator:
    """Returns the bundle of the settings, opened with ``backend``, for the ``size`` in width, height and batch."""
    bundle = open_bundle(
        settings["folder"],
        verify="size",
        backend=settings["backend"],
        loop="host",
        allow_links=settings["allow_links"],
        **settings["options"],
    )
    return BundleEvaluator(bundle.sized(*settings["size"]))


class BundleEvaluator:
    """One engine open at a time, as a run without a limit of memory has it."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._session: Session

    def open(self, phase: str) -> None:
        """Opens the phase's engine, and closes that of another."""
        named = {record.phase.name: record.phase for record in self._bundle.manifest.phases}
        self._session = self._bundle.engine(named[phase])

    def evaluate(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Returns what the engine gives."""
        return self._session.run(inputs)[OUTPUT]

    def operators(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, float]:
        """Returns what the library profiled of an evaluation. Raises EngineError where the backend profiles none."""
        if not isinstance(self._session, ProfiledSession):
            raise EngineError("This backend profiles no operators.", given=self._bundle.backend)
        return self._session.operator_seconds(inputs)
