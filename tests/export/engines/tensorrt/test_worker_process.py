"""One engine in a process of its own: what it gives, and every way in which it fails, with the real library."""

from __future__ import annotations

import errno
import json
import subprocess
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from hidiff_export.engines.tensorrt import worker_process
from hidiff_export.engines.tensorrt.libraries import TENSORRT_RTX, BuilderLibrary
from hidiff_export.errors import EngineError
from hidiff_runtime.format.manifest import TensorSpec
from tests.export.compiler.disk import files_of_at_most
from tests.export.engines.tensorrt.small_engines import attention, build, linear, model, request, square

pytestmark = pytest.mark.needs("tensorrt-rtx")

WEIGHT = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float16)

ImportedAs = Callable[[str], BuilderLibrary]


@pytest.fixture
def imported_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImportedAs:
    """Makes a library whose module is a text of one's own, which the worker imports."""

    def make(text: str) -> BuilderLibrary:
        (tmp_path / "another_tensorrt.py").write_text(textwrap.dedent(text))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return replace(TENSORRT_RTX, module="another_tensorrt")

    return make


def test_it_builds_and_says_what_it_took(tmp_path: Path) -> None:
    seen: list[tuple[float, str]] = []
    answer = build(request(tmp_path, square()), progress=lambda *step: seen.append(step))
    assert answer["seconds"] > 0
    assert answer["peak_bytes"] > 50e6
    assert (tmp_path / "small.plan").stat().st_size > 10_000
    layers = json.loads((tmp_path / "small.layers.json").read_text())["layers"]
    assert any(tensor["name"] == "c" for layer in layers for tensor in layer["outputs"])
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] > 0.5
    assert len({note for _, note in seen}) > 3


def test_an_input_that_no_layer_takes_stays_in_the_plan(tmp_path: Path) -> None:
    """As shallow phases of SDXL have: an engine's session binds every input of its record."""
    node = helper.make_node("Mul", ["a", "a"], ["c"])
    build(request(tmp_path, model([node], [("a", "float32", [4]), ("idle", "float32", [4])], [("c", "float32", [4])])))
    layers = json.loads((tmp_path / "small.layers.json").read_text())["layers"]
    assert not any(tensor["name"] == "idle" for layer in layers for tensor in layer["inputs"])
    # A plan can be opened on a GPU alone. Names lie in its table of tensors, each with its length before it.
    assert b"\x04\0\0\0\0\0\0\0idle" in (tmp_path / "small.plan").read_bytes()


def test_weights_come_from_the_store(tmp_path: Path) -> None:
    graph, place = linear(tmp_path, WEIGHT)
    made = request(tmp_path, graph, weights=str(tmp_path / "w.bin"), initializers=(place,))
    build(made)
    assert WEIGHT.tobytes() in (tmp_path / "small.plan").read_bytes()
    other = tmp_path / "other.bin"
    other.write_bytes(bytes(place.offset) + (-WEIGHT).tobytes())
    (tmp_path / "w.bin").unlink()  # so that the parser has no file that it could read by itself
    build(replace(made, weights=str(other)))
    plan = (tmp_path / "small.plan").read_bytes()
    assert (-WEIGHT).tobytes() in plan
    assert WEIGHT.tobytes() not in plan


@pytest.mark.parametrize(
    ("changed", "given"),
    [
        ({"inputs": (TensorSpec("a", (5,), "float32"),)}, "a float32[4] instead of a float32[5]"),
        ({"inputs": (TensorSpec("a", (4,), "int32"),)}, "a float32[4] instead of a int32[4]"),
        ({"inputs": ()}, "a float32[4] instead of none"),
        ({"outputs": (TensorSpec("d", (4,), "float32"),)}, "c float32[4], none instead of none, d float32[4]"),
    ],
)
def test_other_inputs_and_outputs_than_the_record_says_are_refused(
    changed: dict[str, Any], given: str, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=r"small\.tensorrt-rtx would have other (in|out)puts") as refused:
        build(request(tmp_path, square(), **changed))
    assert refused.value.given == given
    assert not (tmp_path / "small.plan").exists()


def test_attention_without_a_kernel_is_refused_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="TensorRT-RTX cannot build") as refused:
        build(request(tmp_path, attention(8)))
    assert "not supported by a dedicated kernel" in str(refused.value.given)
    assert "no attention kernel for a head size" in refused.value.advice
    build(request(tmp_path, attention(64)))


