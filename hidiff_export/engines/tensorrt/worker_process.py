"""Runs the worker: hands it a request, shows its progress, cancels it, and says what became of it."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any, NoReturn

from hidiff_export.child_process import SHOWN_LETTERS, Ended, Progress, run_child
from hidiff_export.engines.tensorrt import worker
from hidiff_export.engines.tensorrt.error_advice import OUT_OF_MEMORY, REPORT, advice_for
from hidiff_export.engines.tensorrt.libraries import BuilderLibrary
from hidiff_export.engines.tensorrt.worker_protocol import MISSING, SIGNATURE, STORAGE
from hidiff_export.errors import EngineError

PATIENCE = 5.0
"""Seconds that a cancelled worker has to stop by itself: TensorRT asks whether to go on only now and then."""

_SHOWN_ERRORS = 4
_NO_DRIVER = "checkMacros.cpp::catchCudaError"  # on a machine without a GPU, any other error brings this one along


def ask(library: BuilderLibrary, what: str, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Returns what a worker answers to a request.

    Args:
        library: to build with.
        what: of the engine, for messages: its file name.
        request: a JSON object.
        progress: told how far the worker is. If it raises, the worker is stopped.

    Raises:
        EngineError: the library refuses, or the worker died.
        OSError: a file cannot be written.
    """
    ended = run_child(
        ["-m", worker.__name__, library.module],
        request,
        environment={"POLYGRAPHY_USE_TENSORRT_RTX": "1" if library.ahead_of_time else "0"},
        progress=progress,
        patience=PATIENCE,
    )
    if ended.answer.get("event") == "failed":
        _fail(library, what, ended.answer)
    if ended.answer.get("event") != "done":
        _died(library, what, ended)
    return ended.answer


def _fail(library: BuilderLibrary, what: str, event: dict[str, Any]) -> NoReturn:
    """Raises the error that the worker reported."""
    errors: list[str] = [error for error in event["errors"] if _NO_DRIVER not in error] or event["errors"]
    text = "\n".join(error[:SHOWN_LETTERS].strip() for error in errors[:_SHOWN_ERRORS])
    if event["of"] == STORAGE:
        raise OSError(event["errno"], errors[0])
    if event["of"] == SIGNATURE:
        kind, found, wanted = errors
        raise EngineError(
            f"{what} would have other {kind} than its graph's record says.",
            given=f"{found} instead of {wanted}",
            advice=REPORT,
        )
    if event["of"] == MISSING:
        raise EngineError(f"{library.title} cannot be loaded.", given=text, advice=f"{library.install}.")
    raise EngineError(f"{library.title} cannot build {what}.", given=text or "no reason", advice=advice_for(text))


def _died(library: BuilderLibrary, what: str, ended: Ended) -> NoReturn:
    """Raises the error about a worker that ended without an answer."""
    code, words = ended.code, ended.words
    if code == -signal.SIGKILL:
        raise EngineError(
            f"The process that built {what} was killed.",
            given="SIGKILL, which is how the system ends what takes too much memory",
            advice=OUT_OF_MEMORY,
        )
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    raise EngineError(
        f"The process that built {what} with {library.title} crashed.",
        given=f"{how}: {words}" if words else how,
        advice=advice_for(words),
    )
