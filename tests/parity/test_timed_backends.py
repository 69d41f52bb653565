"""ONNX Runtime and OpenVINO are timed by a bundle's timing graph, in a process of its own, when it is first opened."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy

import hidiff_runtime
from hidiff_runtime import cli, timing_process, timing_worker
from hidiff_runtime.backends.openvino import forked_process
from hidiff_runtime.backends.protocol import Session
from hidiff_runtime.format.manifest import GraphRecord, Manifest
from hidiff_runtime.timing_process import measure_in_process
from hidiff_runtime.timing_worker import measure
from tests.parity.toy_onnx import make

NAMES = ("openvino", "onnxruntime")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The toy with engines of both, the last phase's being the timing graph's too."""
    folder = make(tmp_path / "bundle", toy.Toy(), precision="float32")
    manifest = Manifest.read(folder)
    phases = []
    for record in manifest.phases:
        engines = {**record.engines, "onnxruntime": f"unet/{record.phase.name}.onnxruntime.onnx"}
        phases.append(replace(record, engines=engines))
    phase = phases[-1]
    timing = GraphRecord(phase.graph, phase.engines, phase.inputs, phase.outputs)
    toy.seal(folder, replace(manifest, phases=tuple(phases), timing=timing))
    return folder


def test_a_bundle_is_timed_and_then_not_again(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(bundle)]) == 0
    assert "backend   openvino: the first that can run here, until opening" in capsys.readouterr().out
    assert cli.main(["check", str(bundle), "--calls-only"]) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[0].startswith("Timing openvino and onnxruntime on this machine, once.")
    chosen = lines[1].partition(":")[0]
    assert chosen in NAMES
    assert f"{chosen} against" in out
    assert cli.main(["check", str(bundle), "--calls-only"]) == 0
    assert "Timing" not in capsys.readouterr().err
    assert cli.main(["info", str(bundle)]) == 0
    assert f"backend   {chosen}: the fastest here" in capsys.readouterr().out
    with hidiff_runtime.open(bundle) as opened:
        assert opened.backend == chosen
        assert opened.backend_reason.startswith("the fastest here")


def test_this_process_computes_nothing_while_backends_are_timed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that opens a bundle and then forks must not find OpenVINO's threads left behind."""
    monkeypatch.setattr(forked_process, "_first", [])
    hidiff_runtime.open(bundle).close()
    assert forked_process._first == []


def test_times_are_of_what_the_graph_computes(bundle: Path) -> None:
    """The engine that is timed is the timing graph's: it gives what it is there for, and takes another's time."""
    with hidiff_runtime.open(bundle, backend="onnxruntime") as opened:
        session, record = opened.timing_engine()
        inputs = {spec.name: np.ones(spec.shape, spec.dtype) for spec in record.inputs}
        phase = opened.engine(opened.manifest.phases[-1].phase)
        np.testing.assert_array_equal(session.run(inputs)["noise_pred"], phase.run(inputs)["noise_pred"])
    seconds, failed = measure(bundle, NAMES, {"threads": 1})
    assert set(seconds) == set(NAMES)
    assert all(value > 0 for value in seconds.values())
    assert not failed


def test_evaluations_that_take_long_are_not_repeated(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def evaluated(session: Session, record: GraphRecord) -> float:
        asked.append(len(asked))
        session.run({spec.name: np.ones(spec.shape, spec.dtype) for spec in record.inputs})
        return seconds

    monkeypatch.setattr(timing_worker, "_evaluate", evaluated)
    for seconds, count in ((timing_worker.ENOUGH, 2), (timing_worker.ENOUGH / 100, 2 + 2 * timing_worker.ROUNDS)):
        asked.clear()
        assert measure(bundle, NAMES, {"threads": 1}) == (dict.fromkeys(NAMES, seconds), {})
        assert len(asked) == count


def test_an_engine_that_does_not_load_is_left_out(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    assert manifest.timing is not None
    (bundle / "unet/broken.onnx").write_bytes(b"\x08\x0a")
    engines = {**manifest.timing.engines, "onnxruntime": "unet/broken.onnx"}
    toy.seal(bundle, replace(manifest, timing=replace(manifest.timing, engines=engines)))
    measured = measure_in_process(bundle, (), {}, NAMES)
    assert [*measured.seconds] == ["openvino"]
    assert [*measured.failed] == ["onnxruntime"]
    with hidiff_runtime.open(bundle) as opened:
        assert opened.backend == "openvino"
        assert "onnxruntime:" in opened.backend_reason
    assert not bundle.with_name("bundle.cache").exists()


def test_a_process_that_crashes_or_is_none_is_no_end(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_process, "_START", "import os; os.write(2, b'lost the GPU'); os.abort()")
    measured = measure_in_process(bundle, (), {}, NAMES)
    assert not measured.seconds
    assert "code -6" in measured.failed["openvino"]
    assert "lost the GPU" in measured.failed["openvino"]
    monkeypatch.setattr(sys, "executable", "/opt/app/serve-pictures")
    assert "no Python" in measure_in_process(bundle, (), {}, NAMES).failed["openvino"]
    with hidiff_runtime.open(bundle) as opened:
        assert opened.backend == "openvino"
        assert "timing failed" in opened.backend_reason


def test_modules_of_the_current_folder_are_not_imported(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "elsewhere"
    here.mkdir()
    (here / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert set(measure_in_process(bundle, (), {}, NAMES).seconds) == set(NAMES)


def test_one_that_is_too_slow_is_stopped(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_process, "_START", "import time; time.sleep(600)")
    monkeypatch.setattr(timing_process, "SECONDS", 0.2)
    assert "timed out" in measure_in_process(bundle, (), {}, NAMES).failed["openvino"]


def test_options_go_to_all(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), hidiff_runtime.open(bundle, threads=1) as opened:
        assert opened.backend in NAMES
    with hidiff_runtime.open(bundle, weights="shared") as opened:
        assert opened.backend == "onnxruntime"
    with hidiff_runtime.open(bundle, precision="float32") as opened:
        assert opened.backend == "openvino"
