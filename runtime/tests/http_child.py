"""``hidiff-serve`` with a toy bundle in its own process, which has descriptors, memory and signals of its own.

    python http_child.py HOLD FILES FOLDER [options of hidiff-serve]

While there is a file HOLD, no step ends. FILES are the descriptors that it may have open; 0 leaves that as it is.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import toy_pictures

from hidiff_runtime.cli.serve import main
from hidiff_runtime.serving.service import Service

_open = Service.open


def serve(hold: Path, arguments: list[str]) -> int:
    """Runs the command on engines of the toy."""

    def wait(outputs: dict[str, np.ndarray], _call: int) -> dict[str, np.ndarray]:
        while hold.exists():
            time.sleep(0.01)
        return outputs

    def open_toy(folder: Path, **options: Any) -> Service:
        return _open(folder, **{**options, "backend": toy_pictures.Backend(spoil=wait)})

    Service.open = open_toy  # type: ignore[method-assign]
    return main(arguments)


if __name__ == "__main__":
    files = int(sys.argv[2])
    if files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    sys.exit(serve(Path(sys.argv[1]), sys.argv[3:]))
