"""A strict stand-in for ``tensorrt`` and ``tensorrt_rtx``: plans name a numpy function, which runs on a `FakeCuda`.

A plan is a header of 64 bytes (version and targets), a line of JSON, and bytes that stand for weights.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

import numpy as np
from fake_cuda import FakeCuda, Op

from hidiff_runtime.format.manifest import TensorSpec

HEADER = 64
Kernel = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]


def plan_bytes(
    kernel: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    *,
    version: str = "1.7.1.116",
    targets: tuple[str, ...] = ("sm89",),
    scratch: int = 4096,
    weights: int = 1000,
    on_host: tuple[str, ...] = (),
    **more: Any,
) -> bytes:
    """A plan whose engine runs the kernel of that name."""
    tensors = [(spec.name, "INPUT", spec.dtype, spec.shape) for spec in inputs]
    tensors += [(spec.name, "OUTPUT", spec.dtype, spec.shape) for spec in outputs]
    content = {"kernel": kernel, "tensors": tensors, "scratch": scratch, "on_host": on_host, **more}
    header = f"{version} {','.join(targets)}".ljust(HEADER).encode()
    return header + json.dumps(content).encode() + b"\n" + bytes(range(256)) * (weights // 256)


class DataType(Enum):
    FLOAT = "float32"
    HALF = "float16"
    INT32 = "int32"
    BOOL = "bool"


class TensorIOMode(Enum):
    INPUT = "INPUT"
    OUTPUT = "OUTPUT"


class TensorLocation(Enum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    USER_MANAGED = 2


class CudaGraphStrategy(Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class EngineValidity(Enum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32


class Severity(Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    Severity = Severity
    started = False

    def __init__(self) -> None:
        self.started = True

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


@dataclass(eq=False)
class FakeTrt:
    """The module.

    Args:
        cuda: what it runs on.
        rtx: which of the two libraries it is.
        kernels: what plans name.
        refuses_capture: whether engines cannot be recorded.
        starts: whether a runtime can be made.
        is_small: whether it finds the GPU too small for any engine.
        is_slow: whether it expects engines to be slow on the GPU.
        forgets: whether it cannot write its cache.
    """

    cuda: FakeCuda
    rtx: bool = True
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    refuses_capture: bool = False
    starts: bool = True
    is_small: bool = False
    is_slow: bool = False
    forgets: bool = False
    finished: list[str] = field(default_factory=list)
    loggers: list[ILogger] = field(default_factory=list)

    DataType = DataType
    TensorIOMode = TensorIOMode
    TensorLocation = TensorLocation
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    ILogger = ILogger

    def __post_init__(self) -> None:
        self.__version__ = "1.7.1.116" if self.rtx else "11.4.0.106"
        if self.rtx:
            self.CudaGraphStrategy = CudaGraphStrategy
            self.EngineValidity = EngineValidity
            self.EngineInvalidityDiagnostics = EngineInvalidityDiagnostics

    def Runtime(self, logger: ILogger) -> Runtime:  # noqa: N802 - a class of the library
        assert logger.started, "ILogger.__init__ was not called"
        if self.loggers and logger is not self.loggers[0]:
            self.cuda.misuse("a second logger, though the library calls the first for as long as any runtime is there")
        self.loggers.append(logger)
        if not self.starts:
            logger.log(Severity.ERROR, "CUDA initialization failure")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return (RtxRuntime if self.rtx else Runtime)(self, logger)

    @property
    def target(self) -> str:
        return f"sm{self.cuda.gpus[0].major}{self.cuda.gpus[0].minor}"


class Runtime:
    def __init__(self, library: FakeTrt, logger: ILogger) -> None:
        self._library = library
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: memoryview) -> ICudaEngine | None:
        library = self._library
        library.cuda.expect_device("deserializing")
        data = bytes(serialized_engine)
        if data[HEADER : HEADER + 1] != b"{":
            self.logger.log(Severity.ERROR, "Serialization assertion magicTag failed")
            return None
        content, weights = data[HEADER:].split(b"\n", 1)
        described = json.loads(content)
        if library.cuda.used + len(weights) + described.get("surprise", 0) > library.cuda.memory:
            self.logger.log(Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 2: OutOfMemory")
            return None
        return (RtxEngine if library.rtx else ICudaEngine)(library, self.logger, described, len(weights))


class RtxRuntime(Runtime):
    engine_header_size = HEADER

    def get_engine_validity(self, buffer: memoryview) -> tuple[EngineValidity, int]:
        header = bytes(buffer)
        assert len(header) >= HEADER
        version, _, targets = header.decode(errors="replace").strip().partition(" ")
        flags = EngineInvalidityDiagnostics
        if not targets.startswith("sm"):
            return EngineValidity.INVALID, int(flags.MALFORMED_ENGINE)
        diagnosis = flags.VERSION_MISMATCH * (version != self._library.__version__)
        diagnosis |= flags.UNSUPPORTED_CC * (self._library.target not in targets.split(","))
        diagnosis |= flags.INSUFFICIENT_GPU_MEMORY * self._library.is_small
        if not diagnosis and self._library.is_slow:
            return EngineValidity.SUBOPTIMAL, 0
        return (EngineValidity.INVALID if diagnosis else EngineValidity.VALID), int(diagnosis)


class ICudaEngine:
    def __init__(self, library: FakeTrt, logger: ILogger, described: dict[str, Any], weights: int) -> None:
        self._library = library
        self._logger = logger
        self._described = described
        self._weights = weights
        self._tensors = {name: (mode, dtype, tuple(shape)) for name, mode, dtype, shape in described["tensors"]}
        library.cuda.weights += weights

    def __del__(self) -> None:
        cuda = self._library.cuda
        cuda.weights -= self._weights
        if any(op.what == self._work for op in cuda.pending()):
            cuda.misuse("an engine is freed before its work is done")

    @property
    def _work(self) -> str:
        return f"an evaluation by engine {id(self)}"

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def device_memory_size_v2(self) -> int:
        return int(self._described["scratch"])

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode(self._tensors[name][0])

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self._tensors[name][1])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][2]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self._described["on_host"] else TensorLocation.DEVICE

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> IExecutionContext | None:
        self._library.cuda.expect_device("making a context")
        if self._described.get("no_context"):
            self._logger.log(Severity.ERROR, "createExecutionContext: the kernels do not compile")
            return None
        return (RtxContext if self._library.rtx else IExecutionContext)(self, strategy)


class RtxEngine(ICudaEngine):
    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self._library)

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext | None:  # type: ignore[override]
        cache = runtime_config._cache
        kernel = str(self._described["kernel"])
        if cache is None or kernel not in cache._kernels:
            self._library.finished.append(kernel)
            if cache is not None:
                cache._kernels.append(kernel)
        made = super().create_execution_context(runtime_config._strategy)
        if made is not None:
            made._cache, made._config = cache, weakref.ref(runtime_config)
        return made


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, strategy: ExecutionContextAllocationStrategy) -> None:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self._engine = engine
        self._cuda = engine._library.cuda
        self._bound: dict[str, int] = {}
        self._memory = (0, 0)
        self._warm = False
        self._cache: IRuntimeCache | None = None

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % 256 or size < self._engine.device_memory_size_v2:
            self._cuda.misuse("scratch memory is too small, or not aligned")
        self._memory = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors:
            self._engine._logger.log(Severity.ERROR, f"setTensorAddress given invalid tensor name: {name}")
            return False
        self._bound[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda, engine = self._cuda, self._engine
        cuda.expect_device("an evaluation")
        assert isinstance(stream_handle, int)
        missing = engine._tensors.keys() - self._bound.keys()
        if missing or not cuda.block_of(self._memory[0]):
            cuda.misuse(f"an evaluation without memory, or without {sorted(missing)}")
            return False
        capture = cuda.capturing(stream_handle)
        if capture is not None and (not self._warm or engine._library.refuses_capture):
            engine._logger.log(Severity.ERROR, "operation not permitted when stream is capturing")
            capture.spoilt = True
            return False
        if engine._described.get("fails"):
            engine._logger.log(Severity.ERROR, "IExecutionContext::enqueueV3: Error Code 1: Cask (convolution)")
            return False
        if self._cache is not None and engine._described.get("finishes_late"):
            self._cache._kernels.append("late")
        self._warm = True
        cuda.enqueue(stream_handle, self._op())
        return True

    def _op(self) -> Op:
        """The work, which does not keep the engine."""
        cuda, engine, bound, memory = self._cuda, self._engine, dict(self._bound), self._memory
        tensors, kernel = engine._tensors, engine._library.kernels[engine._described["kernel"]]
        assert not engine._described["on_host"]  # such an engine is refused before it runs

        def run() -> None:
            cuda.reads(*memory)[:] = 0x5A  # activations of whoever ran before are gone
            inputs: dict[str, np.ndarray] = {}
            outputs: dict[str, np.ndarray] = {}
            for name, (mode, dtype, shape) in tensors.items():
                view = cuda.reads(bound[name], math.prod(shape) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)
                (inputs if mode == "INPUT" else outputs)[name] = view
            for name, value in kernel({name: np.array(view) for name, view in inputs.items()}).items():
                assert value.shape == outputs[name].shape
                outputs[name][...] = value

        blocks = {cuda.block_of(address) for address in bound.values()} | {cuda.block_of(memory[0])}
        return Op(engine._work, run, frozenset(blocks))


class RtxContext(IExecutionContext):
    _config: weakref.ref[IRuntimeConfig]

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._config() is None:
            self._cuda.misuse("a context is used whose configuration is gone")
        return super().execute_async_v3(stream_handle)

    def is_stream_capturable(self, stream: int) -> bool:
        assert isinstance(stream, int)
        return not self._engine._described.get("not_capturable", False)


class IRuntimeConfig:
    def __init__(self, library: FakeTrt) -> None:
        self._library = library
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self._cache: IRuntimeCache | None = None
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._library)

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class IRuntimeCache:
    def __init__(self, library: FakeTrt) -> None:
        self._library = library
        self._kernels: list[str] = []

    @property
    def _mark(self) -> str:
        return f"kernels for {self._library.__version__}"

    def serialize(self) -> bytearray | None:
        if self._library.forgets:
            return None
        return bytearray(json.dumps([self._mark, *self._kernels]).encode())

    def deserialize(self, blob: bytes) -> bool:
        self._library.cuda.expect_device("reading a cache")
        try:
            mark, *kernels = json.loads(blob)
        except ValueError:
            return False
        if mark != self._mark:
            return False
        self._kernels = kernels
        return True
