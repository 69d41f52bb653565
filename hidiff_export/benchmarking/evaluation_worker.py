"""The process of one contender: it evaluates phases as it is told, and says how long each took and what it holds.

``python -m hidiff_export.benchmarking.evaluation_worker``, in conversation with
`hidiff_export.benchmarking.contender_process`. A contender may run in an interpreter that has nothing of this
project's, so that this file and `EVALUATORS` beside it import the standard library and numpy alone.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hidiff_export.child_process import Channel

Array = NDArray[Any]

EVALUATORS = {
    "bundle": "bundle_evaluator",
    "stock": "torch_evaluators",
    "eager": "torch_evaluators",
    "compile": "torch_evaluators",
    "published": "published_package",
    "optimum-intel": "optimum_intel_unet",
    "stable-diffusion.cpp": "stable_diffusion_cpp_steps",
}
"""The module beside this one whose ``evaluator(kind, settings)`` makes each kind."""


class Evaluator(Protocol):
    """What is measured."""

    def open(self, phase: str) -> None:
        """Gets ready for a phase; another one that was open may be closed."""
        ...

    def evaluate(self, inputs: Mapping[str, Array]) -> Array | None:
        """Returns the predicted noise, of inputs by the names of the phase's graph; None where it is not to be had."""
        ...

    def operators(self, inputs: Mapping[str, Array]) -> Mapping[str, float]:
        """Returns the seconds of each kind of operator in an evaluation, as the library profiles them."""
        ...


def main() -> None:
    """Answers until the parent is gone."""
    channel = Channel()
    started = time.perf_counter()
    request = channel.request()
    act: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    while True:
        try:
            if act is None:
                act = _Worker(request["kind"], request["settings"]).act
                answer: dict[str, Any] = {"seconds": time.perf_counter() - started}
            else:
                answer = act(request)
            channel.send("done", **answer, memory=peak_memory())
        except Exception as error:  # whatever a library raises is a row of the table, with its words
            channel.send("failed", reason=_told(error))
        request = channel.request()


class _Worker:
    """An evaluator, and what it is asked to do by name."""

    def __init__(self, kind: str, settings: Mapping[str, Any]) -> None:
        module = import_module(f"hidiff_export.benchmarking.{EVALUATORS[kind]}")
        self._evaluator: Evaluator = module.evaluator(kind, settings)
        gc.collect()

    def act(self, request: Mapping[str, Any]) -> dict[str, Any]:
        actions = {"open": self._open, "evaluate": self._evaluate, "operators": self._operators}
        return actions[request["do"]](request)

    def _open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        self._evaluator.open(request["phase"])
        return {"seconds": time.perf_counter() - started}

    def _evaluate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        inputs = _read(request)
        started = time.perf_counter(), processor_seconds()
        output = self._evaluator.evaluate(inputs)
        seconds = time.perf_counter() - started[0], processor_seconds() - started[1]
        if output is not None:
            np.save(request["output"], output)
        return {"seconds": seconds[0], "processor": seconds[1]}

    def _operators(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"operators": dict(self._evaluator.operators(_read(request)))}


def _read(request: Mapping[str, Any]) -> dict[str, Array]:
    with np.load(request["inputs"]) as file:
        return {name: file[name] for name in file.files}


def processor_seconds() -> float:
    """Returns user and system time of this process and of those it started that have ended."""
    used = (resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def peak_memory() -> int:
    """Returns the most bytes that were in memory at a time, mapped files included."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest << 10
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) << 10


def _told(error: Exception) -> str:
    """Returns an error in a line or two; of this project's own, what was given as well."""
    given = getattr(error, "given", None)
    summary = str(getattr(error, "summary", None) or f"{type(error).__name__}: {error}")
    text = summary if given is None else f"{summary} ({given})"
    return " ".join(text.replace(os.sep * 2, os.sep).split())[:600]


if __name__ == "__main__":
    main()
