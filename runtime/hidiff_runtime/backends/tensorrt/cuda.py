"""CUDA's runtime through cuda-python: the few calls that sessions need, every return code checked in one place."""

from __future__ import annotations

from typing import Any

from hidiff_runtime.errors import EngineError

_NEWER_DRIVER = (
    "Install NVIDIA's current driver, and look at it with nvidia-smi; in a container, start it with --gpus all."
)
_ADVICE = {
    "cudaErrorInsufficientDriver": f"{_NEWER_DRIVER} A driver of CUDA 12 takes 'cuda-python<13' and tensorrt-cu12.",
    "cudaErrorStubLibrary": _NEWER_DRIVER,
    "cudaErrorSystemDriverMismatch": "Reboot, or load the driver's kernel module that fits its libraries.",
    "cudaErrorNoDevice": "Look for a GPU with nvidia-smi; check CUDA_VISIBLE_DEVICES.",
    "cudaErrorMemoryAllocation": "Open the bundle with resident='current' and no memory_limit or a smaller one, or end "
    "other programs on the GPU.",
    "cudaErrorIllegalAddress": "Start the process again: this one's GPU state is lost.",
}
_SUMMARIES = {
    "cudaErrorInsufficientDriver": "NVIDIA's driver is missing, or too old for this CUDA.",
    "cudaErrorStubLibrary": "NVIDIA's driver is missing: only CUDA's stub of it is here.",
    "cudaErrorNoDevice": "There is no NVIDIA GPU here.",
    "cudaErrorMemoryAllocation": "There is too little memory on the GPU.",
}


class CudaError(EngineError):
    """A call of CUDA's runtime failed.

    Args:
        code: such as ``cudaErrorMemoryAllocation``.
        detail: CUDA's own words.
    """

    def __init__(self, code: str, detail: str) -> None:
        self.code = code
        summary = _SUMMARIES.get(code, "CUDA failed.")
        super().__init__(summary, given=f"{code}: {detail}", advice=_ADVICE.get(code, ""))

    @property
    def out_of_memory(self) -> bool:
        """Whether there was too little memory."""
        return self.code == "cudaErrorMemoryAllocation"


