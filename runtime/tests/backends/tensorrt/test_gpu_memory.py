from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from fake_cuda import FakeCuda, cudaError_t

from hidiff_runtime.backends.tensorrt.cuda import Cuda, CudaError
from hidiff_runtime.backends.tensorrt.gpu_memory import CudaMemory, Scratch
from hidiff_runtime.errors import EngineError

RING = 4096


class Rig:
    """Memory on a fake GPU."""

    def __init__(self) -> None:
        self.fake = FakeCuda()
        self.cuda = Cuda(self.fake)
        self.cuda.set_device(0)
        self.stream = self.cuda.create_stream()
        self.memory = CudaMemory(self.cuda, 0, self.stream, RING)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.cuda.wait(made.stream)
    made.memory.close()
    made.cuda.destroy_stream(made.stream)
    assert not made.fake.misuses
    assert not made.fake.leaks


def numbers(count: int, dtype: str = "float32") -> np.ndarray:
    return np.arange(count, dtype=dtype)


def test_what_goes_up_comes_down(rig: Rig) -> None:
    arrays = [numbers(6).reshape(2, 3), numbers(3, "int32"), np.float32(7).reshape(()), numbers(5000)]
    arrays.append(numbers(12).reshape(3, 4).T[:, ::2])
    held = [rig.memory.empty(array.shape, array.dtype.name) for array in arrays]
    for array, into in zip(arrays, held, strict=True):
        rig.memory.upload(array, into)
    for array, into in zip(arrays, held, strict=True):
        np.testing.assert_array_equal(rig.memory.download(into), array)
    assert not rig.memory.on_host


def test_an_upload_returns_before_the_copy_and_the_array_may_change_at_once(rig: Rig) -> None:
    array, into = numbers(8), rig.memory.empty((8,), "float32")
    rig.memory.upload(array, into)
    array[:] = -1
    assert len(rig.fake.pending()) == 1
    assert rig.memory.download(into).tolist() == list(range(8))


def test_the_ring_waits_only_for_copies_in_its_way(rig: Rig) -> None:
    small = [rig.memory.empty((16,), "float32") for _ in range(40)]
    for index, into in enumerate(small[:16]):
        rig.memory.upload(np.full(16, index, np.float32), into)
    assert len(rig.fake.pending()) == 16
    for index, into in enumerate(small[16:], 16):
        rig.memory.upload(np.full(16, index, np.float32), into)
    assert 0 < len(rig.fake.pending()) <= 16
    assert [rig.memory.download(into)[0] for into in small] == list(range(40))
    events = [handle for handle in rig.fake.alive if handle.kind == "event"]
    assert len(events) <= 17


@pytest.mark.parametrize("count", [255, 256, 257, 1023, 1024, 1025, 4096, 4097])
def test_an_array_larger_than_the_ring_goes_through_it(rig: Rig, count: int) -> None:
    array = numbers(count)
    into = [rig.memory.empty((count,), "float32") for _ in range(2)]
    for index, target in enumerate(into):
        rig.memory.upload(array + index, target)
    for index, target in enumerate(into):
        np.testing.assert_array_equal(rig.memory.download(target), array + index)


def test_an_array_must_fit_its_tensor(rig: Rig) -> None:
    into = rig.memory.empty((4,), "float32")
    for array in (numbers(5), numbers(4, "int32"), numbers(4).reshape(2, 2)):
        with pytest.raises(EngineError, match="does not fit"):
            rig.memory.upload(array, into)


def test_memory_goes_to_the_next_tensor_of_its_size_once_nothing_refers_to_it(rig: Rig) -> None:
    first = rig.memory.empty((100,), "float32")
    address = first.address
    other = rig.memory.empty((100,), "float32")
    assert other.address != address
    del first
    gc.collect()
    assert rig.memory.empty((10,), "float32").address != address
    assert rig.memory.empty((100,), "int32").address == address
    assert rig.fake.calls.count("cudaFree") == 0


def test_letting_go_of_a_tensor_calls_nothing_from_any_thread(rig: Rig) -> None:
    held = [rig.memory.empty((100,), "float32")]
    calls = len(rig.fake.calls)
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert len(rig.fake.calls) == calls


def test_unused_memory_is_given_back_where_there_is_too_little(rig: Rig) -> None:
    rig.fake.memory = 64 << 10
    big = rig.memory.empty((10 << 10,), "float32")
    rig.memory.upload(numbers(10 << 10), big)
    del big
    assert rig.memory.empty((12 << 10,), "float32").shape == (12 << 10,)
    with pytest.raises(CudaError, match="too little memory") as caught:
        rig.memory.empty((30 << 10,), "float32")
    assert caught.value.out_of_memory
    assert "cudaErrorMemoryAllocation" in str(caught.value)
    assert rig.fake.calls.count("cudaGetLastError") == rig.fake.calls.count("cudaMalloc") - 2


def test_a_thread_of_its_own_may_use_the_memory(rig: Rig) -> None:
    found = []

    def work() -> None:
        into = rig.memory.empty((4,), "float32")
        rig.memory.upload(numbers(4), into)
        found.append(rig.memory.download(into).tolist())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[0, 1, 2, 3]]


def test_closed_memory_is_refused_and_its_tensors_may_outlive_it() -> None:
    rig = Rig()
    kept = rig.memory.empty((4,), "float32")
    rig.memory.close()
    with pytest.raises(EngineError, match="device is closed"):
        rig.memory.empty((4,), "float32")
    with pytest.raises(EngineError, match="device is closed"):
        rig.memory.download(kept)
    with pytest.raises(EngineError, match="device is closed"):
        rig.memory.upload(numbers(4), kept)
    del kept
    assert rig.fake.leaks == ["stream"]
    assert not rig.fake.misuses


def test_an_error_of_earlier_work_comes_out_when_it_is_waited_for(rig: Rig) -> None:
    into = rig.memory.empty((4,), "float32")
    rig.fake.fails["cudaStreamSynchronize"] = [cudaError_t.cudaErrorIllegalAddress]
    with pytest.raises(CudaError, match="CUDA failed") as caught:
        rig.memory.download(into)
    assert "cudaErrorIllegalAddress in words" in str(caught.value)
    assert "Start the process again" in caught.value.advice


def test_scratch_memory_grows_to_the_largest_and_says_when_it_moved(rig: Rig) -> None:
    scratch = Scratch(rig.cuda, rig.stream)
    first = scratch.at_least(1000)
    assert (scratch.size, scratch.moves) == (1024, 1)
    assert scratch.at_least(500) == first
    assert scratch.moves == 1
    second = scratch.at_least(5000)
    assert (scratch.size, scratch.moves) == (5120, 2)
    assert second != first
    assert list(rig.fake.device) == [second]
    rig.fake.memory = 6000
    with pytest.raises(CudaError, match="too little memory"):
        scratch.at_least(7000)
    assert scratch.size == 0
    scratch.at_least(100)
    assert scratch.moves == 3
    scratch.close()
    scratch.close()


def test_scratch_memory_moves_only_after_the_work_that_uses_it(rig: Rig) -> None:
    scratch = Scratch(rig.cuda, rig.stream)
    scratch.at_least(100)
    rig.memory.upload(numbers(4), rig.memory.empty((4,), "float32"))
    scratch.at_least(1000)
    assert not rig.fake.pending()
    scratch.close()
