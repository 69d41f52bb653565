"""What a library can build on this machine, found out in a process of its own, and what is kept of its builds."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hidiff_export.engines.tensorrt.libraries import BuilderLibrary
from hidiff_export.engines.tensorrt.worker_process import ask
from hidiff_export.errors import EngineError

THIS_MACHINE = ("cuda",)
"""The target that means the GPU of the building machine."""


@dataclass(frozen=True)
class DetectedGpu:
    """A GPU: its name and its compute capability (``sm90``)."""

    name: str
    target: str

    @classmethod
    def of(cls, answer: dict[str, Any]) -> DetectedGpu | None:
        """Returns the GPU in a worker's answer, if the machine has one."""
        return None if answer["gpu"] is None else cls(**answer["gpu"])


@dataclass(frozen=True)
class Examined:
    """What a library can build here: its version, the targets it knows, and this machine's GPU, if there is one."""

    version: str
    targets: tuple[str, ...]
    gpu: DetectedGpu | None


@cache
def examine(library: BuilderLibrary) -> Examined:
    """Loads the library in a worker. Raises EngineError where it is missing or does not load."""
    library.require()
    found = ask(library, "nothing", {"do": "examine"}, lambda _fraction, _note: None)
    return Examined(found["version"], tuple(found["targets"]), DetectedGpu.of(found))


def check_targets(library: BuilderLibrary, targets: tuple[str, ...]) -> None:
    """Refuses what the library cannot build here.

    Args:
        targets: compute capabilities such as ``sm89``, or `THIS_MACHINE`.

    Raises:
        EngineError: the library is missing, too old, does not know a target, or there is no GPU it could build for.
    """
    found = examine(library)
    if tuple(map(int, found.version.split(".")[:2])) < library.least:
        raise EngineError(
            f"{library.title} is too old: building takes {'.'.join(map(str, library.least))} or newer.",
            given=found.version,
            advice=f"pip install --upgrade 'hidiff-export[{library.backend}]'",
        )
    if targets == THIS_MACHINE:
        _check_gpu(library, found)
        return
    for target in targets:
        if target not in found.targets:
            raise EngineError(
                f"{library.title} {found.version} does not know the target {target}.",
                given=", ".join(targets),
                advice=f"It builds for {', '.join(found.targets)}.",
            )


def _check_gpu(library: BuilderLibrary, found: Examined) -> None:
    if found.gpu is None:
        ahead = "Name the GPUs to build for ahead of time, such as targets: [sm89, sm120]"
        other = ahead if library.ahead_of_time else f"{ahead} with backend: tensorrt-rtx"
        raise EngineError(
            f"{library.title} builds for the GPU of this machine, and there is none.",
            given="targets: cuda",
            advice=f"{other}, or build on the machine that the engines are for.",
        )
    if found.targets and found.gpu.target not in found.targets:
        raise EngineError(
            f"{library.title} {found.version} builds nothing for this machine's GPU.",
            given=f"{found.gpu.name}, {found.gpu.target}",
            advice=f"It builds for {', '.join(found.targets)}; for this GPU, use backend: tensorrt.",
        )


def timing_cache(library: BuilderLibrary, found: Examined) -> Path | None:
    """Returns the file for this library's version and this GPU, in the user's cache folder; Polygraphy locks it.

    None for TensorRT-RTX, which times nothing while building: its operations on such caches do nothing since 1.2, and
    say so. None too where the folder cannot be made, since a build can do without.
    """
    if library.ahead_of_time or found.gpu is None:
        return None
    home = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(home) if home else Path.home() / ".cache") / "hidiff-export" / "timings"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", found.gpu.name)
    return folder / f"{library.backend}-{found.version}-{gpu}.cache"
