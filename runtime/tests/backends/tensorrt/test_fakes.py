"""The fakes are what they stand for: the same names and parameters, and stricter than the libraries."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import fake_trt
import numpy as np
import pytest
import tensorrt_api as api
from fake_cuda import FakeCuda, cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
from fake_trt import FakeTrt, plan_bytes

from hidiff_runtime.format.manifest import TensorSpec

BOTH = (fake_trt.Runtime, fake_trt.ICudaEngine, fake_trt.IExecutionContext)
RTX_ONLY = {
    fake_trt.RtxRuntime: "Runtime",
    fake_trt.RtxEngine: "ICudaEngine",
    fake_trt.RtxContext: "IExecutionContext",
    fake_trt.IRuntimeConfig: "IRuntimeConfig",
    fake_trt.IRuntimeCache: "IRuntimeCache",
}
ENUMS = (
    fake_trt.DataType,
    fake_trt.TensorIOMode,
    fake_trt.TensorLocation,
    fake_trt.ExecutionContextAllocationStrategy,
    fake_trt.CudaGraphStrategy,
    fake_trt.EngineValidity,
    fake_trt.EngineInvalidityDiagnostics,
)
TENSOR = (TensorSpec("x", (4,), "float32"),)
GIVES = (TensorSpec("y", (4,), "float32"),)


def public(kind: type) -> list[str]:
    return [name for name in vars(kind) if not name.startswith("_")]


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_the_fakes_have_no_name_that_the_libraries_lack() -> None:
    for kind in BOTH:
        for library in (api.TRT, api.RTX):
            assert set(public(kind)) <= set(api.LISTS[library]["classes"][kind.__name__])
    for kind, real in RTX_ONLY.items():
        assert set(public(kind)) <= set(api.LISTS[api.RTX]["classes"][real])
    for enum in ENUMS:
        assert set(enum.__members__) <= set(api.LISTS[api.RTX]["classes"][enum.__name__])


def test_methods_of_the_fakes_take_what_those_of_tensorrt_rtx_take() -> None:
    trt = pytest.importorskip(api.RTX)
    kinds = {kind: kind.__name__ for kind in BOTH} | RTX_ONLY
    methods = [(real, name, vars(kind)[name]) for kind, real in kinds.items() for name in public(kind)]
    functions = [(real, name, method) for real, name, method in methods if inspect.isfunction(method)]
    assert len(functions) > 15
    for real, name, method in functions:
        text = getattr(getattr(trt, real), name).__doc__
        signatures = re.findall(rf"{name}\(self: [^,)]+(?:, )?(.*?)\) ->", text)
        assert parameters(method) in [re.findall(r"(?:^|, )(\w+): ", given) for given in signatures], f"{real}.{name}"


def test_functions_of_the_fake_take_what_those_of_cuda_take() -> None:
    functions = api.LISTS[api.CUDA]["functions"]
    names = [name for name in dir(FakeCuda) if name.startswith("cuda") and inspect.isfunction(getattr(FakeCuda, name))]
    assert len(names) > 20
    for name in names:
        assert parameters(getattr(FakeCuda, name)) == functions[name], name
    for enum in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode", "cudaDeviceAttr"):
        assert set(getattr(FakeCuda, enum).__members__) <= set(api.LISTS[api.CUDA]["enums"][enum])


@pytest.fixture
def cuda() -> FakeCuda:
    made = FakeCuda()
    made.cudaSetDevice(0)
    return made


def upload(cuda: FakeCuda) -> tuple[Any, int, int]:
    """A stream on which a copy waits, its pinned source and its target."""
    _, stream = cuda.cudaStreamCreateWithFlags(1)
    _, host = cuda.cudaMallocHost(16)
    _, address = cuda.cudaMalloc(16)
    cuda.cudaMemcpyAsync(address, host, 16, cudaMemcpyKind.cudaMemcpyHostToDevice, stream)
    return stream, host, address


def test_memory_that_changes_before_its_copy_is_noticed(cuda: FakeCuda) -> None:
    stream, host, _ = upload(cuda)
    cuda.pinned[host][0] = 7
    cuda.cudaStreamSynchronize(stream)
    assert cuda.misuses == ["pinned memory changed before its copy had run"]


def test_memory_that_is_freed_too_soon_or_twice_is_noticed(cuda: FakeCuda) -> None:
    stream, host, address = upload(cuda)
    cuda.cudaFree(address)
    cuda.cudaFreeHost(host)
    cuda.cudaFree(address)
    assert [text.split(" before")[0] for text in cuda.misuses] == [
        "device memory is freed",
        "pinned memory is freed",
        "device memory is freed twice, or was never there",
    ]
    assert cuda.leaks == ["stream"]
    cuda.cudaStreamDestroy(stream)
    assert cuda.misuses[-1] == "a stream is destroyed before its work is done"


def test_a_thread_must_choose_its_gpu() -> None:
    cuda = FakeCuda()
    cuda.cudaMalloc(1)
    assert cuda.misuses == ["cudaMalloc in a thread that has not chosen its GPU"]


def context(cuda: FakeCuda, **plan: Any) -> tuple[FakeTrt, fake_trt.IExecutionContext]:
    library = FakeTrt(cuda, rtx=False, kernels={"double": lambda inputs: {"y": inputs["x"] * 2}})

    class Quiet(fake_trt.ILogger):
        def log(self, severity: fake_trt.Severity, msg: str) -> None:
            pass

    data = plan_bytes("double", TENSOR, GIVES, **plan)
    engine = library.Runtime(Quiet()).deserialize_cuda_engine(memoryview(data))
    assert engine is not None
    made = engine.create_execution_context(fake_trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    assert made is not None
    return library, made


def test_an_evaluation_needs_memory_addresses_and_a_stream(cuda: FakeCuda) -> None:
    _, made = context(cuda)
    _, stream = cuda.cudaStreamCreateWithFlags(1)
    assert not made.execute_async_v3(int(stream))
    assert cuda.misuses == ["an evaluation without memory, or without ['x', 'y']"]
    made.set_device_memory(cuda.cudaMalloc(100)[1], 100)
    assert cuda.misuses[1:] == ["scratch memory is too small, or not aligned"]
    assert not made.set_tensor_address("z", 1)


def test_an_evaluation_happens_when_the_stream_is_waited_for(cuda: FakeCuda) -> None:
    _, made = context(cuda)
    stream, address = ready(cuda, made)
    assert made.execute_async_v3(int(stream))
    assert cuda.reads(address, 16)[0] == 0xA5
    cuda.cudaStreamSynchronize(stream)
    assert cuda.reads(address, 16).view(np.float32).tolist() == [2, 2, 2, 2]
    assert not cuda.misuses


def test_recording_is_refused_until_an_engine_has_run_and_spoilt_by_an_allocation(cuda: FakeCuda) -> None:
    _, made = context(cuda)
    stream, address = ready(cuda, made)
    mode = cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    cuda.cudaStreamBeginCapture(stream, mode)
    assert not made.execute_async_v3(int(stream))
    assert cuda.cudaStreamEndCapture(stream) == (cudaError_t.cudaErrorStreamCaptureInvalidated, None)

    assert made.execute_async_v3(int(stream))
    cuda.cudaStreamBeginCapture(stream, mode)
    assert made.execute_async_v3(int(stream))
    assert cuda.cudaMalloc(1) == (cudaError_t.cudaErrorStreamCaptureUnsupported, None)
    assert cuda.cudaStreamEndCapture(stream) == (cudaError_t.cudaErrorStreamCaptureInvalidated, None)

    cuda.cudaStreamBeginCapture(stream, mode)
    assert made.execute_async_v3(int(stream))
    _, graph = cuda.cudaStreamEndCapture(stream)
    _, executable = cuda.cudaGraphInstantiate(graph, 0)
    cuda.cudaStreamSynchronize(stream)
    cuda.cudaFree(address)
    cuda.cudaGraphLaunch(executable, stream)
    assert cuda.misuses == ["a recording is launched whose memory is gone"]


def ready(cuda: FakeCuda, made: fake_trt.IExecutionContext) -> tuple[Any, int]:
    """A stream and the output's address, with everything set and ones in x."""
    _, stream = cuda.cudaStreamCreateWithFlags(1)
    made.set_device_memory(cuda.cudaMalloc(4096)[1], 4096)
    addresses = [cuda.cudaMalloc(16)[1] for _ in "xy"]
    cuda.reads(addresses[0], 16).view(np.float32)[:] = 1
    assert all(made.set_tensor_address(name, address) for name, address in zip("xy", addresses, strict=True))
    return stream, addresses[1]


def test_an_engine_that_is_freed_too_soon_is_noticed(cuda: FakeCuda) -> None:
    _, made = context(cuda)
    stream, _ = ready(cuda, made)
    made.execute_async_v3(int(stream))
    made._engine.__del__()
    assert cuda.misuses == ["an engine is freed before its work is done"]
