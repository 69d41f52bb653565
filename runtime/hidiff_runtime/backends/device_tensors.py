"""Tensors that stay on a device from run to run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from numpy.typing import NDArray

from hidiff_runtime.backends.protocol import DeviceArray, DeviceMemory
from hidiff_runtime.format.specs import TensorSpec


class DeviceTensors:
    """A bundle's tensors on its device, by name and shape, kept from run to run: engines meet the same addresses again.

    So an input of guided phases and the same one of phases without guidance, whose batch is half, are two tensors.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory = memory
        self._arrays: dict[tuple[str, tuple[int, ...]], DeviceArray] = {}

    def get(self, spec: TensorSpec, name: str | None = None) -> DeviceArray:
        """Returns the tensor of the spec's shape called ``name``, or as the spec is; new ones have any content.

        Raises:
            EngineError: there is too little memory.
        """
        key = name or spec.name, spec.shape
        if key not in self._arrays:
            self._arrays[key] = self.memory.empty(spec.shape, spec.dtype)
        return self._arrays[key]

    def pick(self, specs: Iterable[TensorSpec]) -> dict[str, DeviceArray]:
        """Returns the tensors of these specs by name."""
        return {spec.name: self.get(spec) for spec in specs}

    def put(self, specs: Iterable[TensorSpec], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Uploads those of ``arrays`` that ``specs`` name."""
        for spec in specs:
            if spec.name in arrays:
                self.memory.upload(arrays[spec.name], self.get(spec))
