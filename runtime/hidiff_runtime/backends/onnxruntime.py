"""ONNX Runtime: on the CPU everywhere, on CUDA where its GPU build finds a device."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.backends.external_data import files_of, relinked
from hidiff_runtime.backends.onnxruntime_profile import seconds_by_operator
from hidiff_runtime.backends.option_checks import check_names, check_switch, check_threads, no_profile
from hidiff_runtime.backends.processor_cores import usable_cores
from hidiff_runtime.backends.protocol import Availability, DeviceArray, WeightMap, check_fits, check_tensors
from hidiff_runtime.backends.signature import signature_faults
from hidiff_runtime.errors import BundleError, EngineError, InputError
from hidiff_runtime.format.codec import REBUILD
from hidiff_runtime.format.dtypes import BY_NAME
from hidiff_runtime.format.manifest import GraphRecord
from hidiff_runtime.onnxruntime_import import onnxruntime

_INSTALL = "pip install 'hidiff-runtime[cpu]', or 'hidiff-runtime[gpu]' for CUDA."
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_WEIGHTS = ("packed", "shared")
_TYPES = {known.onnxruntime: name for name, known in BY_NAME.items()}
_EXTERNAL_DATA = "session.model_external_initializers_file_folder_path"
"""Where a graph that is given as bytes finds its weights."""

Place = Literal["cuda", "cpu"]

_CUDA_OPTIONS: dict[str, str] = {
    # float32 graphs mean float32: by default convolutions and matrix products drop 13 bits of the mantissa.
    "use_tf32": "0",
    # The default measures every algorithm for every convolution when an engine first runs. An engine is opened anew at
    # each phase change, so that each picture would pay for it; cuDNN's own choice for the shape costs nothing.
    "cudnn_conv_algo_search": "HEURISTIC",
    # The default doubles the arena whenever it is full; shapes are static, so what one evaluation needs is enough.
    "arena_extend_strategy": "kSameAsRequested",
}
"""Options of the CUDA provider, each where its default does not fit."""

_OUT_OF_MEMORY = ("failed to allocate memory", "out of memory", "available memory of", "bad_alloc")
"""What ONNX Runtime's text says when the device's memory is full."""


@dataclass(frozen=True)
class OnnxRuntimeOptions:
    """Options of this backend.

    Args:
        device: ``cpu``, ``cuda``, ``auto`` for CUDA where there is a device, or which GPU, as CUDA counts them.
        threads: of an evaluation; 0 for one on each core that this process may use.
        weights: ``packed`` rearranges them for speed, in memory of each session's own; ``shared`` uses them as they
            lie in the store, which all sessions map.
        optimize: False to evaluate every node of the graph as it stands there, none fused, folded or left out.
        profile: whether sessions note how long each operator takes, for `operator_seconds`.
    """

    device: str | int = "auto"
    threads: int = 0
    weights: str = "packed"
    optimize: bool = True
    profile: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> OnnxRuntimeOptions:
        """Returns the options by name. Raises InputError for one that there is not, or a value that it cannot have."""
        check_names("ONNX Runtime", cls, options)
        made = cls(**options)
        if type(made.device) is not int or made.device < 0:
            _one_of("device", made.device, ("auto", *_PROVIDERS))
        _one_of("weights", made.weights, _WEIGHTS)
        check_threads(made.threads)
        check_switch("optimize", made.optimize, default=True)
        check_switch("profile", made.profile, default=False)
        return made

    @property
    def gpu(self) -> int:
        """Which GPU, where it is not the CPU."""
        return self.device if isinstance(self.device, int) else 0


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is not one it can be.", given=repr(value), advice=f"Use one of {', '.join(allowed)}.")


class OnnxRuntimeBackend:
    """Opens ONNX files whose weights lie in the store beside them."""

    name = "onnxruntime"

    def available(self) -> Availability:
        """Returns version and execution providers."""
        try:
            ort = onnxruntime()
        except ImportError as error:
            return Availability(False, f"onnxruntime is not installed ({error})", _INSTALL)
        found = ort.get_available_providers()
        devices = [device for device, provider in _PROVIDERS.items() if provider in found]
        return Availability(True, f"onnxruntime {ort.__version__} ({', '.join(devices)})")

    def files(self, engine: Path) -> tuple[Path, ...]:
        """Returns the graph and the files that its weights lie in. Raises BundleError for one that is elsewhere."""
        return files_of(engine)

    def device(self, options: Mapping[str, Any]) -> OnnxRuntimeDevice:
        """Returns the device of these options. Raises InputError for one that is not of `OnnxRuntimeOptions`."""
        return OnnxRuntimeDevice(OnnxRuntimeOptions.of(options))


class OnnxRuntimeDevice:
    """The CPU or one GPU; sessions share no more than the place."""

    def __init__(self, options: OnnxRuntimeOptions) -> None:
        self._options = options
        self._memory: OrtMemory | None = None

    @property
    def memory(self) -> OrtMemory | None:
        """Memory of ONNX Runtime's own tensors, once entered."""
        return self._memory

    @property
    def maps_weights(self) -> bool:
        """Whether weights stay in the mapped store: not where the CUDA provider copies them to the GPU."""
        return self._options.weights == "shared" and self._memory is not None and self._memory.on_host

    def __enter__(self) -> OnnxRuntimeDevice:
        """Looks for the device. Raises EngineError when ONNX Runtime, or the device asked for, is not here."""
        available = OnnxRuntimeBackend().available()
        if not available.usable:
            raise EngineError("ONNX Runtime is not here.", given=available.detail, advice=available.advice)
        options = self._options
        fault = _fault_of_cuda(options.gpu) if options.device != "cpu" else "not asked for"
        if fault and options.device not in ("auto", "cpu"):
            raise EngineError(
                "ONNX Runtime has no cuda device here.",
                given=fault,
                advice="Use device=auto, or install 'hidiff-runtime[gpu]' and NVIDIA's driver.",
            )
        self._memory = OrtMemory("cpu") if fault else OrtMemory("cuda", options.gpu)
        return self

    def __exit__(self, *_: object) -> None:
        self._memory = None

    def open(self, engine: Path, weights: WeightMap, record: GraphRecord) -> OnnxRuntimeSession:
        """Returns a session of the engine, which loads when it is entered. Raises EngineError if a file is missing."""
        if self._memory is None:
            raise EngineError("The device is not open.", given=engine, advice="Open engines inside 'with device:'.")
        for path in (engine, *weights.values()):
            if not path.is_file():
                raise EngineError("A file of the engine is missing.", given=path, advice="Build the bundle again.")
        return OnnxRuntimeSession(engine, tuple(weights.values()), record, self._options, self._memory.place)


