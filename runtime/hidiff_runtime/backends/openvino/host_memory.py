"""The host's memory as a device's: arrays of numpy, for runs that leave their latents where engines read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.backends.protocol import DeviceArray, check_fits


@dataclass(frozen=True)
class HostArray:
    """A tensor in the host's memory.

    Args:
        shape: static.
        dtype: ``float32`` or ``int32``.
        value: its content.
    """

    shape: tuple[int, ...]
    dtype: str
    value: NDArray[Any]


class HostMemory:
    """The host's memory. Evaluations return when they are done, so their order holds."""

    @property
    def on_host(self) -> bool:
        """True."""
        return True

    def empty(self, shape: tuple[int, ...], dtype: str) -> HostArray:
        """Returns a new tensor."""
        return HostArray(shape, dtype, np.empty(shape, dtype))

    def upload(self, array: NDArray[Any], into: DeviceArray) -> None:
        """Copies before it returns. Raises EngineError for another shape or type than that of ``into``."""
        check_fits(array, into)
        np.copyto(cast(HostArray, into).value, array)

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """Returns a copy."""
        return np.array(cast(HostArray, array).value)
