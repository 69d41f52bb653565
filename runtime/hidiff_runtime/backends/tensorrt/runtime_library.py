"""The two libraries and CUDA's runtime: imported when they are asked for, and what is missing said in full."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hidiff_runtime.backends.protocol import Availability
from hidiff_runtime.backends.tensorrt.cuda import Cuda
from hidiff_runtime.errors import EngineError

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}

RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""The compute capabilities TensorRT-RTX builds for; the data centre's Hopper GPUs take TensorRT."""


@dataclass(frozen=True)
class GpuInfo:
    """A CUDA device of this machine.

    Args:
        index: as CUDA counts them.
        name: such as ``NVIDIA GeForce RTX 4090``.
        target: its compute capability, such as ``sm89``.
    """

    index: int
    name: str
    target: str

    def __str__(self) -> str:
        return f"{self.name} ({self.target})"


@dataclass(frozen=True)
class LoadedLibrary:
    """A library that was imported, and CUDA's runtime beside it.

    Args:
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        trt: the module.
        cuda: the runtime.
    """

    backend: str
    trt: Any
    cuda: Cuda

    @property
    def title(self) -> str:
        """The library's name as people write it."""
        return _TITLES[self.backend]

    @property
    def version(self) -> str:
        """Such as ``1.7.1.116``."""
        return str(self.trt.__version__)

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX."""
        return self.backend == "tensorrt-rtx"

    def gpus(self) -> tuple[GpuInfo, ...]:
        """Returns the GPUs of this machine.

        Raises:
            EngineError: NVIDIA's driver is missing or too old, or there is no GPU.
        """
        return tuple(GpuInfo(index, *self.cuda.describe(index)) for index in range(self.cuda.device_count()))

    def gpu(self, index: int) -> GpuInfo:
        """Returns the GPU that CUDA counts as ``index``. Raises EngineError as `gpus` does, or if there are fewer."""
        found = self.gpus()
        if index >= len(found):
            raise EngineError(
                f"There is no GPU {index} here.",
                given=", ".join(f"{gpu.index}: {gpu}" for gpu in found),
                advice="Choose another with device=, or make it visible in CUDA_VISIBLE_DEVICES.",
            )
        return found[index]


def load(backend: str) -> LoadedLibrary:
    """Imports the library of ``backend``, and CUDA's runtime; touches no GPU.

    Raises:
        EngineError: one of them is not installed, or does not load.
    """
    extra = f"pip install 'hidiff-runtime[{backend}]'"
    trt = _import(_MODULES[backend], f"{_TITLES[backend]} is not here.", extra)
    cuda = _import("cuda.bindings.runtime", "cuda-python is not here.", extra)
    return LoadedLibrary(backend, trt, Cuda(cuda))


def _import(name: str, summary: str, advice: str) -> Any:
    try:
        return import_module(name)
    except Exception as error:  # a shared library that is missing or does not fit raises whatever its loader likes
        raise EngineError(summary, given=f"{type(error).__name__}: {error}", advice=advice) from error


def available(backend: str) -> Availability:
    """Returns whether ``backend`` can run here: library, driver and GPU; never raises."""
    try:
        library = load(backend)
        gpus = library.gpus()
    except EngineError as error:
        detail = error.summary if error.given is None else f"{error.summary} {error.given}"
        return Availability(False, detail, error.advice)
    return Availability(True, f"{library.title} {library.version} on {', '.join(map(str, gpus))}")
