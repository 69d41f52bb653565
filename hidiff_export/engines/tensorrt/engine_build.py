"""In the worker: builds one engine, or says what the library can build here."""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hidiff_export.child_process import Channel
from hidiff_export.engines.tensorrt.nested_progress import NestedProgress
from hidiff_export.engines.tensorrt.network import (
    Loaded,
    NetworkRefused,
    SignatureDiffers,
    check_signature,
    layer_list,
    load_network,
)
from hidiff_export.engines.tensorrt.worker_protocol import REFUSED, SIGNATURE, BuildRequest

_KIBIBYTE = 1024

_SIZES = {"scratch_bytes": "Max Scratch Memory:", "weights_bytes": "Total Weights Memory:"}
"""How the library words what an engine takes on the device beside its inputs and outputs; no API says it of a plan."""


def examine(trt: Any, _request: Mapping[str, Any], channel: Channel) -> None:
    """Says the library's version, the targets it knows, if it builds ahead of time, and the GPU that is here."""
    known = trt.ComputeCapability.__members__ if hasattr(trt, "ComputeCapability") else ()
    targets = [name.lower() for name in known if name.startswith("SM")]
    channel.send("done", version=trt.__version__, targets=targets, gpu=gpu())


def gpu() -> dict[str, str] | None:
    """Returns name and compute capability (``sm90``) of the GPU that CUDA takes first; None where there is none."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    failure, count = runtime.cudaGetDeviceCount()
    if failure != runtime.cudaError_t.cudaSuccess or not count:
        return None
    failure, properties = runtime.cudaGetDeviceProperties(0)
    if failure != runtime.cudaError_t.cudaSuccess:
        return None
    return {"name": properties.name.decode(), "target": f"sm{properties.major}{properties.minor}"}


def build(trt: Any, request: Mapping[str, Any], channel: Channel) -> None:
    """Builds the engine that a `BuildRequest` asks for, and writes its plan and its list of layers."""
    wanted = BuildRequest.from_json(request)
    started = time.monotonic()
    logger = _logger(trt)
    try:
        channel.send("progress", fraction=0.0, note="parsing")
        loaded = load_network(trt, logger, wanted)
        check_signature(loaded.network, wanted)
        layers = layer_list(loaded.network)
        plan = _serialized(trt, loaded, wanted, channel)
    except NetworkRefused as refused:
        channel.send("failed", of=REFUSED, errors=[*refused.args] or logger.errors)
        return
    except SignatureDiffers as differs:
        channel.send("failed", of=SIGNATURE, errors=[*differs.args])
        return
    if channel.cancelled():
        channel.send("cancelled")
    elif plan is None or logger.errors:
        channel.send("failed", of=REFUSED, errors=logger.errors)
    else:
        here = gpu()
        Path(wanted.layers).write_text((here and _inspected(trt, plan)) or layers, encoding="utf-8")
        with Path(wanted.plan).open("wb") as file:
            file.write(plan)
            file.flush()
            os.fsync(file.fileno())
        channel.send(
            "done",
            version=trt.__version__,
            gpu=here,
            seconds=round(time.monotonic() - started, 1),
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTE,
            **logger.sizes,
        )


def _serialized(trt: Any, loaded: Loaded, request: BuildRequest, channel: Channel) -> Any:
    """Returns the plan as a buffer; None where the library refuses, whose reasons the logger has."""
    from polygraphy.backend.trt import EngineBytesFromNetwork
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    network = loaded.builder, loaded.network, loaded.parser
    config = _config(trt, request, _monitor(trt, channel))
    try:
        return EngineBytesFromNetwork(network, config=config, save_timing_cache=request.timing_cache)()
    except PolygraphyException:
        return None


def _config(trt: Any, request: BuildRequest, monitor: Any) -> Any:
    """Returns the loader of the builder's configuration. TF32 is off, so that float32 means float32."""
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig

    common = {"profiling_verbosity": trt.ProfilingVerbosity.DETAILED, "progress_monitor": monitor}
    if not hasattr(trt, "ComputeCapability"):
        return CreateConfig(tf32=False, load_timing_cache=request.timing_cache, **common)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    capabilities = [(int(target[2:-1]), int(target[-1])) for target in request.targets]
    config = CreateConfigRTX(use_gpu=not capabilities, compute_capabilities=capabilities or None, **common)
    return PostprocessConfig(config, lambda _builder, _network, made: set_flags(trt, made))


def set_flags(trt: Any, made: Any) -> None:
    """Sets what Polygraphy does not for TensorRT-RTX.

    An engine that takes memory while it runs could not be recorded as a CUDA graph, and would need more than the
    scratch memory that it states.
    """
    made.clear_flag(trt.BuilderFlag.TF32)
    made.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def _inspected(trt: Any, plan: Any) -> str | None:
    """Returns the engine's own account of its layers; None where it was built for other GPUs than this machine's."""
    engine = trt.Runtime(_logger(trt)).deserialize_cuda_engine(plan)
    if engine is None:
        return None
    account: str = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return account


def _logger(trt: Any) -> Any:
    """Returns a logger that keeps the sizes it is told, and errors, after which the library may go on regardless."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.sizes: dict[str, int | None] = dict.fromkeys(_SIZES)

        def log(self, severity: Any, text: str) -> None:
            for size, words in _SIZES.items():
                if text.startswith(words) and (found := re.search("[0-9]+", text)):
                    self.sizes[size] = int(found[0])
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(text)

    return Logger()


def _monitor(trt: Any, channel: Channel) -> Any:
    """Sends progress to the parent, and stops the build when the parent says so."""
    progress = NestedProgress(lambda fraction, note: channel.send("progress", fraction=fraction, note=note))

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, _parent: str | None, steps: int) -> None:
            progress.start(name, steps)

        def step_complete(self, name: str, step: int) -> bool:
            progress.step(name, step)
            return not channel.cancelled()

        def phase_finish(self, name: str) -> None:
            progress.finish(name)

    return Monitor()
