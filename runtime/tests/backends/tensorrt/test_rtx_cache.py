"""TensorRT-RTX's cache of what it finished on the GPU, on the fake library: where it lies, and what spoils it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_plans import watched
from fake_trt import FakeTrt
from small_plans import DOUBLED, GRAPH, INPUTS, KERNELS, device_of, written

from hidiff_runtime.format.manifest import MANIFEST


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTrt]:
    with watched(FakeTrt(FakeCuda(), rtx=True, kernels=KERNELS), monkeypatch) as made:
        yield made


def bundle_of(tmp_path: Path) -> Path:
    """A folder that looks like a bundle; engines go into its ``unet``."""
    (tmp_path / "bundle/unet").mkdir(parents=True)
    (tmp_path / "bundle" / MANIFEST).write_text("{}")
    return tmp_path / "bundle"


def run_once(trt: FakeTrt, path: Path, **options: Any) -> list[str]:
    """Runs an engine; gives what had to be finished for it."""
    trt.finished.clear()
    with device_of(trt, **options) as device, device.open(path, {}, GRAPH) as session:
        np.testing.assert_array_equal(session.run(INPUTS)["y"], DOUBLED)
    return list(trt.finished)


def test_kernels_finished_once_are_kept_beside_the_bundle(tmp_path: Path, rtx: FakeTrt) -> None:
    bundle = bundle_of(tmp_path)
    path = written(bundle / "unet", rtx)
    assert run_once(rtx, path) == ["double"]
    (kept,) = (tmp_path / "bundle.cache").iterdir()
    assert kept.name == "tensorrt-rtx-1.7.1.116-NVIDIA-L4.bin"
    written_at = kept.stat().st_mtime_ns
    assert run_once(rtx, path) == []
    assert kept.stat().st_mtime_ns == written_at
    assert sorted(entry.name for entry in bundle.iterdir()) == [MANIFEST, "unet"]


def test_kernels_finished_while_an_engine_runs_are_kept_at_the_end(tmp_path: Path, rtx: FakeTrt) -> None:
    path = written(bundle_of(tmp_path) / "unet", rtx, finishes_late=True)
    with device_of(rtx) as device:
        with device.open(path, {}, GRAPH) as session:
            session.run(INPUTS)
        (kept,) = (tmp_path / "bundle.cache").iterdir()
        assert "double" in kept.read_text()
        assert "late" not in kept.read_text()
    assert "late" in kept.read_text()


def test_the_cache_can_be_elsewhere_or_nowhere(tmp_path: Path, rtx: FakeTrt) -> None:
    path = written(bundle_of(tmp_path) / "unet", rtx)
    assert run_once(rtx, path, cache="off") == ["double"]
    assert run_once(rtx, path, cache=tmp_path / "other/place") == ["double"]
    assert len(list((tmp_path / "other/place").iterdir())) == 1
    assert not (tmp_path / "bundle.cache").exists()
    assert run_once(rtx, path, cache=str(tmp_path / "other/place")) == []


def test_engines_outside_a_bundle_are_finished_each_time(tmp_path: Path, rtx: FakeTrt) -> None:
    path = written(tmp_path, rtx)
    before = set(tmp_path.iterdir())
    assert run_once(rtx, path) == run_once(rtx, path) == ["double"]
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("fault", ["broken", "other driver", "folder", "unwritable", "foreign", "not written"])
def test_a_cache_that_cannot_be_used_is_told_and_passed_over(
    tmp_path: Path, rtx: FakeTrt, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(bundle_of(tmp_path) / "unet", rtx)
    folder = tmp_path / "bundle.cache"
    kept = folder / "tensorrt-rtx-1.7.1.116-NVIDIA-L4.bin"
    if fault == "unwritable":
        folder.write_text("not a folder")
    elif fault == "not written":
        rtx.forgets = True
    else:
        assert run_once(rtx, path) == ["double"]
    if fault == "broken":
        kept.write_bytes(b"\0\1")
    elif fault == "other driver":
        kept.write_text('["kernels for something else"]')
    elif fault == "folder":
        kept.unlink()
        kept.mkdir()
    elif fault == "foreign":
        kept.chmod(0o666)
    with caplog.at_level(logging.WARNING):
        assert run_once(rtx, path) == ["double"]
    assert caplog.records
    assert all("is not used" in record.getMessage() and str(folder) in record.getMessage() for record in caplog.records)
    if fault in ("broken", "other driver", "foreign"):
        assert run_once(rtx, path) == []


def test_a_cache_that_another_user_owns_is_passed_over(
    tmp_path: Path, rtx: FakeTrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(bundle_of(tmp_path) / "unet", rtx)
    run_once(rtx, path)
    if os.geteuid() == 0:
        (kept,) = (tmp_path / "bundle.cache").iterdir()
        os.chown(kept, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert run_once(rtx, path) == ["double"]
