"""``hidiff-serve`` as a process: how a test starts it, asks it, and looks at what it costs."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from http_server import GENERATIONS

import hidiff_runtime

PATIENCE = 120.0
TESTS = Path(__file__).parent


@dataclass
class Process:
    """A server that is ready.

    Args:
        process: the server's.
        port: that it listens on.
        log: the file of all that it prints.
        hold: while this file exists, no step ends.
    """

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    hold: Path

    def connect(self) -> socket.socket:
        """A connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def begin(
        self, length: int, body: bytes = b"", *, path: str = GENERATIONS, kind: str = "application/json"
    ) -> socket.socket:
        """A request for pictures, with what there is of its body."""
        connection = self.connect()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + body)
        return connection

    def probe(self, patience: float = PATIENCE) -> int:
        """The status of a probe's answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=patience)
        try:
            connection.request("GET", "/health/live")
            return connection.getresponse().status
        finally:
            connection.close()

    def memory(self, name: str = "VmRSS") -> int:
        """MiB of resident memory; ``VmHWM`` is the most there has been."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition(f"{name}:")[2].split()[0]) // 1024

    def descriptors(self) -> int:
        """Files and connections that are open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def said(self) -> str:
        """All that it has printed."""
        return self.log.read_text(encoding="utf-8")

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self.process.send_signal(number)

    def end(self) -> int:
        """Waits for the exit code."""
        return self.process.wait(PATIENCE)


@contextmanager
def started(
    folder: Path, work: Path, *options: str, descriptors: int = 0, source: Path | None = None
) -> Iterator[Process]:
    """A server of the toy bundle in `folder`.

    Args:
        folder: the bundle.
        work: a folder for the log.
        options: of ``hidiff-serve``.
        descriptors: that it may have open; 0 for as many as the test.
        source: the folder to take ``hidiff_runtime`` from, where it is not the one at hand.
    """
    log, hold = work / "log", work / "hold"
    paths = [str(source or Path(hidiff_runtime.__file__).parents[1]), str(TESTS)]
    child, files = TESTS / "http_child.py", str(descriptors)
    program = [sys.executable, str(child), str(hold), files, str(folder), "--port", "0", *options]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as printed:
        process = subprocess.Popen(program, stdout=printed, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + PATIENCE
        while "ready: " not in (said := log.read_text(encoding="utf-8")):
            assert process.poll() is None, said
            assert time.monotonic() < end, said
            time.sleep(0.02)
        yield Process(process, int(said.split(",")[0].rpartition(":")[2]), log, hold)
    finally:
        hold.unlink(missing_ok=True)
        process.kill()
        process.wait()
