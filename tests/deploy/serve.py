"""``hidiff-serve`` as a process of its own, as an operator starts it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import TracebackType

PATIENCE = 120.0


class Served:
    """A server of a bundle on a free port. A context manager: leaving it tells the server to stop.

    Args:
        folder: the bundle.
        options: of the command.
        wait: until it is ready.
    """

    def __init__(self, folder: Path, *options: str | Path, wait: bool = True) -> None:
        program = Path(sys.executable).with_name("hidiff-serve")
        self.process = subprocess.Popen(
            [program, folder, "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.lines: list[str] = []
        self._told: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.url = self.until("listening on ").split()[2].rstrip(",")
            if wait:
                self.until("ready: ")
        except BaseException:
            self.process.kill()
            raise

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(signal.SIGTERM)

    def until(self, start: str) -> str:
        """The line that begins like this, once it is printed."""
        while (line := self._told.get(timeout=PATIENCE)) is not None:
            if line.startswith(start):
                return line
        raise AssertionError(f"never printed {start!r}: {self.lines}")

    def end(self, number: signal.Signals | None = None) -> int:
        """Sends a signal, if one is given, and waits for the exit code."""
        if number is not None and self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        self._reader.join()
        return code

    def get(self, path: str) -> str:
        """What a path answers."""
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as answer:
            text: str = answer.read().decode()
        return text

    def count(self, name: str) -> float:
        """A metric's value, of all labels together; 0 where it was never counted."""
        series = [line.rpartition(" ") for line in self.get("/metrics").splitlines()]
        return sum(float(value) for told, _, value in series if told.partition("{")[0] == name)

    def eventually(self, name: str, value: float) -> None:
        """Until a metric has this value."""
        end = time.monotonic() + PATIENCE
        while (found := self.count(name)) != value:
            assert time.monotonic() < end, f"{name} is {found}, not {value}"
            time.sleep(0.02)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as printed:
            for line in printed:
                self.lines.append(line)
                self._told.put(line)
        self._told.put(None)
