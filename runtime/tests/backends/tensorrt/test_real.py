"""The real libraries where they are installed: without a driver everything ends in a clear error."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import needs
import numpy as np
import pytest
import toy
from fake_cuda import FakeCuda
from fake_plans import add_engines
from fake_trt import FakeTrt

from hidiff_runtime import EngineError, backends
from hidiff_runtime import open as open_bundle
from hidiff_runtime.backends.tensorrt.cuda import Cuda, CudaError
from hidiff_runtime.backends.tensorrt.logger import logger_of

NO_DRIVER = pytest.mark.skipif(not needs.missing("cuda"), reason="there is a driver")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = toy.make(tmp_path / "bundle", toy.Toy(reference=False))
    add_engines(folder, FakeTrt(FakeCuda()))
    return folder


@pytest.mark.needs("tensorrt-rtx", "cuda-python")
@NO_DRIVER
def test_without_a_driver_a_bundle_does_not_open(bundle: Path) -> None:
    found = backends.get("tensorrt-rtx").available()
    assert not found.usable
    assert "driver is missing" in found.detail
    with pytest.raises(EngineError, match="cannot run here") as caught:
        open_bundle(bundle, backend="tensorrt-rtx")
    assert "nvidia-smi" in caught.value.advice
    with pytest.raises(EngineError, match="driver is missing"), backends.get("tensorrt-rtx").device({}):
        pass


@pytest.mark.needs("tensorrt-rtx", "cuda-python")
@NO_DRIVER
def test_without_a_driver_the_command_line_says_so_and_exits(bundle: Path) -> None:
    command = [sys.executable, "-m", "hidiff_runtime.cli", "check", str(bundle), "--backend", "tensorrt-rtx"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == EngineError.exit_code
    assert "NVIDIA's driver is missing, or too old for this CUDA" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_availability_never_raises(backend: str) -> None:
    found = backends.get(backend).available()
    assert found.detail
    assert found.usable or found.advice


@pytest.mark.needs("tensorrt-rtx")
def test_the_logger_is_one_that_the_library_takes() -> None:
    trt = import_module("tensorrt_rtx")
    logger, messages = logger_of(trt)
    messages.take()
    runtime = trt.Runtime(logger)
    logger.log(trt.ILogger.Severity.ERROR, " what is wrong ")
    logger.log(trt.ILogger.Severity.WARNING, "what may be")
    assert messages.take() == "what is wrong"
    assert messages.take() == ""
    plan = memoryview(bytes(1000))
    validity, diagnosis = runtime.get_engine_validity(plan[: runtime.engine_header_size])
    assert validity == trt.EngineValidity.INVALID
    assert int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE) & int(diagnosis)


@pytest.mark.needs("cuda-python")
@NO_DRIVER
def test_every_call_of_cuda_is_checked() -> None:
    """Without a driver nothing that is asked for works, and each call says so itself."""
    cuda = Cuda(import_module("cuda.bindings.runtime"))
    host = np.zeros(4)
    calls = {
        "device_count": (),
        "describe": (0,),
        "set_device": (0,),
        "free_memory": (),
        "malloc": (256,),
        "malloc_host": (256,),
        "create_stream": (),
        "create_event": (),
        "copy_to_host": (host.ctypes.data, 256, 16, 0),
        "copy_to_device": (256, host.ctypes.data, 16, 0),
        "wait": (0,),
    }
    for name, arguments in calls.items():
        with pytest.raises(CudaError, match="driver is missing") as caught:
            getattr(cuda, name)(*arguments)
        assert caught.value.code == "cudaErrorInsufficientDriver", name
