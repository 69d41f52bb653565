"""Runs the worker: hands it a request, shows its progress, cancels it, and says what became of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import IO, Any, NoReturn

from hidiff_export.engines.tensorrt import worker
from hidiff_export.engines.tensorrt.error_advice import OUT_OF_MEMORY, REPORT, advice_for
from hidiff_export.engines.tensorrt.libraries import BuilderLibrary
from hidiff_export.errors import EngineError

Progress = Callable[[float, str], None]
"""Called with the part that is done, 0 to 1, and what is being done."""

PATIENCE = 5.0
"""Seconds that a cancelled worker has to stop by itself: TensorRT asks whether to go on only now and then."""

_SHOWN_ERRORS, _SHOWN_LETTERS = 4, 600
_NO_DRIVER = "checkMacros.cpp::catchCudaError"  # on a machine without a GPU, any other error brings this one along


def ask(library: BuilderLibrary, what: str, request: str, progress: Progress) -> dict[str, Any]:
    """What a worker answers to a request.

    Args:
        library: to build with.
        what: of the engine, for messages: its file name.
        request: a JSON object on one line.
        progress: told how far the worker is. If it raises, the worker is stopped.

    Raises:
        EngineError: the library refuses, or the worker died.
        OSError: a file cannot be written.
    """
    command = [sys.executable, "-m", worker.__name__, library.module]
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1" if library.ahead_of_time else "0"}
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=environment
        ) as process,
    ):
        try:
            last = _converse(process, request, progress)
        except BaseException:
            _stop(process)
            raise
        process.wait()
        if last.get("event") == "failed":
            _fail(library, what, last)
        if last.get("event") != "done":
            _died(library, what, process.returncode, said)
        return last


def _converse(process: subprocess.Popen[bytes], request: str, progress: Progress) -> dict[str, Any]:
    """The last event of a worker that ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(f"{request}\n".encode())
        process.stdin.flush()
    except BrokenPipeError:
        return {}
    last: dict[str, Any] = {}
    for line in process.stdout:
        last = json.loads(line)
        if last["event"] == "progress":
            progress(last["fraction"], last["note"])
    return last


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks the worker to stop by closing its input; ends it when it does not."""
    try:
        if process.stdin is not None:
            process.stdin.close()
        process.wait(PATIENCE)
    except (subprocess.TimeoutExpired, BrokenPipeError):
        pass
    finally:
        process.kill()  # nothing happens where it has ended


def _fail(library: BuilderLibrary, what: str, event: dict[str, Any]) -> NoReturn:
    """Raises the error that the worker reported."""
    errors: list[str] = [error for error in event["errors"] if _NO_DRIVER not in error] or event["errors"]
    text = "\n".join(error[:_SHOWN_LETTERS].strip() for error in errors[:_SHOWN_ERRORS])
    if event["of"] == worker.STORAGE:
        raise OSError(event["errno"], errors[0])
    if event["of"] == worker.SIGNATURE:
        kind, found, wanted = errors
        raise EngineError(
            f"{what} would have other {kind} than its graph's record says.",
            given=f"{found} instead of {wanted}",
            advice=REPORT,
        )
    if event["of"] == worker.MISSING:
        raise EngineError(f"{library.title} cannot be loaded.", given=text, advice=f"{library.install}.")
    raise EngineError(f"{library.title} cannot build {what}.", given=text or "no reason", advice=advice_for(text))


def _died(library: BuilderLibrary, what: str, code: int, said: IO[bytes]) -> NoReturn:
    """Raises the error about a worker that ended without an answer."""
    said.seek(0)
    words = said.read().decode(errors="replace").strip()[-_SHOWN_LETTERS:]
    if code == -signal.SIGKILL:
        raise EngineError(
            f"The process that built {what} was killed.",
            given="SIGKILL, which is how the system ends what takes too much memory",
            advice=OUT_OF_MEMORY,
        )
    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    raise EngineError(
        f"The process that built {what} with {library.title} crashed.",
        given=f"{ended}: {words}" if words else ended,
        advice=advice_for(words),
    )