def mixed() -> onnx.ModelProto:
    node = helper.make_node("Add", ["a", "b"], ["c"], name="blocks/mix")
    return model([node], [("a", "float16", [4]), ("b", "float32", [4])], [("c", "float32", [4])])


def unknown() -> onnx.ModelProto:
    made = model([helper.make_node("Frobnicate", ["a"], ["c"])], [("a", "float32", [4])], [("c", "float32", [4])])
    made.graph.node[0].domain = "nowhere"
    made.opset_import.append(helper.make_opsetid("nowhere", 1))
    return made


@pytest.mark.parametrize(
    ("graph", "given", "advice"),
    [(mixed(), "blocks/mix", "mixes precisions"), (unknown(), "Plugin not found", "does not know an operator")],
    ids=["mixed types", "unknown operator"],
)
def test_what_the_parser_refuses_is_named(graph: onnx.ModelProto, given: str, advice: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as refused:
        build(request(tmp_path, graph))
    assert given in str(refused.value.given)
    assert advice in refused.value.advice


def test_an_error_that_is_only_logged_fails_the_build(imported_as: ImportedAs, tmp_path: Path) -> None:
    library = imported_as("""
        import sys, tensorrt_rtx as trt
        make = trt.Builder.create_builder_config
        def with_a_setting_that_is_refused(builder):
            config = make(builder)
            config.set_memory_pool_limit(trt.MemoryPoolType.DLA_MANAGED_SRAM, 12345)
            return config
        trt.Builder.create_builder_config = with_a_setting_that_is_refused
        sys.modules[__name__] = trt
    """)
    with pytest.raises(EngineError, match="cannot build") as refused:
        build(request(tmp_path, square()), library)
    assert "Setting DLA memory pool size" in str(refused.value.given)
    assert "catchCudaError" not in str(refused.value.given)
    assert not (tmp_path / "small.plan").exists()


def test_too_little_memory_is_said(imported_as: ImportedAs, tmp_path: Path) -> None:
    library = imported_as("""
        import resource, sys, tensorrt_rtx
        resource.setrlimit(resource.RLIMIT_AS, (1_200_000_000, resource.getrlimit(resource.RLIMIT_AS)[1]))
        sys.modules[__name__] = tensorrt_rtx
    """)
    graph, place = linear(tmp_path, np.zeros((8192, 32768), np.float16))
    with pytest.raises(EngineError) as refused:
        build(request(tmp_path, graph, weights=str(tmp_path / "w.bin"), initializers=(place,)), library)
    assert "three times the weights in memory" in refused.value.advice


@pytest.mark.parametrize(
    ("module", "summary", "given", "advice"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed", "SIGKILL", "on a larger machine"),
        ("import os; os.abort()", "crashed", "signal SIGABRT", "Report this"),
        ("raise SystemExit(3)", "crashed", "exit code 3", "Report this"),
        ("1 / 0", "crashed", "ZeroDivisionError", "Report this"),
        ("raise ImportError('libcudart.so.13 is missing')", "cannot be loaded", "libcudart", "pip install"),
    ],
)
def test_a_worker_that_dies_is_an_error(
    module: str, summary: str, given: str, advice: str, imported_as: ImportedAs, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=summary) as died:
        build(request(tmp_path, square()), imported_as(module))
    assert given in str(died.value.given)
    assert advice in died.value.advice


def test_a_full_disk_is_the_systems_error(tmp_path: Path) -> None:
    with files_of_at_most(50_000), pytest.raises(OSError, match="too large") as full:
        build(request(tmp_path, square()))
    assert full.value.errno == errno.EFBIG


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started."""
    found: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            found.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return found


def interrupt(_fraction: float, note: str) -> None:
    if note != "parsing":
        raise KeyboardInterrupt


def test_ctrl_c_stops_the_library_and_leaves_nothing(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(request(tmp_path, square()), progress=interrupt)
    assert started[0].returncode == 0  # it ended by itself, because the library asked whether to go on
    assert not (tmp_path / "small.plan").exists()


def test_a_worker_that_does_not_stop_is_ended(
    imported_as: ImportedAs,
    tmp_path: Path,
    started: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = imported_as("""
        import sys, time, tensorrt_rtx as trt
        trt.Builder.build_serialized_network = lambda *_: time.sleep(600)
        sys.modules[__name__] = trt
    """)
    monkeypatch.setattr(worker_process, "PATIENCE", 0.2)

    def interrupt_at_once(_fraction: float, _note: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(request(tmp_path, square()), library, interrupt_at_once)
    assert started[0].returncode == -9
