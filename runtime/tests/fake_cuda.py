"""A strict stand-in for ``cuda.bindings.runtime``: work waits on its stream, and every misuse is written down.

What is asked of a stream happens when it is waited for and not before, as on a GPU that is far behind. So memory that
is changed or freed too soon shows: as a wrong result, and in ``misuses``, which a test looks at when it ends.
"""

# ruff: noqa: N801, N802, N803, N815  the names are CUDA's

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class cudaDeviceAttr(IntEnum):
    cudaDevAttrIntegrated = 18
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


E = cudaError_t
OK = E.cudaSuccess
Result = tuple[Any, ...]


@dataclass(frozen=True)
class Properties:
    """Of a GPU."""

    name: bytes
    major: int
    minor: int
    integrated: bool = False


@dataclass(eq=False)
class Handle:
    """A stream, event, graph or executable graph."""

    kind: str
    number: int

    def __int__(self) -> int:
        return self.number


@dataclass
class Op:
    """Work on a stream.

    Args:
        what: for messages.
        run: does it.
        touches: addresses of device memory that it reads or writes.
    """

    what: str
    run: Callable[[], None]
    touches: frozenset[int]


@dataclass
class StreamState:
    queue: list[Op] = field(default_factory=list)
    done: int = 0
    capture: list[Op] | None = None
    spoilt: bool = False
    captured_by: int = 0


