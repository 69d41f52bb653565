"""The backends by name. Each lives in a module of its own, which is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from hidiff_runtime.backends.protocol import (
    Availability,
    Backend,
    Device,
    DeviceArray,
    DeviceMemory,
    Session,
    WeightMap,
)
from hidiff_runtime.errors import InputError

__all__ = [
    "NAMES",
    "Availability",
    "Backend",
    "Device",
    "DeviceArray",
    "DeviceMemory",
    "Session",
    "WeightMap",
    "get",
]

NAMES = ("tensorrt", "tensorrt-rtx", "onnxruntime")
"""Every backend, the one to be preferred first; ``backend`` in the module of that name makes it."""


def get(name: str) -> Backend:
    """Returns the backend called ``name``; its library need not be installed.

    Raises:
        InputError: there is no such backend.
    """
    if name not in NAMES:
        raise InputError("There is no such backend.", given=name, advice=f"Use one of {', '.join(NAMES)}.")
    made: Backend = import_module(f"{__name__}.{name.replace('-', '_')}").backend()
    return made
