"""CUDA graphs: what an engine asks of the stream, recorded once and launched as one from then on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hidiff_runtime.backends.tensorrt.cuda import Cuda, CudaError
from hidiff_runtime.errors import EngineError

Addresses = tuple[int, ...]

KEPT = 8
"""Recordings of one session: a run alternates between two sets of tensors, and the next run may find them swapped."""


class CudaGraphs:
    """The recordings of one session, one for each set of addresses of its tensors.

    A set is first run as it is: that is the work, and it makes the library do what it does only once, which cannot be
    recorded. The second time it is recorded.

    Args:
        cuda: the runtime.
        stream: of the work.
        enabled: whether to record at all.
        recordable: asked before a recording whether the library allows it.
    """

    def __init__(self, cuda: Cuda, stream: Any, enabled: bool, recordable: Callable[[], bool]) -> None:
        self._cuda = cuda
        self._stream = stream
        self._enabled = enabled
        self._recordable = recordable
        self._moves = 0
        self._recordings: dict[Addresses, Any] = {}

    def run(self, addresses: Addresses, moves: int, enqueue: Callable[[], None]) -> None:
        """Asks the stream for the work on these addresses.

        Args:
            addresses: of the tensors, in a fixed order.
            moves: of the scratch memory: recordings from before a move are dropped.
            enqueue: asks for the work itself.

        Raises:
            EngineError: the work fails.
        """
        if not self._enabled:
            enqueue()
            return
        if moves != self._moves:
            self.drop()
            self._moves = moves
        if addresses not in self._recordings:
            enqueue()
            if len(self._recordings) == KEPT:
                self._destroy(self._recordings.pop(next(iter(self._recordings))))
            self._recordings[addresses] = None
            return
        recording = self._recordings.pop(addresses)
        if recording is None and self._recordable():
            recording = self._record(enqueue)
        if recording is None:
            self.drop()
            self._enabled = False
            enqueue()
            return
        self._recordings[addresses] = recording
        self._cuda.launch(recording, self._stream)

    def drop(self) -> None:
        """Ends all recordings."""
        while self._recordings:
            _, recording = self._recordings.popitem()
            self._destroy(recording)

    def _destroy(self, recording: Any) -> None:
        if recording is not None:
            self._cuda.wait(self._stream)
            self._cuda.destroy_executable(recording)

    def _record(self, enqueue: Callable[[], None]) -> Any:
        """Returns what launches the recorded work; ``None`` where it cannot be recorded."""
        try:
            graph = self._captured(enqueue)
        except EngineError:
            return None
        try:
            return self._cuda.instantiate(graph)
        except CudaError:
            return None
        finally:
            self._cuda.destroy_graph(graph)

    def _captured(self, enqueue: Callable[[], None]) -> Any:
        self._cuda.begin_capture(self._stream)
        try:
            enqueue()
        except BaseException:
            with suppress(CudaError):  # a recording that failed ends with an error of its own
                self._cuda.destroy_graph(self._cuda.end_capture(self._stream))
            raise
        return self._cuda.end_capture(self._stream)
