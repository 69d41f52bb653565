"""The process in which one engine is built: ``python -m hidiff_export.engines.tensorrt.worker LIBRARY``.

A process of its own, because TensorRT keeps state between the builds of one process, takes memory that it does not
give back, and may be killed for it. Its answer is one of ``done``, ``failed`` and ``cancelled``.
"""

from __future__ import annotations

import errno
import importlib
import signal
import sys
from collections.abc import Mapping
from typing import Any

from hidiff_export.child_process import Channel
from hidiff_export.engines.tensorrt.worker_protocol import MEMORY, MISSING, STORAGE


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