def _fault_of_cuda(gpu: int) -> str:
    """Returns why the CUDA provider cannot run here on this GPU; empty when it can."""
    ort = onnxruntime()

    if _PROVIDERS["cuda"] not in (offered := ort.get_available_providers()):
        return f"the providers {', '.join(offered)}"
    with contextlib.redirect_stdout(io.StringIO()):  # where pip installed them it finds CUDA's libraries, and prints
        ort.preload_dlls()
    try:
        OrtMemory("cuda", gpu).empty((1,), "float32")
    except EngineError as error:
        return str(error.given)
    return ""


@dataclass(frozen=True)
class OrtArray:
    """A tensor of ONNX Runtime's.

    Args:
        shape: static.
        dtype: ``float32`` or ``int32``.
        value: its ``OrtValue``.
    """

    shape: tuple[int, ...]
    dtype: str
    value: Any


class OrtMemory:
    """ONNX Runtime's tensors in one place. Copies and evaluations there wait for each other, so their order holds."""

    def __init__(self, place: Place, gpu: int = 0) -> None:
        self.place = place
        self._gpu = gpu

    @property
    def on_host(self) -> bool:
        """True on the CPU."""
        return self.place == "cpu"

    def empty(self, shape: tuple[int, ...], dtype: str) -> OrtArray:
        """Returns a new tensor. Raises EngineError when there is too little memory."""
        ort = onnxruntime()

        try:
            value = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype), self.place, self._gpu)
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            raise _failure(f"ONNX Runtime cannot make {dtype}{list(shape)} on {self.place}.", error) from error
        return OrtArray(shape, dtype, value)

    def upload(self, array: NDArray[Any], into: DeviceArray) -> None:
        """Copies before it returns. Raises EngineError for another shape or type than that of ``into``."""
        check_fits(array, into)
        cast(OrtArray, into).value.update_inplace(np.ascontiguousarray(array))

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """Returns a copy: on the CPU ONNX Runtime gives a view."""
        return np.array(cast(OrtArray, array).value.numpy())


