"""Whether a plan can run here, asked before and after a library reads it; what does not fit is said with a way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hidiff_runtime.backends.signature import signature_faults
from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord
from hidiff_runtime.backends.tensorrt.runtime_library import RTX_TARGETS, GpuInfo, LoadedLibrary
from hidiff_runtime.errors import EngineError
from hidiff_runtime.format.codec import REBUILD
from hidiff_runtime.format.dtypes import BY_NAME
from hidiff_runtime.format.manifest import GraphRecord, PhaseRecord

_PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}

MORE_ROOM = (
    "Open the bundle with resident='current', without prefetch and with no memory_limit or a smaller one, end other "
    "programs on the GPU, or build the bundle for a smaller batch or size."
)


def rebuild_command(library: LoadedLibrary, gpu: GpuInfo) -> str:
    """Returns the command that builds the bundle for this library and GPU."""
    command = "'hidiff-export build RECIPE -o DIR"
    if not library.is_rtx:
        return f"On this machine: {command} --set targets=cuda'."
    if gpu.target in RTX_TARGETS:
        return f"{command} --set targets={gpu.target}'."
    return (
        f"TensorRT-RTX does not know this GPU; on this machine: {command} --set backend=tensorrt --set targets=cuda'."
    )


def check_record(plan: PlanRecord, path: Path, library: LoadedLibrary, gpu: GpuInfo) -> None:
    """Refuses a plan of another library, another version of it, or for other GPUs.

    Raises:
        EngineError: what the plan is for, what is here, and the command that rebuilds it.
    """
    rebuild = rebuild_command(library, gpu)
    if plan.backend != library.backend:
        raise EngineError(f"The engine is one of {plan.backend}.", given=f"{path}, opened by {library.backend}")
    if plan.version != library.version:
        raise EngineError(
            f"The engine was built by {library.title} {plan.version}; here is {library.version}.",
            given=path,
            advice=f"pip install '{_PACKAGES[plan.backend]}=={plan.version}', or build it again. {rebuild}",
        )
    if gpu.target not in plan.targets:
        raise EngineError(
            f"The engine was built for {', '.join(plan.targets)}; this GPU is {gpu.target}.",
            given=f"{path}, on {gpu}",
            advice=f"Build it again. {rebuild}",
        )
    if plan.device not in (None, gpu.name):
        raise EngineError(
            f"The engine was built on {plan.device}, and {library.title} ties it to that model of GPU.",
            given=f"{path}, on {gpu}",
            advice=f"Build it again. {rebuild}",
        )


def check_graph(plan: PlanRecord, path: Path, record: GraphRecord) -> None:
    """Refuses a plan whose record is not that of the graph it is opened for.

    Raises:
        EngineError: phase, inputs or outputs differ.
    """
    faults = []
    phase = record.phase.name if isinstance(record, PhaseRecord) else None
    if phase is not None and phase != plan.phase:
        faults.append(f"phase {plan.phase or 'none'} instead of {phase}")
    for kind, due, found in (("input", record.inputs, plan.inputs), ("output", record.outputs, plan.outputs)):
        there = {spec.name: f"{spec.dtype}{list(spec.shape)}" for spec in found}
        faults += signature_faults(kind, due, there, "the manifest")
    if faults:
        raise EngineError(
            f"The engine is not of the graph {record.graph} that the manifest names.",
            given=f"{path}: {'; '.join(faults)}",
            advice=REBUILD,
        )


def check_tensors(engine: Any, plan: PlanRecord, path: Path, trt: Any) -> None:
    """Refuses a deserialized engine that takes or gives other tensors than its record says, or not on the device.

    Raises:
        EngineError: all differences.
    """
    types = {getattr(trt.DataType, BY_NAME[name].tensorrt): name for name in ("float32", "int32", "bool")}

    def described(name: str) -> str:
        dtype = engine.get_tensor_dtype(name)
        return f"{types.get(dtype, dtype)}{list(engine.get_tensor_shape(name))}"

    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
    takes, gives = ({name: described(name) for name in names if (name in inputs) == way} for way in (True, False))
    faults = signature_faults("input", plan.inputs, takes, "the record")
    faults += signature_faults("output", plan.outputs, gives, "the record")
    host = trt.TensorLocation.HOST
    on_host = sorted(name for name in names if engine.get_tensor_location(name) == host)
    faults += [f"wants {name} in the host's memory" for name in on_host]
    if faults:
        raise EngineError(
            "The engine is not what its record says.", given=f"{path}: {'; '.join(faults)}", advice=REBUILD
        )


def too_little_memory(path: Path, engine: int, activations: int, free: int) -> EngineError:
    """Returns the error for an engine that needs more memory than is free.

    Args:
        path: its record's.
        engine: bytes it needs for itself, its weights above all; 0 once it is there.
        activations: bytes it needs beside that while it runs, as far as they are known.
        free: bytes there are.
    """
    parts = [(engine, "the engine"), (activations, "activations")]
    needed = " and ".join(f"{_gib(size)} for {what}" for size, what in parts if size)
    return EngineError(
        "There is too little memory on the GPU for an engine.",
        given=f"{path}: {needed} needed, {_gib(free)} free",
        advice=MORE_ROOM,
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
