"""The backend: options, availability, and the device that a bundle opens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidiff_runtime.backends.external_data import files_of
from hidiff_runtime.backends.openvino.compile_record import PRECISIONS, CompileRecord
from hidiff_runtime.backends.openvino.compiled_graph import OpenVinoSession
from hidiff_runtime.backends.openvino.host_memory import HostMemory
from hidiff_runtime.backends.openvino.quiet_import import openvino
from hidiff_runtime.backends.option_checks import check_names, check_switch, check_threads
from hidiff_runtime.backends.processor_cores import usable_cores
from hidiff_runtime.backends.protocol import Availability, WeightMap
from hidiff_runtime.errors import EngineError, InputError
from hidiff_runtime.format.manifest import GraphRecord

LEAST = (2026, 4)
"""The oldest version whose behavior was looked at."""

_INSTALL = "pip install 'hidiff-runtime[openvino]'"


class PrecisionWarning(UserWarning):
    """The processor lacks the precision that a bundle was built for; another one is computed in."""


@dataclass(frozen=True)
class OpenVinoOptions:
    """Options of this backend.

    Args:
        threads: of an evaluation; 0 for one on each core that this process may use.
        precision: ``float32`` or ``bfloat16``, whatever the bundle was built for; ``auto`` for what it was built for,
            or float32 where the processor has no arithmetic for that.
        profile: whether sessions note how long each operator takes, for `operator_seconds`.
    """

    threads: int = 0
    precision: str = "auto"
    profile: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> OpenVinoOptions:
        """Returns the options by name. Raises InputError for one that there is not, or a value that it cannot have."""
        check_names("OpenVINO", cls, options)
        made = cls(**options)
        check_threads(made.threads)
        check_switch("profile", made.profile, default=False)
        if made.precision not in ("auto", *PRECISIONS):
            names = ", ".join(("auto", *PRECISIONS))
            raise InputError(
                "precision is not one it can be.", given=repr(made.precision), advice=f"Use one of {names}."
            )
        return made


class OpenVinoBackend:
    """Compiles portable graphs, as their compile records say."""

    name = "openvino"

    def available(self) -> Availability:
        """Returns the version, and what the processor computes in."""
        try:
            library = openvino()
            found = library.__version__.split("-")[0]
            version = tuple(map(int, found.split(".")[:2]))
            precisions = _precisions(library.Core())
        except Exception as error:  # a library that is there but does not load may raise anything
            return Availability(False, f"openvino is not installed ({error})", _INSTALL)
        if version < LEAST:
            needed = ".".join(map(str, LEAST))
            return Availability(False, f"openvino {found} is older than {needed}", f"{_INSTALL} --upgrade")
        return Availability(True, f"openvino {found} (cpu: {', '.join(precisions)})")

    def files(self, engine: Path) -> tuple[Path, ...]:
        """Returns the record, its graph, and the files that its weights lie in. Raises BundleError for broken ones."""
        return (engine, *files_of(engine.parent / CompileRecord.read(engine).graph))

    def device(self, options: Mapping[str, Any]) -> OpenVinoDevice:
        """Returns the device of these options. Raises InputError for one that is not of `OpenVinoOptions`."""
        return OpenVinoDevice(OpenVinoOptions.of(options))


class OpenVinoDevice:
    """The processor; sessions share the library's core and nothing else."""

    def __init__(self, options: OpenVinoOptions) -> None:
        self._options = options
        self._core: Any = None
        self._memory: HostMemory | None = None

    @property
    def memory(self) -> HostMemory | None:
        """The host's memory, once entered."""
        return self._memory

    @property
    def maps_weights(self) -> bool:
        """False: each session repacks the weights for itself."""
        return False

    def __enter__(self) -> OpenVinoDevice:
        """Looks for the library. Raises EngineError where it, or a precision that was named, is not here."""
        available = OpenVinoBackend().available()
        if not available.usable:
            raise EngineError("OpenVINO is not here.", given=available.detail, advice=available.advice)
        core = openvino().Core()
        if self._options.precision not in ("auto", *_precisions(core)):
            raise EngineError(
                f"This processor has no arithmetic for {self._options.precision}.",
                given=str(core.get_property("CPU", "FULL_DEVICE_NAME")),
                advice="Leave precision out, for float32 here.",
            )
        self._core, self._memory = core, HostMemory()
        return self

    def __exit__(self, *_: object) -> None:
        self._core, self._memory = None, None

    def open(self, engine: Path, weights: WeightMap, record: GraphRecord) -> OpenVinoSession:
        """Returns a session that compiles the engine when it is entered. Raises EngineError if a file is missing."""
        if self._core is None:
            raise EngineError("The device is not open.", given=engine, advice="Open engines inside 'with device:'.")
        for path in (engine, *weights.values()):
            if not path.is_file():
                raise EngineError("A file of the engine is missing.", given=path, advice="Build the bundle again.")
        settings = {
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self._options.threads or usable_cores(),
            # By default threads are bound to cores, counted from the first in every process: two workers of one thread
            # each would share a core. A process by itself is as fast either way.
            "ENABLE_CPU_PINNING": False,
            "PERF_COUNT": self._options.profile,
        }
        return OpenVinoSession(engine, record, self._core, self._precision(engine), settings)

    def _precision(self, engine: Path) -> str:
        """Returns what an engine computes in, and says so where that is not what it was built for."""
        if self._options.precision != "auto":
            return self._options.precision
        built = CompileRecord.read(engine).precision
        if built in _precisions(self._core):
            return built
        warnings.warn(
            f"This processor has no arithmetic for {built}, which the bundle was built for: it computes in float32.",
            PrecisionWarning,
            stacklevel=2,
        )
        return "float32"


def _precisions(core: Any) -> tuple[str, ...]:
    """Returns what the processor computes in without emulation."""
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("float32", "bfloat16") if "BF16" in able else ("float32",)
