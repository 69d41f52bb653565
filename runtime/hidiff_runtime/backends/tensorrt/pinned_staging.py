"""Copies from any host memory to the GPU that return at once: through a ring of pinned memory.

A copy from pinned memory runs when the stream comes to it, which may be steps later, so its piece of the ring is not
written again before then.
"""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.backends.tensorrt.cuda import Cuda

RING = 32 << 20
"""Bytes of the ring: what many steps upload together at 4096 pixels; more than that goes through it piece by piece."""

ALIGNMENT = 256


@dataclass(frozen=True)
class _Flight:
    """A piece of the ring from ``start`` to ``end`` whose copy has run when ``event`` happens."""

    start: int
    end: int
    event: Any


class Staging:
    """The ring.

    Args:
        cuda: the runtime.
        stream: all copies are asked of.
        size: of the ring in bytes.

    Raises:
        CudaError: there is no pinned memory for it.
    """

    def __init__(self, cuda: Cuda, stream: Any, size: int = RING) -> None:
        self._cuda = cuda
        self._stream = stream
        self._size = size
        self._address = cuda.malloc_host(size)
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._address))
        self._head = 0
        self._flights: deque[_Flight] = deque()
        self._events: list[Any] = []

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Asks for a copy of ``array`` to ``address``; the array may change at once. Raises CudaError if that fails."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        piece = self._size // 4
        for start in range(0, len(data), piece):
            self._upload_piece(data[start : start + piece], address + start)

    def close(self) -> None:
        """Frees the ring; the stream has been waited for."""
        for event in (*(flight.event for flight in self._flights), *self._events):
            self._cuda.destroy_event(event)
        self._flights.clear()
        self._events.clear()
        del self._bytes
        self._cuda.free_host(self._address)

    def _upload_piece(self, data: NDArray[np.uint8], address: int) -> None:
        start = self._take(len(data))
        end = start + len(data)
        self._bytes[start:end] = data
        self._cuda.copy_to_device(address, self._address + start, len(data), self._stream)
        event = self._events.pop() if self._events else self._cuda.create_event()
        self._cuda.record_event(event, self._stream)
        self._flights.append(_Flight(start, end, event))

    def _take(self, size: int) -> int:
        """Returns where in the ring the next ``size`` bytes go; waits for the copies that were there."""
        start = self._head if self._head + size <= self._size else 0
        while any(flight.start < start + size and start < flight.end for flight in self._flights):
            oldest = self._flights.popleft()
            self._cuda.wait_for_event(oldest.event)
            self._events.append(oldest.event)
        self._head = start + size + (-size % ALIGNMENT)
        return start
