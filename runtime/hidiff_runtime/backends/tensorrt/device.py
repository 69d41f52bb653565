"""The backend: options, availability, and the device that a bundle opens."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidiff_runtime.backends.option_checks import check_names
from hidiff_runtime.backends.protocol import Availability, WeightMap
from hidiff_runtime.backends.tensorrt import runtime_library as libraries
from hidiff_runtime.backends.tensorrt.cuda import CudaError
from hidiff_runtime.backends.tensorrt.gpu_memory import CudaMemory, Scratch
from hidiff_runtime.backends.tensorrt.logger import logger_of
from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord
from hidiff_runtime.backends.tensorrt.plan_validation import check_graph
from hidiff_runtime.backends.tensorrt.plans import PlanContext, Plans
from hidiff_runtime.backends.tensorrt.session import TensorRtSession
from hidiff_runtime.errors import EngineError, InputError
from hidiff_runtime.format.manifest import GraphRecord

_TRUTHS = {True: True, False: False, "true": True, "false": False, "on": True, "off": False}


@dataclass(frozen=True)
class TensorRtOptions:
    """Options of this backend.

    Args:
        device: which GPU, as CUDA counts them.
        cuda_graph: whether evaluations that repeat are launched as CUDA graphs.
        cache: TensorRT-RTX's folder for kernels it finished on this GPU, ``off`` for none; left out, one beside the
            bundle, named after it.
    """

    device: int = 0
    cuda_graph: bool = True
    cache: str | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> TensorRtOptions:
        """Returns the options by name. Raises InputError for one that there is not, or a value that it cannot have."""
        check_names("TensorRT", cls, options)
        device = options.get("device", cls.device)
        if isinstance(device, bool) or not isinstance(device, int) or device < 0:
            raise InputError("device must be a GPU's number.", given=repr(device), advice="0 is the first.")
        graph = options.get("cuda_graph", cls.cuda_graph)
        if not isinstance(graph, (bool, int, str)) or graph not in _TRUTHS:
            raise InputError("cuda_graph must be true or false.", given=repr(graph), advice="true is faster.")
        cache = options.get("cache", cls.cache)
        if cache is not None and not isinstance(cache, (str, Path)):
            raise InputError("cache must be a folder, or 'off'.", given=repr(cache), advice="Leave it out.")
        return cls(device, _TRUTHS[graph], None if cache is None else str(cache))


class TensorRtBackend:
    """Opens plan records.

    Args:
        name: ``tensorrt`` or ``tensorrt-rtx``, which chooses the library.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def available(self) -> Availability:
        """Returns version and GPUs, or what is missing."""
        return libraries.available(self.name)

    def files(self, engine: Path) -> tuple[Path, ...]:
        """Returns the record and the plan's parts. Raises BundleError if it is no plan record."""
        return (engine, *PlanRecord.read(engine).paths(engine))

    def device(self, options: Mapping[str, Any]) -> TensorRtDevice:
        """Returns the GPU that these options ask for. Raises InputError for one that is not of `TensorRtOptions`."""
        return TensorRtDevice(self.name, TensorRtOptions.of(options))


class TensorRtDevice:
    """One GPU, and on it a stream, the memory, and the library's runtime, which all sessions of a bundle share."""

    def __init__(self, backend: str, options: TensorRtOptions) -> None:
        self._backend = backend
        self._options = options
        self._stack = ExitStack()
        self._open: tuple[PlanContext, Plans, CudaMemory] | None = None

    @property
    def memory(self) -> CudaMemory | None:
        """Its memory, once entered."""
        return None if self._open is None else self._open[2]

    @property
    def maps_weights(self) -> bool:
        """False: each plan's weights are copied to the GPU."""
        return False

    def __enter__(self) -> TensorRtDevice:
        """Takes the GPU. Raises EngineError if library, driver or GPU are missing, or there is too little memory."""
        with ExitStack() as stack:
            library = libraries.load(self._backend)
            cuda = library.cuda
            gpu = library.gpu(self._options.device)
            cuda.set_device(gpu.index)
            stream = cuda.create_stream()
            stack.callback(cuda.destroy_stream, stream)
            memory = CudaMemory(cuda, gpu.index, stream)
            stack.callback(memory.close)
            scratch = Scratch(cuda, stream)
            stack.callback(scratch.close)
            logger, messages = logger_of(library.trt)
            messages.take()
            try:
                runtime = library.trt.Runtime(logger)
            except (TypeError, RuntimeError) as error:  # what the bindings raise when the library gives nothing
                said = messages.take() or error
                raise EngineError(f"{library.title} does not start.", given=said, advice="Install it again.") from error
            place = PlanContext(library, gpu, stream, scratch, runtime, messages)
            plans = Plans(place, self._options.cache)
            stack.callback(plans.close)
            stack.callback(cuda.wait, stream)
            self._open = (place, plans, memory)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._open is None:
            return
        place, self._open = self._open[0], None
        place.library.cuda.set_device(place.gpu.index)
        try:
            self._stack.close()
        except CudaError:
            if kind is None:  # else it was told already: after a failure the GPU refuses everything
                raise

    def open(self, engine: Path, weights: WeightMap, record: GraphRecord) -> TensorRtSession:  # noqa: ARG002
        """Returns a session of a plan, which holds its weights; it loads when it is entered.

        Raises:
            BundleError: the file is no plan record.
            EngineError: the plan is not one of this graph.
        """
        if self._open is None:
            raise EngineError("The device is not open.", given=engine, advice="Open engines inside 'with device:'.")
        place, plans, memory = self._open
        plan = PlanRecord.read(engine)
        check_graph(plan, engine, record)
        return TensorRtSession(place, plans, memory, engine, plan, record, self._options.cuda_graph)
