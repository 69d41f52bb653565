"""Plans in the GPU's memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidiff_runtime.backends.tensorrt import rtx_cache
from hidiff_runtime.backends.tensorrt.cuda import CudaError
from hidiff_runtime.backends.tensorrt.gpu_memory import Scratch
from hidiff_runtime.backends.tensorrt.logger import Messages
from hidiff_runtime.backends.tensorrt.mapped_parts import map_parts
from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord
from hidiff_runtime.backends.tensorrt.plan_validation import check_record, check_tensors, too_little_memory
from hidiff_runtime.backends.tensorrt.runtime_library import GpuInfo, LoadedLibrary
from hidiff_runtime.errors import EngineError
from hidiff_runtime.format.codec import REBUILD


@dataclass(frozen=True)
class PlanContext:
    """Where plans run: everything that all of them share.

    Args:
        library: that reads and runs them.
        gpu: the device.
        stream: on which they run one after another.
        scratch: for their activations.
        runtime: the library's object that deserializes.
        messages: what the library said.
    """

    library: LoadedLibrary
    gpu: GpuInfo
    stream: Any
    scratch: Scratch
    runtime: Any
    messages: Messages


class Plan:
    """One deserialized plan and its execution context.

    Args:
        place: it runs at.
        path: of its record, for messages.
        engine: the library's engine.
        context: the library's execution context, without memory yet.
        config: of the context, if it has one.
    """

    def __init__(self, place: PlanContext, path: Path, engine: Any, context: Any, config: Any) -> None:
        self.path = path
        self._place = place
        self._engine = engine
        self._context = context
        self._config = config
        self._bound: dict[str, int] = {}
        self._moves = 0

    def capturable(self) -> bool:
        """Returns whether its work can be recorded as a CUDA graph, as far as the library tells."""
        return not self._place.library.is_rtx or rtx_cache.is_capturable(self._context, self._place.stream)

    def prepare(self) -> int:
        """Gives the context its scratch memory; returns how often that has moved.

        Raises:
            EngineError: there is too little memory.
        """
        scratch = self._place.scratch
        size = int(self._engine.device_memory_size_v2)
        try:
            address = scratch.at_least(size)
        except CudaError as error:
            if not error.out_of_memory:
                raise
            free = self._place.library.cuda.free_memory()
            raise too_little_memory(self.path, 0, size, free) from error
        if self._moves != scratch.moves:
            self._context.set_device_memory(address, scratch.size)
            self._moves = scratch.moves
        return self._moves

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Asks for one evaluation.

        Args:
            addresses: of every input and output, by name.

        Raises:
            EngineError: the library refuses.
        """
        for name, address in addresses.items():
            if self._bound.get(name) != address:
                if not self._context.set_tensor_address(name, address):
                    raise self._failure(f"{self._place.library.title} refuses the tensor {name}.")
                self._bound[name] = address
        if not self._context.execute_async_v3(int(self._place.stream)):
            raise self._failure(f"{self._place.library.title} failed while evaluating.")

    def close(self) -> None:
        """Frees the context and the engine once the stream has come to its end."""
        try:
            self._place.library.cuda.wait(self._place.stream)
        finally:
            self._context = None
            self._config = None
            self._engine = None

    def _failure(self, summary: str) -> EngineError:
        said = self._place.messages.take()
        return EngineError(summary, given=f"{self.path}: {said}" if said else self.path)


class Plans:
    """Opens plans. Safe to use from several threads: one may open the next while another runs this one.

    Args:
        place: where they run.
        cache: ``off``, a folder, or ``None`` for one beside the bundle.
    """

    def __init__(self, place: PlanContext, cache: str | None) -> None:
        self._place = place
        self._cache_option = cache
        self._cache: rtx_cache.RuntimeCache | None = None
        self._known: set[Path] = set()
        self._lock = threading.Lock()

    def acquire(self, path: Path, record: PlanRecord) -> Plan:
        """Returns the plan whose record lies at ``path``; to be released.

        Raises:
            EngineError: it does not fit this library or GPU, there is too little memory, or it does not load.
        """
        with self._lock:
            try:
                return self._loaded(path, record)
            except EngineError as error:
                # A traceback keeps an engine, and so its memory, for as long as somebody keeps the error.
                raise error.with_traceback(None) from error.__cause__

    def release(self, plan: Plan) -> None:
        """Closes the plan."""
        with self._lock:
            plan.close()

    def close(self) -> None:
        """Keeps what the library finished for this GPU."""
        if self._cache is not None:
            self._cache.save()
            self._cache.close()

    def _loaded(self, path: Path, record: PlanRecord) -> Plan:
        place, library = self._place, self._place.library
        check_record(record, path, library, place.gpu)
        library.cuda.set_device(place.gpu.index)
        blob = map_parts(record.paths(path))
        if library.is_rtx:
            rtx_cache.check_validity(place.runtime, blob, path, library, place.gpu)
        self._check_memory(path, len(blob), 0)
        engine = self._deserialized(path, blob)
        check_tensors(engine, record, path, library.trt)
        self._check_memory(path, 0, int(engine.device_memory_size_v2) - place.scratch.size)
        return Plan(place, path, engine, *self._created_context(engine, path))

    def _check_memory(self, path: Path, engine: int, activations: int) -> None:
        """Refuses what cannot fit, where the GPU knows, before the library fails on it in its own words."""
        cuda, gpu = self._place.library.cuda, self._place.gpu
        free = cuda.free_memory()
        if engine + activations > free and not cuda.shares_memory(gpu.index):
            raise too_little_memory(path, engine, activations, free)

    def _deserialized(self, path: Path, blob: memoryview) -> Any:
        place = self._place
        place.messages.take()
        engine = place.runtime.deserialize_cuda_engine(blob)
        if engine is not None:
            return engine
        said = place.messages.take()
        free = place.library.cuda.free_memory()
        if "out of memory" in said.lower() or "outofmemory" in said.lower():
            raise too_little_memory(path, len(blob), 0, free)
        raise EngineError(
            f"{place.library.title} cannot load an engine.",
            given=f"{path}: {said or 'no reason given'}",
            advice=REBUILD,
        )

    def _created_context(self, engine: Any, path: Path) -> tuple[Any, Any]:
        place = self._place
        place.messages.take()
        trt = place.library.trt
        config = None
        if place.library.is_rtx:
            context, config = rtx_cache.create_context(engine, trt, self._runtime_cache(path))
            if self._cache is not None and path not in self._known:
                self._cache.save()  # now, too: a server may never come to its end
            self._known.add(path)
        else:
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            said = place.messages.take() or "no reason given"
            raise EngineError(f"{place.library.title} cannot make an engine ready.", given=f"{path}: {said}")
        return context, config

    def _runtime_cache(self, path: Path) -> rtx_cache.RuntimeCache | None:
        if self._cache is None:
            file = rtx_cache.cache_file(self._cache_option, path, self._place.library, self._place.gpu)
            self._cache = None if file is None else rtx_cache.RuntimeCache(file)
        return self._cache
