"""The GPU's memory: tensors that are freed with their last reference, and the scratch memory that all engines share."""

from __future__ import annotations

import math
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.backends.protocol import DeviceArray, check_fits
from hidiff_runtime.backends.tensorrt.cuda import Cuda, CudaError
from hidiff_runtime.backends.tensorrt.pinned_staging import ALIGNMENT, RING, Staging
from hidiff_runtime.errors import EngineError


@dataclass(eq=False)
class CudaArray:
    """A tensor in the GPU's memory. Its memory is used again once nothing refers to it.

    Args:
        shape: static.
        dtype: ``float32`` or ``int32``.
        address: of its first byte.
    """

    shape: tuple[int, ...]
    dtype: str
    address: int


def address_of(array: DeviceArray) -> int:
    """Returns where a tensor of a `CudaMemory` lies."""
    return cast(CudaArray, array).address


class CudaMemory:
    """Tensors on one GPU and the stream on which everything happens in order.

    Memory of tensors that are gone goes to the next of the same size: what they were used for comes before it on the
    stream. It is given back to CUDA when there is too little, and at the end. So letting go of a tensor calls nothing,
    whichever thread does it and whenever.

    Args:
        cuda: the runtime.
        device: the GPU's number.
        stream: of everything.
        ring: bytes of pinned memory for uploads.
    """

    on_host = False

    def __init__(self, cuda: Cuda, device: int, stream: Any, ring: int = RING) -> None:
        self._cuda = cuda
        self._device = device
        self._stream = stream
        self._staging = Staging(cuda, stream, ring)
        self._gone: deque[tuple[int, int]] = deque()
        self._spare: dict[int, list[int]] = {}
        self._owned: set[int] = set()
        self._open = True

    @property
    def stream(self) -> int:
        """The stream's handle, for whoever times what happens on it."""
        return int(self._stream)

    def empty(self, shape: tuple[int, ...], dtype: str) -> CudaArray:
        """Returns a new tensor of any content. Raises EngineError if there is too little memory."""
        self._begin()
        size = _aligned(math.prod(shape) * np.dtype(dtype).itemsize)
        array = CudaArray(shape, dtype, self._allocate(size))
        # Not at exit: by then the driver may be gone, and the process gives everything back.
        weakref.finalize(array, self._gone.append, (size, array.address)).atexit = False
        return array

    def upload(self, array: NDArray[Any], into: DeviceArray) -> None:
        """Asks for a copy to the GPU; the array may change at once. Raises EngineError if they do not fit."""
        self._begin()
        check_fits(array, into)
        self._staging.upload(array, address_of(into))

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """Returns the content once all before it has happened. Raises EngineError if something before it failed."""
        self._begin()
        made = np.empty(array.shape, array.dtype)
        self._cuda.copy_to_host(made.ctypes.data, address_of(array), made.nbytes, self._stream)
        self._cuda.wait(self._stream)
        return made

    def close(self) -> None:
        """Frees every tensor, those still referred to as well; the stream has been waited for."""
        self._open = False
        self._staging.close()
        for address in self._owned:
            self._cuda.free(address)
        self._owned.clear()

    def _begin(self) -> None:
        if not self._open:
            raise EngineError("The device is closed.", advice="Open the bundle again; its tensors are gone.")
        self._cuda.set_device(self._device)  # whichever thread this is

    def _allocate(self, size: int) -> int:
        while self._gone:
            freed, address = self._gone.popleft()
            self._spare.setdefault(freed, []).append(address)
        if self._spare.get(size):
            return self._spare[size].pop()
        try:
            address = self._cuda.malloc(size)
        except CudaError as error:
            if not error.out_of_memory or not any(self._spare.values()):
                raise
            self._give_back()
            address = self._cuda.malloc(size)
        self._owned.add(address)
        return address

    def _give_back(self) -> None:
        """Frees what no tensor uses."""
        self._cuda.wait(self._stream)
        for address in (address for spare in self._spare.values() for address in spare):
            self._owned.discard(address)
            self._cuda.free(address)
        self._spare.clear()


class Scratch:
    """Memory for the activations of whichever engine runs: one block, as large as the largest engine that has run.

    Attributes:
        size: bytes of the block now.
        moves: how often the block has moved: what was recorded with another address is stale.
    """

    def __init__(self, cuda: Cuda, stream: Any) -> None:
        self._cuda = cuda
        self._stream = stream
        self._address = 0
        self.size = 0
        self.moves = 0

    def at_least(self, size: int) -> int:
        """Returns the block's address; it moves if it was smaller than ``size``.

        Raises:
            EngineError: there is too little memory.
        """
        if self._address and size <= self.size:
            return self._address
        self.close()
        size = _aligned(size)
        self._address = self._cuda.malloc(size)
        self.size = size
        self.moves += 1
        return self._address

    def close(self) -> None:
        """Frees the block once the stream has come to its end."""
        address, self._address, self.size = self._address, 0, 0
        if address:
            try:
                self._cuda.wait(self._stream)
            finally:
                self._cuda.free(address)


def _aligned(size: int) -> int:
    """Returns the bytes to allocate for so many: at least `ALIGNMENT`, and a multiple of it."""
    return -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
