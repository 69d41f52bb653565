"""Processes that fork after OpenVINO has computed, in which it would wait for threads that stayed in the parent."""

from __future__ import annotations

import os

from hidiff_runtime.errors import EngineError

_first: list[int] = []
"""The process in which OpenVINO first computed, or the parent of this one that did."""


def check_process() -> None:
    """Remembers the process that computes first. Raises EngineError in one that was forked from it since."""
    if not _first:
        _first.append(os.getpid())
    if _first[0] != os.getpid():
        raise EngineError(
            "OpenVINO computed before this process was forked, and its threads stayed in the parent.",
            given=f"process {os.getpid()}, forked from {_first[0]}",
            advice="Start workers by spawning (multiprocessing's 'spawn'; gunicorn without --preload), or open the "
            "bundle in the child alone, or with backend='onnxruntime'.",
        )
