"""Workers that mutated bundles are played in, so that one that hangs or ends its process is an outcome as well."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

ROOT = Path(__file__).parents[2]

PATIENCE = 120.0
"""Seconds without an answer that are a hang: twelve times what opening may take, for busy machines."""

START = 300.0
"""Seconds that a worker may take to begin."""


@dataclass(frozen=True)
class Played:
    """What came of a bundle.

    Args:
        outcome: ``code 4``, ``same pictures``, ``fails its check``; or ``other picture``, ``traceback``, ``hang``,
            ``abort``, or another code.
        detail: what was said of it.
        seconds: it took.
        peak: bytes of memory beyond what the worker had before.
    """

    outcome: str
    detail: str
    seconds: float = 0.0
    peak: int = 0


class Pool:
    """One worker, replaced when it ends. A context manager.

    Args:
        target: ``module:attribute`` of what makes the target.
        pristine: the bundle that mutations are made of.
        patience: seconds until a worker hangs.
    """

    def __init__(self, target: str, pristine: Path, patience: float = PATIENCE) -> None:
        self._arguments = [sys.executable, "-m", "tests.fuzz.worker", target, str(pristine)]
        self._patience = patience
        self._worker: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def play(self, folder: Path) -> Played:
        """Plays a bundle in a worker."""
        worker = self._worker or self._start()
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(str(folder)) + "\n")
        worker.stdin.flush()
        try:
            line = self._lines.get(timeout=self._patience)
        except queue.Empty:
            self._end()
            return Played("hang", f"no answer in {self._patience:g} s", self._patience)
        if line:
            found: dict[str, Any] = json.loads(line)
            return Played(**found)
        code = worker.wait()
        self._end()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Played("abort", f"the process ended: {name}")

    def _start(self) -> subprocess.Popen[str]:
        paths = [str(ROOT), str(ROOT / "runtime"), str(ROOT / "runtime/tests")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        worker = subprocess.Popen(
            self._arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        assert worker.stdout is not None
        self._lines = queue.Queue()
        threading.Thread(target=_forward, args=(worker.stdout, self._lines), daemon=True).start()
        self._worker = worker
        if self._lines.get(timeout=START) != "ready\n":
            raise RuntimeError("the pristine bundle cannot be played: see what the worker printed")
        return worker

    def _end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()
            for stream in (worker.stdin, worker.stdout):
                assert stream is not None
                stream.close()


def _forward(stream: IO[str], lines: queue.Queue[str]) -> None:
    """Puts every line into the queue, and an empty one when there are no more."""
    try:
        for line in stream:
            lines.put(line)
    except ValueError:  # closed meanwhile
        pass
    lines.put("")
