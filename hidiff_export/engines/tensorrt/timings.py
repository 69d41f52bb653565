"""Where TensorRT's timings of kernels are kept across builds, which makes later ones faster."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hidiff_export.engines.tensorrt.capabilities import Examined
from hidiff_export.engines.tensorrt.libraries import BuilderLibrary


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
