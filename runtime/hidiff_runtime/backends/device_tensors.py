"""Tensors that stay on a device from run to run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from numpy.typing import NDArray

from hidiff_runtime.backends.protocol import DeviceArray, DeviceMemory
from hidiff_runtime.format.specs import TensorSpec


class DeviceTensors:
    """A bundle's tensors on its device, by name, kept from run to run: engines meet the same addresses again."""

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory = memory
        self._arrays: dict[str, DeviceArray] = {}

    def get(self, spec: TensorSpec, name: str | None = None) -> DeviceArray:
        """Returns the tensor ``name``, or of the spec's name; new ones have any content.

        Raises:
            EngineError: there is too little memory.
        """
        name = name or spec.name
        if name not in self._arrays:
            self._arrays[name] = self.memory.empty(spec.shape, spec.dtype)
        return self._arrays[name]

    def pick(self, specs: Iterable[TensorSpec]) -> dict[str, DeviceArray]:
        """Returns the tensors of these names."""
        return {spec.name: self.get(spec) for spec in specs}

    def put(self, specs: Iterable[TensorSpec], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Uploads those of ``arrays`` that ``specs`` name."""
        for spec in specs:
            if spec.name in arrays:
                self.memory.upload(arrays[spec.name], self.get(spec))