class FakeCuda:
    """The module.

    Args:
        gpus: that there are.
        memory: bytes of each.

    Attributes:
        caches: bytes that are not free, but would be given up.
    """

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaDeviceAttr = cudaDeviceAttr
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2

    def __init__(self, gpus: tuple[Properties, ...] = (Properties(b"NVIDIA L4", 8, 9),), memory: int = 1 << 30) -> None:
        self.gpus = gpus
        self.memory = memory
        self.weights = 0
        self.caches = 0
        self.misuses: list[str] = []
        self.calls: list[str] = []
        self.fails: dict[str, list[cudaError_t]] = {}
        self.device: dict[int, np.ndarray] = {}
        self.pinned: dict[int, Any] = {}
        self.alive: dict[Handle, Any] = {}
        self._numbers = itertools.count(1)
        self._addresses = itertools.count(0x7F00_0000_0000, 1 << 32)
        self._thread = threading.local()

    def misuse(self, text: str) -> None:
        self.misuses.append(text)

    @property
    def leaks(self) -> list[str]:
        """What was never given back."""
        left = [f"device memory {address:#x}" for address in self.device]
        left += [f"pinned memory {address:#x}" for address in self.pinned]
        left += [handle.kind for handle in self.alive]
        return left + ([f"{self.weights} bytes of engines"] if self.weights else [])

    @property
    def used(self) -> int:
        return self.weights + sum(map(len, self.device.values()))

    # What other fakes and tests need of it.

    def reads(self, address: int, size: int) -> np.ndarray:
        """A view of device memory."""
        for start, block in self.device.items():
            if start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        self.misuse(f"{size} bytes at {address:#x} are not device memory")
        return np.zeros(size, np.uint8)

    def block_of(self, address: int) -> int:
        """Where the allocation begins that an address lies in; 0 if in none."""
        return next((start for start, block in self.device.items() if start <= address < start + len(block)), 0)

    def enqueue(self, stream: int, op: Op) -> None:
        """Adds work to a stream, or to what it records."""
        state = self._state(stream)
        if state.capture is not None:
            state.capture.append(op)
        else:
            state.queue.append(op)

    def capturing(self, stream: int) -> StreamState | None:
        """The state of a stream that records."""
        state = self._state(stream)
        return state if state.capture is not None else None

    def pending(self) -> list[Op]:
        """All work that has not happened yet."""
        return [op for state in self._streams() for op in state.queue]

    def expect_device(self, what: str) -> None:
        """A thread chooses its GPU before it does anything else."""
        if getattr(self._thread, "device", None) is None:
            self.misuse(f"{what} in a thread that has not chosen its GPU")

    def _streams(self) -> list[StreamState]:
        return [state for handle, state in self.alive.items() if handle.kind == "stream"]

    def _state(self, stream: Any) -> StreamState:
        for handle, state in self.alive.items():
            if handle.kind == "stream" and int(handle) == int(stream):
                return state  # type: ignore[no-any-return]
        self.misuse(f"{stream} is no stream")
        return StreamState()

    def _run(self, state: StreamState, until: int) -> None:
        while state.queue and state.done < until:
            state.queue.pop(0).run()
            state.done += 1

    def _begins(self, name: str, *, device: bool = True) -> cudaError_t:
        self.calls.append(name)
        if device:
            self.expect_device(name)
        planned = self.fails.get(name)
        if planned:
            return planned.pop(0)
        return OK

    def _unsafe(self) -> bool:
        """Whether this thread records, so that the call is refused and spoils the recording."""
        spoilt = [state for state in self._streams() if state.captured_by == threading.get_ident()]
        for state in spoilt:
            state.spoilt = True
        return bool(spoilt)

    def _new(self, kind: str, value: Any = None) -> Handle:
        handle = Handle(kind, next(self._numbers))
        self.alive[handle] = value
        return handle

    def _end(self, kind: str, handle: Handle) -> Result:
        if handle not in self.alive or handle.kind != kind:
            self.misuse(f"a {kind} is ended twice, or is none")
            return (E.cudaErrorInvalidResourceHandle,)
        del self.alive[handle]
        return (OK,)

    # CUDA's own functions, with CUDA's own parameters.

    def cudaGetLastError(self) -> Result:
        self.calls.append("cudaGetLastError")
        return (OK,)

    def cudaGetErrorString(self, error: cudaError_t) -> Result:
        return OK, error.name.encode() + b" in words"

    def cudaGetDeviceCount(self) -> Result:
        error = self._begins("cudaGetDeviceCount", device=False)
        return (error, None) if error else (OK, len(self.gpus))

    def cudaGetDeviceProperties(self, device: int) -> Result:
        return OK, self.gpus[device]

    def cudaDeviceGetAttribute(self, attr: cudaDeviceAttr, device: int) -> Result:
        gpu = self.gpus[device]
        values = {
            cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor: gpu.major,
            cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor: gpu.minor,
            cudaDeviceAttr.cudaDevAttrIntegrated: int(gpu.integrated),
        }
        return OK, values[attr]

    def cudaSetDevice(self, device: int) -> Result:
        self._thread.device = device
        return (OK,)

    def cudaMemGetInfo(self) -> Result:
        error = self._begins("cudaMemGetInfo")
        return (error, None, None) if error else (OK, self.memory - self.used - self.caches, self.memory)

    def cudaMalloc(self, size: int) -> Result:
        error = self._begins("cudaMalloc")
        if not error and self._unsafe():
            error = E.cudaErrorStreamCaptureUnsupported
        if not error and self.used + size > self.memory:
            error = E.cudaErrorMemoryAllocation
        if error:
            return error, None
        address = next(self._addresses)
        self.device[address] = np.full(size, 0xA5, np.uint8)
        return OK, address

    def cudaFree(self, devPtr: int) -> Result:
        error = self._begins("cudaFree")
        if self._unsafe():
            return (E.cudaErrorStreamCaptureUnsupported,)
        if self.device.pop(devPtr, None) is None:
            self.misuse("device memory is freed twice, or was never there")
        elif used := [op.what for op in self.pending() if devPtr in op.touches]:
            self.misuse(f"device memory is freed before {used[0]} that uses it")
        return (error,)

    def cudaMallocHost(self, size: int) -> Result:
        error = self._begins("cudaMallocHost")
        if error:
            return error, None
        block = (ctypes.c_uint8 * size)()
        self.pinned[ctypes.addressof(block)] = block
        return OK, ctypes.addressof(block)

    def cudaFreeHost(self, ptr: int) -> Result:
        error = self._begins("cudaFreeHost")
        if any(op.what == "a copy to the device" for op in self.pending()):
            self.misuse("pinned memory is freed before a copy from it")
        if self.pinned.pop(ptr, None) is None:
            self.misuse("pinned memory is freed twice, or was never there")
        return (error,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: Any) -> Result:
        error = self._begins("cudaMemcpyAsync")
        if error:
            return (error,)
        if kind is cudaMemcpyKind.cudaMemcpyDeviceToHost:
            state = self._state(stream)
            self._run(state, state.done + len(state.queue))  # pageable memory: CUDA waits too
            ctypes.memmove(dst, self.reads(src, count).ctypes.data, count)
            return (OK,)
        if not any(start <= src and src + count <= start + len(block) for start, block in self.pinned.items()):
            self.misuse("a copy to the device that is not from pinned memory")
        asked = ctypes.string_at(src, count)

        def copy() -> None:
            if ctypes.string_at(src, count) != asked:
                self.misuse("pinned memory changed before its copy had run")
            self.reads(dst, count)[:] = np.frombuffer(ctypes.string_at(src, count), np.uint8)

        self.enqueue(int(stream), Op("a copy to the device", copy, frozenset({self.block_of(dst)})))
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> Result:
        error = self._begins("cudaStreamCreateWithFlags")
        if flags != self.cudaStreamNonBlocking:
            self.misuse("a stream that waits for the default stream")
        return (error, None) if error else (OK, self._new("stream", StreamState()))

    def cudaStreamDestroy(self, stream: Handle) -> Result:
        self._begins("cudaStreamDestroy")
        if self._state(stream).queue:
            self.misuse("a stream is destroyed before its work is done")
        return self._end("stream", stream)

    def cudaStreamSynchronize(self, stream: Handle) -> Result:
        error = self._begins("cudaStreamSynchronize")
        if self._unsafe():
            return (E.cudaErrorStreamCaptureUnsupported,)
        state = self._state(stream)
        self._run(state, state.done + len(state.queue))
        return (error,)

    def cudaEventCreateWithFlags(self, flags: int) -> Result:
        error = self._begins("cudaEventCreateWithFlags")
        assert flags == self.cudaEventDisableTiming
        return (error, None) if error else (OK, self._new("event", []))

    def cudaEventRecord(self, event: Handle, stream: Handle) -> Result:
        error = self._begins("cudaEventRecord")
        state = self._state(stream)
        self.alive[event][:] = [state, state.done + len(state.queue)]
        return (error,)

    def cudaEventSynchronize(self, event: Handle) -> Result:
        error = self._begins("cudaEventSynchronize")
        if not self.alive[event]:
            self.misuse("an event is waited for that was never recorded")
        else:
            self._run(*self.alive[event])
        return (error,)

    def cudaEventDestroy(self, event: Handle) -> Result:
        return self._end("event", event)

    def cudaStreamBeginCapture(self, stream: Handle, mode: cudaStreamCaptureMode) -> Result:
        error = self._begins("cudaStreamBeginCapture")
        assert mode is cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        state = self._state(stream)
        if not error:
            state.capture, state.spoilt, state.captured_by = [], False, threading.get_ident()
        return (error,)

    def cudaStreamEndCapture(self, stream: Handle) -> Result:
        error = self._begins("cudaStreamEndCapture")
        state = self._state(stream)
        ops, state.capture, state.captured_by = state.capture, None, 0
        if ops is None:
            self.misuse("a recording is ended that was not begun")
        if state.spoilt:
            error = E.cudaErrorStreamCaptureInvalidated
        return (error, None) if error else (OK, self._new("graph", ops))

    def cudaGraphInstantiate(self, graph: Handle, flags: int) -> Result:
        error = self._begins("cudaGraphInstantiate")
        assert flags == 0
        return (error, None) if error else (OK, self._new("executable", list(self.alive[graph])))

    def cudaGraphLaunch(self, graphExec: Handle, stream: Handle) -> Result:
        error = self._begins("cudaGraphLaunch")
        for op in self.alive[graphExec]:
            if not op.touches <= self.device.keys():
                self.misuse("a recording is launched whose memory is gone")
            self.enqueue(int(stream), op)
        return (error,)

    def cudaGraphDestroy(self, graph: Handle) -> Result:
        return self._end("graph", graph)

    def cudaGraphExecDestroy(self, graphExec: Handle) -> Result:
        if self.pending():
            self.misuse("a recording is destroyed while the stream has work")
        return self._end("executable", graphExec)
