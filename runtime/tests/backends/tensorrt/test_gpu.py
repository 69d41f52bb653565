"""Memory, uploads and recordings on a real GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from importlib import import_module

import numpy as np
import pytest

from hidiff_runtime.backends.tensorrt.cuda import Cuda, CudaError
from hidiff_runtime.backends.tensorrt.cuda_graphs import CudaGraphs
from hidiff_runtime.backends.tensorrt.gpu_memory import CudaMemory, Scratch

pytestmark = pytest.mark.needs("cuda", "cuda-python")
RING = 1 << 16


class Rig:
    """Memory on the first GPU."""

    def __init__(self) -> None:
        self.cuda = Cuda(import_module("cuda.bindings.runtime"))
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


def test_the_gpu_is_described(rig: Rig) -> None:
    name, target = rig.cuda.describe(0)
    assert name.isprintable()
    assert target.startswith("sm")
    assert rig.cuda.free_memory() > 0


def test_what_goes_up_comes_down_though_the_arrays_change(rig: Rig) -> None:
    arrays = [np.random.default_rng(seed).standard_normal(3000 * (seed + 1)).astype(np.float32) for seed in range(30)]
    held = [rig.memory.empty(array.shape, "float32") for array in arrays]
    for array, into in zip(arrays, held, strict=True):
        changing = array.copy()
        rig.memory.upload(changing, into)
        changing[:] = 0
    for array, into in zip(arrays, held, strict=True):
        np.testing.assert_array_equal(rig.memory.download(into), array)


def test_memory_is_used_again_and_scratch_memory_is_aligned(rig: Rig) -> None:
    address = rig.memory.empty((1000,), "float32").address
    gc.collect()
    assert rig.memory.empty((1000,), "float32").address == address
    scratch = Scratch(rig.cuda, rig.stream)
    assert scratch.at_least(1000) % 256 == 0
    assert scratch.at_least(100_000) % 256 == 0
    scratch.close()


def test_too_much_is_refused_and_forgotten(rig: Rig) -> None:
    with pytest.raises(CudaError) as caught:
        rig.cuda.malloc(1 << 50)
    assert caught.value.out_of_memory
    into = rig.memory.empty((4,), "int32")
    rig.memory.upload(np.zeros(4, np.int32), into)
    np.testing.assert_array_equal(rig.memory.download(into), np.zeros(4))


def test_work_that_repeats_is_recorded(rig: Rig) -> None:
    pinned = rig.cuda.malloc_host(256)
    into = rig.memory.empty((64,), "float32")
    asked: list[int] = []

    def enqueue() -> None:
        asked.append(1)
        rig.cuda.copy_to_device(into.address, pinned, 256, rig.stream)

    graphs = CudaGraphs(rig.cuda, rig.stream, True, lambda: True)
    for _ in range(5):
        graphs.run((into.address,), 1, enqueue)
    rig.cuda.wait(rig.stream)
    assert len(asked) == 2  # once as it is, once recorded
    graphs.drop()
    rig.cuda.free_host(pinned)


def test_what_cannot_be_recorded_runs_as_it_is(rig: Rig) -> None:
    into = rig.memory.empty((64,), "float32")
    rig.memory.upload(np.zeros(64, np.float32), into)
    asked: list[int] = []

    def enqueue() -> None:
        asked.append(1)
        if len(asked) == 2:
            rig.cuda.wait(rig.stream)  # which a recording refuses

    graphs = CudaGraphs(rig.cuda, rig.stream, True, lambda: True)
    for _ in range(4):
        graphs.run((into.address,), 1, enqueue)
    assert len(asked) == 5
    np.testing.assert_array_equal(rig.memory.download(into), np.zeros(64))
