"""Sessions on the fake libraries: results, what is asked of the stream and in which order, and what is given back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeCuda, cudaError_t
from fake_plans import record_of, watched
from fake_trt import FakeTrt
from small_plans import DOUBLED, GRAPH, INPUTS, KERNELS, SHIFTS, X, Y, device_of, written

from hidiff_runtime import backends
from hidiff_runtime.backends.tensorrt.device import TensorRtDevice
from hidiff_runtime.backends.tensorrt.session import TensorRtSession
from hidiff_runtime.errors import EngineError


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTrt]:
    made = FakeTrt(FakeCuda(), rtx=request.param == "tensorrt-rtx", kernels=KERNELS)
    with watched(made, monkeypatch):
        yield made


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTrt]:
    with watched(FakeTrt(FakeCuda(), rtx=True, kernels=KERNELS), monkeypatch) as made:
        yield made


def graph_calls(trt: FakeTrt) -> tuple[int, int]:
    """How often something was recorded, and how often launched."""
    return trt.cuda.calls.count("cudaStreamBeginCapture"), trt.cuda.calls.count("cudaGraphLaunch")


class Tensors:
    """Two sets of tensors, as a denoising loop has them."""

    def __init__(self, device: TensorRtDevice, sets: int = 2) -> None:
        assert device.memory is not None
        self.memory = device.memory
        self.shifts = self.memory.empty(SHIFTS.shape, "int32")
        self.sets = [
            (self.memory.empty(X.shape, "float32"), self.memory.empty(Y.shape, "float32")) for _ in range(sets)
        ]

    def evaluate(self, session: TensorRtSession, step: int, x: float, shifts: tuple[int, int, int]) -> np.ndarray:
        """Asks for one evaluation, and changes what it was given before it has run."""
        into, result = self.sets[step % len(self.sets)]
        given = np.full(X.shape, x, np.float32)
        shift = np.array(shifts, np.int32)
        self.memory.upload(given, into)
        self.memory.upload(shift, self.shifts)
        given[:], shift[:] = -1, -1
        session.execute({"x": into, "shifts": self.shifts}, {"y": result})
        return result


def test_run_gives_what_the_engine_computes_and_everything_back(tmp_path: Path, trt: FakeTrt) -> None:
    path = written(tmp_path, trt)
    with device_of(trt) as device, device.open(path, {}, GRAPH) as session:
        for step in range(4):
            np.testing.assert_array_equal(session.run({**INPUTS, "x": INPUTS["x"] + step})["y"], DOUBLED + 2 * step)
    assert graph_calls(trt) == (1, 3)


def test_nothing_happens_before_it_is_waited_for(tmp_path: Path, trt: FakeTrt) -> None:
    with device_of(trt) as device, device.open(written(tmp_path, trt), {}, GRAPH) as session:
        tensors = Tensors(device)
        results = [tensors.evaluate(session, step, step, (step, step, step)) for step in range(2)]
        assert len(trt.cuda.pending()) == 6
        assert [tensors.memory.download(result)[0, 0] for result in results] == [0, 3]


def test_two_sets_of_tensors_are_recorded_once_each_after_a_first_run(tmp_path: Path, trt: FakeTrt) -> None:
    with device_of(trt) as device, device.open(written(tmp_path, trt), {}, GRAPH) as session:
        tensors = Tensors(device)
        for step in range(10):
            shifts = (step, 0, 1)
            result = tensors.memory.download(tensors.evaluate(session, step, step, shifts))
            np.testing.assert_array_equal(result, np.full(X.shape, 2 * step) + np.array(shifts))
    assert graph_calls(trt) == (2, 8)


def test_recordings_are_not_kept_without_end(tmp_path: Path, trt: FakeTrt) -> None:
    with device_of(trt) as device, device.open(written(tmp_path, trt), {}, GRAPH) as session:
        tensors = Tensors(device, sets=12)
        for step in range(36):
            tensors.evaluate(session, step // 3, step, (0, 0, 0))
        assert sum(handle.kind == "executable" for handle in trt.cuda.alive) == 8
    assert graph_calls(trt) == (12, 24)


def test_nothing_is_recorded_where_it_is_not_asked_for(tmp_path: Path, trt: FakeTrt) -> None:
    with device_of(trt, cuda_graph="false") as device, device.open(written(tmp_path, trt), {}, GRAPH) as session:
        for _ in range(3):
            np.testing.assert_array_equal(session.run(INPUTS)["y"], DOUBLED)
    assert graph_calls(trt) == (0, 0)


@pytest.mark.parametrize("name", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "engine"])
def test_where_recording_is_refused_evaluations_go_on_without(tmp_path: Path, trt: FakeTrt, name: str) -> None:
    if name == "engine":
        trt.refuses_capture = True
    else:
        trt.cuda.fails[name] = [cudaError_t.cudaErrorStreamCaptureUnsupported]
    with device_of(trt) as device, device.open(written(tmp_path, trt), {}, GRAPH) as session:
        for step in range(5):
            np.testing.assert_array_equal(session.run({**INPUTS, "x": INPUTS["x"] + step})["y"], DOUBLED + 2 * step)
    assert graph_calls(trt) == (1, 0)


def test_tensorrt_rtx_is_asked_whether_it_can_be_recorded(tmp_path: Path, rtx: FakeTrt) -> None:
    path = written(tmp_path, rtx, not_capturable=True)
    with device_of(rtx) as device, device.open(path, {}, GRAPH) as session:
        for _ in range(3):
            np.testing.assert_array_equal(session.run(INPUTS)["y"], DOUBLED)
    assert graph_calls(rtx) == (0, 0)


def test_engines_share_scratch_memory_and_recordings_end_when_it_moves(tmp_path: Path, trt: FakeTrt) -> None:
    small, large = written(tmp_path, trt, scratch=1000), written(tmp_path, trt, "triple", scratch=90_000)
    with device_of(trt) as device, device.open(small, {}, GRAPH) as first, device.open(large, {}, GRAPH) as second:
        tensors = Tensors(device)
        for step in range(4):
            tensors.evaluate(first, step, 1, (0, 0, 0))
        assert graph_calls(trt) == (2, 2)
        tensors.evaluate(second, 0, 1, (0, 0, 0))
        blocks = sorted(len(block) for block in trt.cuda.device.values())
        assert blocks[-1] == 90_112
        assert 1024 not in blocks
        for step in range(4):
            result = tensors.memory.download(tensors.evaluate(first, step, 1, (1, 1, 1)))
            assert result[0, 0] == 3
        assert graph_calls(trt) == (4, 4)
        assert tensors.memory.download(tensors.evaluate(second, 1, 1, (1, 1, 1)))[0, 0] == 4


def test_the_engine_that_was_there_is_freed_when_its_session_ends(tmp_path: Path, trt: FakeTrt) -> None:
    paths = [written(tmp_path, trt, name, weights=100_000) for name in ("double", "triple")]
    with device_of(trt) as device:
        for path in paths:
            with device.open(path, {}, GRAPH) as session:
                session.run(INPUTS)
                assert 99_000 < trt.cuda.weights < 101_000
            assert trt.cuda.weights == 0


def test_a_session_ends_while_the_stream_has_work(tmp_path: Path, trt: FakeTrt) -> None:
    with device_of(trt) as device:
        with device.open(written(tmp_path, trt), {}, GRAPH) as session:
            tensors = Tensors(device)
            result = tensors.evaluate(session, 0, 5, (1, 1, 1))
        assert tensors.memory.download(result)[0, 0] == 11


def test_a_device_is_left_while_a_copy_waits(trt: FakeTrt) -> None:
    with device_of(trt) as device:
        tensors = Tensors(device)
        tensors.memory.upload(INPUTS["shifts"], tensors.shifts)
        assert trt.cuda.pending()
    assert device.memory is None


def test_another_thread_may_open_the_next_engine_meanwhile(tmp_path: Path, trt: FakeTrt) -> None:
    with device_of(trt) as device, device.open(written(tmp_path, trt), {}, GRAPH) as session:
        tensors = Tensors(device)
        tensors.evaluate(session, 0, 1, (0, 0, 0))
        following = device.open(written(tmp_path, trt, "triple", scratch=50_000), {}, GRAPH)
        thread = threading.Thread(target=following.__enter__)
        waiting = len(trt.cuda.pending())
        thread.start()
        thread.join()
        assert len(trt.cuda.pending()) == waiting
        np.testing.assert_array_equal(following.run(INPUTS)["y"], INPUTS["x"] * 3 + INPUTS["shifts"])
        following.__exit__(None, None, None)


@pytest.mark.parametrize("name", ["cudaErrorMemoryAllocation", "cudaErrorIllegalAddress"])
def test_scratch_memory_is_called_too_little_only_where_it_is(tmp_path: Path, trt: FakeTrt, name: str) -> None:
    """Calls of CUDA also tell what went wrong before them."""
    with device_of(trt) as device, device.open(written(tmp_path, trt), {}, GRAPH) as session:
        tensors = Tensors(device)
        trt.cuda.fails["cudaMalloc"] = [cudaError_t[name]]
        with pytest.raises(EngineError) as caught:
            tensors.evaluate(session, 0, 1, (0, 0, 0))
        told = "too little memory on the GPU for an engine" in str(caught.value)
        assert told == (name == "cudaErrorMemoryAllocation")
        assert tensors.memory.download(tensors.evaluate(session, 0, 1, (0, 0, 0)))[0, 0] == 2


def test_two_devices_at_once_have_one_logger(tmp_path: Path, trt: FakeTrt) -> None:
    """TensorRT keeps the first logger it was given, and calls it though the device that brought it is closed."""
    path = written(tmp_path, trt)
    first, second = device_of(trt), device_of(trt)
    with second:
        with first, first.open(path, {}, GRAPH) as session:
            session.run(INPUTS)
        with second.open(path, {}, GRAPH) as session:
            np.testing.assert_array_equal(session.run(INPUTS)["y"], DOUBLED)
    assert len(trt.loggers) == 2
    assert trt.loggers[0] is trt.loggers[1]


def test_a_session_that_is_not_open_is_refused(tmp_path: Path, trt: FakeTrt) -> None:
    device = device_of(trt)
    assert device.memory is None
    with pytest.raises(EngineError, match="device is not open"):
        device.open(written(tmp_path, trt), {}, GRAPH)
    with device:
        session = device.open(written(tmp_path, trt), {}, GRAPH)
        with pytest.raises(EngineError, match="engine is not open"):
            session.run(INPUTS)
        with session:
            session.run(INPUTS)
        with pytest.raises(EngineError, match="engine is not open"):
            session.run(INPUTS)
        with session:
            session.run(INPUTS)


@pytest.mark.parametrize(
    "changed",
    [
        {"x": np.zeros((2, 4), np.float32)},
        {"x": np.zeros((2, 3))},
        {"shifts": np.zeros(3, np.float32)},
        {"more": np.zeros(3, np.float32)},
    ],
)
def test_inputs_must_be_those_of_the_record(tmp_path: Path, trt: FakeTrt, changed: dict[str, np.ndarray]) -> None:
    with device_of(trt) as device, device.open(written(tmp_path, trt), {}, GRAPH) as session:
        with pytest.raises(EngineError, match="inputs"):
            session.run({**INPUTS, **changed})
        with pytest.raises(EngineError, match="inputs"):
            session.run({"x": INPUTS["x"]})
        np.testing.assert_array_equal(session.run(INPUTS)["y"], DOUBLED)


def test_a_plan_reads_the_same_in_two_parts_or_one(tmp_path: Path, trt: FakeTrt) -> None:
    path = written(tmp_path, trt)
    backend = backends.get("tensorrt-rtx" if trt.rtx else "tensorrt")
    record, head, tail = backend.files(path)
    assert record == path
    whole = tmp_path / "whole.plan"
    whole.write_bytes(head.read_bytes() + tail.read_bytes())
    replace(record_of(trt, GRAPH), parts=("whole.plan",)).write(tmp_path / "whole.json")
    with device_of(trt) as device, device.open(tmp_path / "whole.json", {}, GRAPH) as session:
        np.testing.assert_array_equal(session.run(INPUTS)["y"], DOUBLED)