class Cuda:
    """The runtime. Handles (streams, events, graphs) are cuda-python's own; addresses are ints.

    Every method raises CudaError for a return code that is not success; calls are asynchronous, so that an error may
    be that of an earlier one.
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def _checked(self, result: tuple[Any, ...]) -> Any:
        """Returns what a call gave beside its return code: nothing, one value or a tuple."""
        status, *values = result
        if status != self._runtime.cudaError_t.cudaSuccess:
            self._runtime.cudaGetLastError()  # forgets it: libraries ask for the last error after their own launches
            _, text = self._runtime.cudaGetErrorString(status)
            raise CudaError(status.name, text.decode(errors="replace"))
        return values[0] if len(values) == 1 else tuple(values)

    def device_count(self) -> int:
        """Returns how many GPUs there are: at least one."""
        return int(self._checked(self._runtime.cudaGetDeviceCount()))

    def describe(self, device: int) -> tuple[str, str]:
        """Returns a GPU's name and compute capability, such as ``sm89``."""
        properties = self._checked(self._runtime.cudaGetDeviceProperties(device))
        major = self._attribute(self._runtime.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor, device)
        minor = self._attribute(self._runtime.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor, device)
        return properties.name.decode(errors="replace").rstrip("\0"), f"sm{major}{minor}"

    def _attribute(self, attribute: Any, device: int) -> int:
        return int(self._checked(self._runtime.cudaDeviceGetAttribute(attribute, device)))

    def set_device(self, device: int) -> None:
        """Makes a GPU the calling thread's: every thread must, before anything else."""
        self._checked(self._runtime.cudaSetDevice(device))

    def free_memory(self) -> int:
        """Returns bytes that are free on the thread's GPU."""
        free, _ = self._checked(self._runtime.cudaMemGetInfo())
        return int(free)

    def shares_memory(self, device: int) -> bool:
        """Returns whether a GPU's memory is the host's: more can be had then than is free, as file caches make room."""
        return bool(self._attribute(self._runtime.cudaDeviceAttr.cudaDevAttrIntegrated, device))

    def malloc(self, size: int) -> int:
        """Returns the address of ``size`` new bytes on the GPU, aligned to 256 at least."""
        return int(self._checked(self._runtime.cudaMalloc(size)))

    def free(self, address: int) -> None:
        """Frees what `malloc` gave; nothing that was asked for may use it any more."""
        self._checked(self._runtime.cudaFree(address))

    def malloc_host(self, size: int) -> int:
        """Returns the address of ``size`` new bytes in pinned host memory, from which copies run on their own."""
        return int(self._checked(self._runtime.cudaMallocHost(size)))

    def free_host(self, address: int) -> None:
        """Frees what `malloc_host` gave."""
        self._checked(self._runtime.cudaFreeHost(address))

    def copy_to_device(self, address: int, host: int, size: int, stream: Any) -> None:
        """Asks for a copy from pinned host memory, which must not change before the copy has run."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._checked(self._runtime.cudaMemcpyAsync(address, host, size, kind, stream))

    def copy_to_host(self, host: int, address: int, size: int, stream: Any) -> None:
        """Asks for a copy to host memory, which is whole once the stream has been waited for."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._checked(self._runtime.cudaMemcpyAsync(host, address, size, kind, stream))

    def create_stream(self) -> Any:
        """Returns a stream that does not wait for the default stream, on which other libraries may work."""
        return self._checked(self._runtime.cudaStreamCreateWithFlags(self._runtime.cudaStreamNonBlocking))

    def destroy_stream(self, stream: Any) -> None:
        """Ends a stream."""
        self._checked(self._runtime.cudaStreamDestroy(stream))

    def wait(self, stream: Any) -> None:
        """Waits until everything asked of the stream has happened."""
        self._checked(self._runtime.cudaStreamSynchronize(stream))

    def create_event(self) -> Any:
        """Returns an event that takes no time stamps."""
        return self._checked(self._runtime.cudaEventCreateWithFlags(self._runtime.cudaEventDisableTiming))

    def record_event(self, event: Any, stream: Any) -> None:
        """Records an event that happens when all that was asked of the stream so far has."""
        self._checked(self._runtime.cudaEventRecord(event, stream))

    def wait_for_event(self, event: Any) -> None:
        """Waits until the event has happened."""
        self._checked(self._runtime.cudaEventSynchronize(event))

    def destroy_event(self, event: Any) -> None:
        """Ends an event."""
        self._checked(self._runtime.cudaEventDestroy(event))

    def begin_capture(self, stream: Any) -> None:
        """Records what this thread asks of the stream from here on and runs none of it; other threads go on as ever."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._checked(self._runtime.cudaStreamBeginCapture(stream, mode))

    def end_capture(self, stream: Any) -> Any:
        """Ends the recording; gives the graph."""
        return self._checked(self._runtime.cudaStreamEndCapture(stream))

    def instantiate(self, graph: Any) -> Any:
        """Returns what launches the graph; the graph itself may then be destroyed."""
        return self._checked(self._runtime.cudaGraphInstantiate(graph, 0))

    def launch(self, executable: Any, stream: Any) -> None:
        """Asks the stream to run what was recorded."""
        self._checked(self._runtime.cudaGraphLaunch(executable, stream))

    def destroy_graph(self, graph: Any) -> None:
        """Ends a graph."""
        self._checked(self._runtime.cudaGraphDestroy(graph))

    def destroy_executable(self, executable: Any) -> None:
        """Ends what launches a graph."""
        self._checked(self._runtime.cudaGraphExecDestroy(executable))
