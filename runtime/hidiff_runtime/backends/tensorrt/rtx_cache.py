"""What TensorRT-RTX has and TensorRT has not: it finishes engines on the GPU, and keeps what that made in a cache."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

from hidiff_runtime.backends.tensorrt.plan_validation import MORE_ROOM, rebuild_command
from hidiff_runtime.backends.tensorrt.runtime_library import GpuInfo, LoadedLibrary
from hidiff_runtime.errors import EngineError
from hidiff_runtime.format.atomic_write import atomic_write
from hidiff_runtime.format.manifest import MANIFEST

_LOG = logging.getLogger(__name__)

_WORDS = {
    "VERSION_MISMATCH": "another version of TensorRT-RTX built it",
    "UNSUPPORTED_CC": "it was built for other GPUs",
    "OLD_CUDA_DRIVER": "NVIDIA's driver is too old for it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory for it",
    "MALFORMED_ENGINE": "it is no engine of TensorRT-RTX",
    "CUDA_ERROR": "CUDA's driver or runtime is not installed as it should be",
}


def check_validity(runtime: Any, plan: memoryview, path: Path, library: LoadedLibrary, gpu: GpuInfo) -> None:
    """Asks TensorRT-RTX whether it can run a plan, from its first bytes.

    Raises:
        EngineError: it cannot; with its own diagnosis.
    """
    trt = library.trt
    validity, diagnosis = runtime.get_engine_validity(plan[: runtime.engine_header_size])
    if validity == trt.EngineValidity.INVALID:
        named = [
            name for name, flag in trt.EngineInvalidityDiagnostics.__members__.items() if int(flag) & int(diagnosis)
        ]
        advice = f"Update the driver if it is that, or build the engine again. {rebuild_command(library, gpu)}"
        raise EngineError(
            "TensorRT-RTX cannot run the engine here.",
            given=f"{path}: {', '.join(_WORDS.get(name, name) for name in named) or 'no reason given'}",
            advice=MORE_ROOM if "INSUFFICIENT_GPU_MEMORY" in named else advice,
        )
    if validity == trt.EngineValidity.SUBOPTIMAL:
        _LOG.warning("TensorRT-RTX expects %s to be slower than it could be on %s.", path, gpu)


def create_context(engine: Any, trt: Any, kept: RuntimeCache | None) -> tuple[Any, Any]:
    """Returns an execution context with memory of ours, and the configuration that it may refer to as long as it lives.

    Kernels are finished here, or taken from the cache.
    """
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    # Graphs are recorded by us: TensorRT-RTX keeps one, for one set of addresses, and we alternate between two.
    config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
    if kept is not None:
        kept.attach(config)
    return engine.create_execution_context(config), config


def is_capturable(context: Any, stream: Any) -> bool:
    """Returns whether the context's work can be recorded as a CUDA graph."""
    return bool(context.is_stream_capturable(int(stream)))


def cache_file(option: str | None, record: Path, library: LoadedLibrary, gpu: GpuInfo) -> Path | None:
    """Returns where the kernels finished for this GPU are kept; ``None`` for nowhere.

    Args:
        option: a folder, ``off``, or ``None`` for one beside the engine's bundle, named after it.
        record: of an engine, a file in the bundle.
        library: its version is part of the name.
        gpu: its name is part of the name.
    """
    if option == "off":
        return None
    if option is None:
        bundle = next((folder for folder in record.absolute().parents if (folder / MANIFEST).is_file()), None)
        if bundle is None:
            return None
        folder = bundle.with_name(f"{bundle.name}.cache")
    else:
        folder = Path(option)
    model = re.sub(r"[^A-Za-z0-9]+", "-", gpu.name).strip("-")
    return folder / f"{library.backend}-{library.version}-{model}.bin"


class RuntimeCache:
    """Finished kernels, kept from process to process. Whatever is wrong with the file, engines run without it.

    Args:
        path: the file; read when the first engine is opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: Any = None
        self._saved = ""

    def attach(self, config: Any) -> None:
        """Makes a context of this configuration use the cache."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._load()
        if not config.set_runtime_cache(self._cache):
            self._warn("TensorRT-RTX does not take it")

    def save(self) -> None:
        """Writes the file if there is something new, beside its name first."""
        if self._cache is None:
            return
        serialized = self._cache.serialize()
        if serialized is None:
            self._warn("TensorRT-RTX does not write it")
            return
        content = bytes(memoryview(serialized))
        digest = hashlib.sha256(content).hexdigest()
        if digest == self._saved:
            return
        self._saved = digest  # also when writing fails: once is enough to be told
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._path, permissions=0o600) as file:
                file.write(content)
        except OSError as error:
            self._warn(str(error))

    def close(self) -> None:
        """Lets go of the library's object, after all contexts that used it."""
        self._cache = None

    def _load(self) -> None:
        try:
            with self._path.open("rb") as file:
                if _is_foreign(os.fstat(file.fileno())):
                    self._warn("another user can write it")
                    return
                content = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn(str(error))
            return
        if self._cache.deserialize(content):
            self._saved = hashlib.sha256(content).hexdigest()
        else:
            self._warn("it is broken, or of another driver; it is made anew")

    def _warn(self, reason: str) -> None:
        _LOG.warning("The runtime cache %s is not used: %s. Engines take longer to open.", self._path, reason)


def _is_foreign(status: os.stat_result) -> bool:
    """Returns whether another user may have written the file: it holds code that runs on the GPU."""
    if os.name != "posix":
        return False
    return status.st_uid not in (0, os.geteuid()) or bool(status.st_mode & 0o002)
