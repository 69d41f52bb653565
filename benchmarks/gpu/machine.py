"""Clocks and memory, on the GPU or, in a rehearsal, on the CPU."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

_EVERY = 0.002
_PAGE = os.sysconf("SC_PAGE_SIZE")


def prepare() -> None:
    """float32 means float32: no TF32 in matrix products nor, where it is the default, in convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


class Clock:
    """Milliseconds of an action.

    Args:
        device: torch's name.
        stream: the CUDA stream that the action's work is put on, as its handle; torch's own where left out.
    """

    def __init__(self, device: str, stream: int | None = None) -> None:
        self._cuda = device == "cuda"
        self._stream = stream

    @property
    def kind(self) -> str:
        """By what it measures."""
        return "CUDA events" if self._cuda else "wall clock"

    def milliseconds(self, action: Callable[[], object]) -> float:
        """What one call of ``action`` takes, from an idle device until all that it asked for is done."""
        if not self._cuda:
            started = time.perf_counter()
            action()
            return 1000 * (time.perf_counter() - started)
        stream = torch.cuda.current_stream() if self._stream is None else torch.cuda.ExternalStream(self._stream)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record(stream)
        action()
        end.record(stream)
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))


class MemoryWatch:
    """The most memory in use while the context lasts, beyond what was in use when it began.

    On a GPU all that the driver counts on the device, other processes included, looked at every 2 ms; on the CPU this
    process's resident set.

    Attributes:
        peak: bytes.
        allocated: the most that torch had allocated at once; 0 on the CPU.
    """

    def __init__(self, device: str) -> None:
        self.peak = 0
        self.allocated = 0
        self._cuda = device == "cuda"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._before = 0

    def __enter__(self) -> MemoryWatch:
        if self._cuda:
            torch.zeros(1, device="cuda")  # the context, which everything on the device has
            torch.cuda.reset_peak_memory_stats()
        self._before = self._used()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if self._cuda:
            self.allocated = torch.cuda.max_memory_allocated()

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            self.peak = max(self.peak, self._used() - self._before)

    def _used(self) -> int:
        if self._cuda:
            free, total = torch.cuda.mem_get_info()
            return int(total - free)
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
