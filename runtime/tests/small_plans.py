"""One small graph for the fake libraries: its plans, what they compute, and devices that run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from fake_plans import record_of, write_plan
from fake_trt import FakeTrt, Kernel

from hidiff_runtime import backends
from hidiff_runtime.backends.tensorrt.device import TensorRtDevice
from hidiff_runtime.format.manifest import GraphRecord, TensorSpec

X = TensorSpec("x", (2, 3), "float32")
SHIFTS = TensorSpec("shifts", (3,), "int32")
Y = TensorSpec("y", (2, 3), "float32")
GRAPH = GraphRecord("g.onnx", {}, (X, SHIFTS), (Y,))


def scaled(factor: float) -> Kernel:
    return lambda inputs: {"y": inputs["x"] * np.float32(factor) + inputs["shifts"]}


KERNELS: dict[str, Kernel] = {"double": scaled(2), "triple": scaled(3)}
INPUTS = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "shifts": np.array([3, 1, 2], np.int32)}
DOUBLED = INPUTS["x"] * 2 + INPUTS["shifts"]


def device_of(trt: FakeTrt, **options: Any) -> TensorRtDevice:
    made = backends.get("tensorrt-rtx" if trt.rtx else "tensorrt").device(options)
    assert isinstance(made, TensorRtDevice)
    return made


def written(folder: Path, trt: FakeTrt, kernel: str = "double", **more: Any) -> Path:
    return write_plan(folder, kernel, record_of(trt, GRAPH), kernel, **more)
