"""The files of one engine, made whole in a folder of its own: what Triton loads without the rest of the bundle."""

from __future__ import annotations

import shutil
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from hidiff_export.errors import BundleError, InputError
from hidiff_export.triton.repository_files import take_file
from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord
from hidiff_runtime.format.paths import path_error

_CHUNK = 1 << 22


@dataclass(frozen=True)
class EngineFiles:
    """What one engine takes.

    Args:
        weights: bytes of weights that whoever loads it holds in memory.
        needs: what runs it, for people; empty where any version does.
    """

    weights: int
    needs: str = ""


def take_onnx(engine: Path, version: Path, *, link: bool, files: Container[Path] | None = None) -> EngineFiles:
    """A graph as ``model.onnx``, with the files that hold its weights where it looks for them: beside itself.

    Args:
        engine: the graph.
        version: the folder.
        files: the bundle's; left out, whatever lies beside the graph is taken.

    Raises:
        BundleError: the graph is not readable, or looks for weights outside its folder or that are not the bundle's.
    """
    places = _weights(engine)
    take_file(engine, version / "model.onnx", link=link)
    for location in sorted({location for location, _, _ in places}):
        if fault := path_error(location):
            raise BundleError(f"The weights of {engine.name} lie elsewhere: the path {fault}.", given=location)
        _refuse_foreign(engine, engine.parent / location, files)
        (version / location).parent.mkdir(parents=True, exist_ok=True)
        take_file(engine.parent / location, version / location, link=link)
    return EngineFiles(sum(length for _, _, length in places))


def _refuse_foreign(engine: Path, part: Path, files: Container[Path] | None) -> None:
    """Refuses a file that no manifest vouches for: it may be a link to anything on this machine."""
    if files is not None and part not in files:
        raise BundleError(f"{engine.name} names a file that is not the bundle's.", given=part, advice="Build it again.")


def _weights(engine: Path) -> set[tuple[str, int, int]]:
    """Where the graph's weights lie: file, offset and length; those that are used twice once."""
    try:
        model = ir.load(engine)
    except Exception as error:  # whatever the parser makes of a file that is no graph
        raise BundleError(f"{engine.name} is not a readable graph.", given=error, advice="Build it again.") from error
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    external = (tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor))
    return {(Path(tensor.location).as_posix(), tensor.offset or 0, tensor.nbytes) for tensor in external}


def take_plan(engine: Path, version: Path, *, link: bool, files: Container[Path] | None = None) -> EngineFiles:
    """A plan as ``model.plan``, its parts put together again.

    Args:
        engine: the plan's record.
        version: the folder.
        files: as for `take_onnx`.

    Raises:
        BundleError: it is no plan record, or a part is not the bundle's.
        InputError: the plan holds several phases.
    """
    record = PlanRecord.read(engine)
    if record.merged:
        raise InputError(
            "One plan holds all phases of this bundle, so that there is no engine for each phase.",
            given=f"{engine.name}: {', '.join(record.phases)}",
            advice="Use the other layout of repositories, or build the bundle with layout=per-phase.",
        )
    target = version / "model.plan"
    parts = record.paths(engine)
    for part in parts:
        _refuse_foreign(engine, part, files)
    if len(parts) == 1:
        take_file(parts[0], target, link=link)
    else:
        with target.open("wb") as whole:
            for part in parts:
                with part.open("rb") as reader:
                    shutil.copyfileobj(reader, whole, _CHUNK)
    built_for = record.device or " or ".join(record.targets)
    return EngineFiles(target.stat().st_size, f"TensorRT {record.version} on {built_for}")