class OnnxRuntimeSession:
    """One engine; loaded on entering, freed on leaving."""

    def __init__(
        self, engine: Path, weights: Sequence[Path], record: GraphRecord, options: OnnxRuntimeOptions, place: Place
    ) -> None:
        self._engine = engine
        self._weights = weights
        self._record = record
        self._options = options
        self._place = place
        self._session: Any = None
        self._profile: TemporaryDirectory[str] | None = None

    def __enter__(self) -> OnnxRuntimeSession:
        """Loads the engine. Raises EngineError when ONNX Runtime refuses it, or has no memory for it."""
        ort = onnxruntime()

        providers: list[Any] = [_PROVIDERS["cpu"]]
        if self._place == "cuda":
            providers.insert(0, (_PROVIDERS["cuda"], {**_CUDA_OPTIONS, "device_id": str(self._options.gpu)}))
        settings = _session_options(self._options)
        if self._options.profile:
            self._profile = TemporaryDirectory()
            settings.enable_profiling, settings.profile_file_prefix = True, f"{self._profile.name}/profile"
        model: Path | bytes = self._engine
        if found_behind_links := relinked(self._engine, self._weights):
            model, folder = found_behind_links
            settings.add_session_config_entry(_EXTERNAL_DATA, str(folder))
        try:
            session = ort.InferenceSession(model, settings, providers=providers)
        except Exception as error:  # as above
            raise _failure(
                "ONNX Runtime cannot load an engine.",
                error,
                engine=self._engine,
                advice="Build the bundle again, or install the onnxruntime version its manifest names.",
            ) from error
        if _PROVIDERS[self._place] not in (found := session.get_providers()):
            raise EngineError(
                f"ONNX Runtime has no {self._place} device here.",
                given=", ".join(found),
                advice="Use device=cpu, or install 'hidiff-runtime[gpu]' and NVIDIA's driver.",
            )
        _check_signature(session, self._record, self._engine)
        self._session = session
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        if self._profile is not None:
            self._profile.cleanup()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluates the engine; raises EngineError for an input that its record does not list, or a failure."""
        self._check_open()
        check_tensors("inputs", self._record.inputs, inputs)
        names = [spec.name for spec in self._record.outputs]
        feed = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        try:
            outputs = self._session.run(names, feed)
        except Exception as error:  # as above
            raise _failure("ONNX Runtime failed while evaluating.", error, engine=self._engine) from error
        return dict(zip(names, outputs, strict=True))

    def execute(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """Evaluates the engine from tensors into tensors; raises as `run` does."""
        self._check_open()
        check_tensors("inputs", self._record.inputs, inputs)
        check_tensors("outputs", self._record.outputs, outputs)
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, cast(OrtArray, array).value)
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, cast(OrtArray, array).value)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # as above
            raise _failure("ONNX Runtime failed while evaluating.", error, engine=self._engine) from error

    def operator_seconds(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """Evaluates the engine and ends its profile; see `ProfiledSession`. Raises EngineError where it has none."""
        self._check_open()
        if self._profile is None:
            raise no_profile(self._engine)
        self.run(inputs)
        self._session.end_profiling()
        return seconds_by_operator(next(Path(self._profile.name).iterdir()))

    def _check_open(self) -> None:
        if self._session is None:
            raise EngineError("The engine is not open.", given=self._engine, advice="Run it inside 'with session:'.")


def _check_signature(session: Any, record: GraphRecord, engine: Path) -> None:
    """Refuses an engine whose inputs or outputs are not those that the bundle says it has. Raises BundleError."""
    takes, gives = (
        {node.name: f"{_TYPES.get(node.type, node.type)}{list(node.shape)}" for node in nodes}
        for nodes in (session.get_inputs(), session.get_outputs())
    )
    faults = signature_faults("input", record.inputs, takes, "the manifest")
    faults += signature_faults("output", record.outputs, gives, "the manifest")
    if faults:
        raise BundleError(
            f"The engine is not of the graph {record.graph} that the manifest names.",
            given=f"{engine}: {'; '.join(faults)[:1000]}",
            advice=REBUILD,
        )


def _failure(summary: str, error: Exception, *, engine: Path | None = None, advice: str = "") -> EngineError:
    """Returns what ONNX Runtime raised, as this package's error; too little memory has advice of its own."""
    given = str(error) if engine is None else f"{engine}: {error}"
    if any(sign in given.lower() for sign in _OUT_OF_MEMORY):
        return EngineError(
            f"{summary} There is too little memory.",
            given=given,
            advice="Open the bundle with resident='current' (--resident current), without prefetch and without "
            "memory_limit, which keeps one phase's engine, free what else is on the device, or build "
            "for fewer pixels or half precision.",
        )
    return EngineError(summary, given=given, advice=advice)


def _session_options(options: OnnxRuntimeOptions) -> Any:
    ort = onnxruntime()

    made = ort.SessionOptions()
    made.log_severity_level = 3  # errors; it warns of graph details that nobody can act on
    made.intra_op_num_threads = options.threads or usable_cores()
    made.inter_op_num_threads = 1
    # Its planner keeps a buffer for each size that occurs, until the last tensor of that size is dead: for SD1.5 at
    # 1024 pixels 2.0 GB, where freeing each tensor at its last use needs 0.9 GB and takes no longer. The pattern of a
    # first evaluation, kept for the later ones, is another 0.8 GB.
    made.enable_mem_reuse = False
    made.enable_mem_pattern = False
    if options.weights == "shared":
        # Prepacking copies weights, and so does the NCHWc layout, which "extended" stops short of.
        made.add_session_config_entry("session.disable_prepacking", "1")
        made.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    if not options.optimize:
        made.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return made
