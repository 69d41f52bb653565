"""What TensorRT says: its logger keeps errors and warnings, so that an exception can carry them."""

from __future__ import annotations

import functools
import threading
from collections import deque
from typing import Any

_KEPT = 32
_SHOWN = 4


class Messages:
    """The last things the library said, from whichever thread it said them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[str] = deque(maxlen=_KEPT)

    def add(self, text: str) -> None:
        """Keeps one."""
        with self._lock:
            self._kept.append(text.strip())

    def take(self) -> str:
        """Returns the last few that were kept since this was asked before, as one text; empty if there are none."""
        with self._lock:
            found = list(dict.fromkeys(self._kept))
            self._kept.clear()
        return "\n         ".join(found[-_SHOWN:])


@functools.cache
def logger_of(trt: Any) -> tuple[Any, Messages]:
    """Returns the process's logger of the library ``trt``, and what it keeps: errors.

    One for all devices, and never freed: the library knows a single logger at any time, that of the runtime which came
    first, and goes on calling it when that runtime's device is closed and another one's is open.
    """
    messages = Messages()
    kept = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class is known only here
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in kept:
                messages.add(msg)

    return Logger(), messages
