"""A process that plays one mutated bundle after another, and tells of each what came of it.

``python -m tests.fuzz.worker MODULE:TARGET PRISTINE``: folders come in by lines, outcomes go out as lines of JSON. What
ends the process, or keeps it, is for `tests.fuzz.pool` to tell.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from hidiff_runtime.errors import HidiffError
from tests.fuzz.targets import Unproven

ROOM = 2 * 2**30
"""Bytes of addresses that a worker may take beyond what it has once the pristine bundle was played."""

NEAR = 1
"""Of 255: how far a pixel may be off in pictures that are the same. Weights may change below what is proven."""

_CAPABILITY_VERSION = 0x20080522
_OVERRIDES = 0b110
"""The rights of root to read any file and to look into any folder."""


def main() -> None:
    """Plays the pristine bundle, then whatever is asked for until there is nothing more."""
    name, pristine = sys.argv[1:]
    module, attribute = name.split(":")
    target = getattr(importlib.import_module(module), attribute)()
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print
    warnings.simplefilter("ignore")
    _drop_overrides()
    expected = target.play(Path(pristine))
    _limit_addresses()
    print("ready", file=results, flush=True)
    for line in sys.stdin:
        print(json.dumps(play(target, Path(json.loads(line)), expected)), file=results, flush=True)


def play(target: Any, folder: Path, expected: dict[str, np.ndarray]) -> dict[str, Any]:
    """What came of one bundle: its kind, a line about it, seconds, and bytes of memory beyond what there was."""
    before, started = _reset_peak(), time.perf_counter()
    outcome, detail = _outcome(target, folder, expected)
    peak = max(_status("VmHWM") - before, 0)
    return {"outcome": outcome, "detail": detail, "seconds": time.perf_counter() - started, "peak": peak}


def _outcome(target: Any, folder: Path, expected: dict[str, np.ndarray]) -> tuple[str, str]:
    try:
        found = target.play(folder)
    except Unproven as error:
        return "fails its check", str(error)
    except HidiffError as error:
        return f"code {error.exit_code}", str(error)
    except BaseException as error:  # a panic of a library is no Exception
        return "traceback", "".join(traceback.format_exception(error))
    for name, picture in found.items():
        if name not in expected:
            continue
        if picture.shape != expected[name].shape:
            return "other picture", f"{name}: {picture.shape} where {expected[name].shape} is due"
        if (off := int(np.abs(picture.astype(int) - expected[name]).max())) > NEAR:
            return "other picture", f"{name}: a pixel is off by {off} of 255"
    return "same pictures", ""


def _status(key: str) -> int:
    """A figure of this process's memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def _reset_peak() -> int:
    """Forgets the highest memory so far; returns what there is now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _limit_addresses() -> None:
    limit = _status("VmSize") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _drop_overrides() -> None:
    """Gives up root's right to read what may not be read, so that unreadable files are just that."""
    library = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    data = (ctypes.c_uint32 * 6)()
    if library.capget(header, data):
        return
    data[0] &= ~_OVERRIDES
    library.capset(header, data)


if __name__ == "__main__":
    main()
