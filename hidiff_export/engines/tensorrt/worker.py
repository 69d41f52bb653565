"""The process in which one engine is built: ``python -m hidiff_export.engines.tensorrt.worker LIBRARY``.

A process of its own, because TensorRT keeps state between the builds of one process, takes memory that it does not
give back, and may be killed for it. The parent writes a request as one line of JSON to standard input and keeps it
open: a further line, or its end, cancels. Events come back as lines of JSON on standard output: ``progress``, then one
of ``done``, ``failed`` and ``cancelled``.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import select
import signal
import sys
from collections.abc import Mapping
from typing import Any

REFUSED, SIGNATURE, STORAGE, MEMORY, MISSING = "refused", "signature", "storage", "memory", "missing"
"""What a failure is of: the library, the graph's inputs and outputs, the disk, memory, something not installed."""


class Channel:
    """The pipes to the parent. Whatever a library prints goes to standard error instead."""

    def __init__(self) -> None:
        self._events = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._requests = sys.stdin.fileno()

    def request(self) -> dict[str, Any]:
        """The parent's request."""
        line = b""
        while not line.endswith(b"\n"):
            part = os.read(self._requests, 1 << 16)
            if not part:
                raise SystemExit(1)
            line += part
        request: dict[str, Any] = json.loads(line)
        return request

    def send(self, event: str, **values: Any) -> None:
        """Sends an event."""
        os.write(self._events, (json.dumps({"event": event, **values}) + "\n").encode())

    def cancelled(self) -> bool:
        """Whether the parent cancelled, or is gone."""
        ready, _, _ = select.select([self._requests], [], [], 0)
        return bool(ready)


def main() -> None:
    """Answers one request."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which cancels in its own way
    channel = Channel()
    request = channel.request()
    try:
        trt = importlib.import_module(sys.argv[1])
        # Polygraphy asks the environment which of the two libraries to use when it is imported, so this comes late.
        from hidiff_export.engines.tensorrt import engine_build

        answers: Mapping[str, Any] = {"examine": engine_build.examine, "build": engine_build.build}
        answers[request["do"]](trt, request, channel)
    except ImportError as error:
        channel.send("failed", of=MISSING, errors=[str(error)])
    except MemoryError:
        channel.send("failed", of=MEMORY, errors=["MemoryError"])
    except OSError as error:
        if error.errno == errno.ENOMEM:
            channel.send("failed", of=MEMORY, errors=[f"MemoryError: {error.strerror}"])
            return
        channel.send("failed", of=STORAGE, errors=[error.strerror], errno=error.errno)


if __name__ == "__main__":
    main()
