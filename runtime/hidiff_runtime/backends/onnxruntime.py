"""ONNX Runtime: on the CPU everywhere, on CUDA where its GPU build finds a device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.backends.protocol import Availability, Backend, Session, WeightMap
from hidiff_runtime.errors import EngineError, InputError
from hidiff_runtime.manifest import GraphRecord, TensorSpec

NAME = "onnxruntime"

_INSTALL = "pip install 'hidiff-runtime[cpu]', or 'hidiff-runtime[gpu]' for CUDA."
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_WEIGHTS = ("packed", "shared")


@dataclass(frozen=True)
class Options:
    """Options of this backend.

    Args:
        device: ``cpu``, ``cuda``, or ``auto`` for CUDA where there is a device.
        threads: of an evaluation; 0 for one on each core that this process may use.
        weights: ``packed`` rearranges them for speed, in memory of each session's own; ``shared`` uses them as they
            lie in the store, which all sessions map.
    """

    device: str = "auto"
    threads: int = 0
    weights: str = "packed"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Options:
        """The options by name. Raises InputError for one that there is not, or a value that it cannot have."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise InputError(
                    "ONNX Runtime has no such option here.", given=name, advice=f"There are {', '.join(known)}."
                )
        made = cls(**options)
        _one_of("device", made.device, ("auto", *_PROVIDERS))
        _one_of("weights", made.weights, _WEIGHTS)
        if isinstance(made.threads, bool) or not isinstance(made.threads, int) or made.threads < 0:
            raise InputError("threads must be a whole number.", given=repr(made.threads), advice="0 means all cores.")
        return made


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is not one it can be.", given=repr(value), advice=f"Use one of {', '.join(allowed)}.")


class OnnxRuntimeBackend:
    """Opens ONNX files whose weights lie in the store beside them."""

    name = NAME

    def available(self) -> Availability:
        """Version and execution providers."""
        try:
            import onnxruntime
        except ImportError as error:
            return Availability(False, f"onnxruntime is not installed ({error})", _INSTALL)
        found = onnxruntime.get_available_providers()
        devices = [device for device, provider in _PROVIDERS.items() if provider in found]
        return Availability(True, f"onnxruntime {onnxruntime.__version__} ({', '.join(devices)})")

    def open(self, engine: Path, weights: WeightMap, record: GraphRecord, options: Mapping[str, Any]) -> Session:
        """A session of the engine, which loads when it is entered.

        Raises:
            EngineError: ONNX Runtime or the file is missing.
            InputError: an option is not one of `Options`.
        """
        chosen = Options.of(options)
        available = self.available()
        if not available.usable:
            raise EngineError("ONNX Runtime is not here.", given=available.detail, advice=available.advice)
        for path in (engine, *weights.values()):
            if not path.is_file():
                raise EngineError("A file of the engine is missing.", given=path, advice="Build the bundle again.")
        return OnnxRuntimeSession(engine, record, chosen)


def backend() -> Backend:
    """This backend."""
    return OnnxRuntimeBackend()


class OnnxRuntimeSession:
    """One engine; loaded on entering, freed on leaving."""

    def __init__(self, engine: Path, record: GraphRecord, options: Options) -> None:
        self._engine = engine
        self._record = record
        self._options = options
        self._session: Any = None

    def __enter__(self) -> OnnxRuntimeSession:
        """Loads the engine. Raises EngineError when ONNX Runtime refuses it or lacks the device asked for."""
        import onnxruntime

        wanted = self._options.device
        offered = onnxruntime.get_available_providers()
        devices = ("cuda", "cpu") if wanted == "auto" else (wanted,)
        providers = [_PROVIDERS[device] for device in devices if _PROVIDERS[device] in offered]
        try:
            session = onnxruntime.InferenceSession(self._engine, _session_options(self._options), providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            raise EngineError(
                "ONNX Runtime cannot load an engine.",
                given=f"{self._engine}: {error}",
                advice="Build the bundle again, or install the onnxruntime version its manifest names.",
            ) from error
        if wanted != "auto" and _PROVIDERS[wanted] not in session.get_providers():
            raise EngineError(
                f"ONNX Runtime has no {wanted} device here.",
                given=", ".join(session.get_providers()),
                advice="Use device=auto, or install 'hidiff-runtime[gpu]' and NVIDIA's driver.",
            )
        self._session = session
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session = None

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluates the engine; raises EngineError for an input that its record does not list, or a failure."""
        if self._session is None:
            raise EngineError("The engine is not open.", given=self._engine, advice="Run it inside 'with session:'.")
        expected = {spec.name for spec in self._record.inputs}
        if inputs.keys() != expected:
            raise EngineError(
                "The engine takes other inputs.", given=", ".join(sorted(inputs)), advice=", ".join(sorted(expected))
            )
        for spec in self._record.inputs:
            _check(spec, inputs[spec.name])
        names = [spec.name for spec in self._record.outputs]
        try:
            outputs = self._session.run(names, {name: np.ascontiguousarray(array) for name, array in inputs.items()})
        except Exception as error:  # as above
            raise EngineError("ONNX Runtime failed while evaluating.", given=f"{self._engine}: {error}") from error
        return dict(zip(names, outputs, strict=True))


def _check(spec: TensorSpec, array: NDArray[Any]) -> None:
    if array.shape != spec.shape or array.dtype != spec.dtype:
        raise EngineError(
            "An input is not what the engine takes.", given=f"{array.dtype}{list(array.shape)} for {spec}"
        )


def _session_options(options: Options) -> Any:
    import onnxruntime

    made = onnxruntime.SessionOptions()
    made.log_severity_level = 3  # errors; it warns of graph details that nobody can act on
    made.intra_op_num_threads = options.threads or len(os.sched_getaffinity(0))
    made.inter_op_num_threads = 1
    # Its planner keeps a buffer for each size that occurs, until the last tensor of that size is dead: for SD1.5 at
    # 1024 pixels 2.0 GB, where freeing each tensor at its last use needs 0.9 GB and takes no longer. The pattern of a
    # first evaluation, kept for the later ones, is another 0.8 GB.
    made.enable_mem_reuse = False
    made.enable_mem_pattern = False
    if options.weights == "shared":
        # Prepacking copies weights, and so does the NCHWc layout, which "extended" stops short of.
        made.add_session_config_entry("session.disable_prepacking", "1")
        made.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return made
