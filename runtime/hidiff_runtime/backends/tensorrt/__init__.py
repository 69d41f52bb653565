"""TensorRT and TensorRT-RTX: engines that run on NVIDIA GPUs, through cuda-python and without PyTorch.

One package for two libraries whose names are nearly the same; `rtx` holds what only TensorRT-RTX has.
"""

from __future__ import annotations

from hidiff_runtime.backends.protocol import Backend


def backend() -> Backend:
    """Returns this backend, over TensorRT; `hidiff_runtime.backends.tensorrt_rtx` makes the one over TensorRT-RTX."""
    from hidiff_runtime.backends.tensorrt.device import TensorRtBackend

    return TensorRtBackend("tensorrt")
