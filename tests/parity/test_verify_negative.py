"""Real engines, damaged on purpose: each kind of damage fails the check that the unaltered bundle passes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hidiff_export.parity.report import Report
from hidiff_export.parity.tolerance import Boundary
from hidiff_export.parity.verify import verify
from hidiff_runtime import check
from hidiff_runtime.manifest import MANIFEST, FileRecord, Manifest
from hidiff_runtime.safetensors import SafetensorsFile

SOURCE = "random:0"
WEIGHT = "up_blocks.3.attentions.1.transformer_blocks.0.attn1.to_q.weight"
LIVE = {Boundary.TRAJECTORY.value, Boundary.RANDOM.value, Boundary.RUN.value}
ALL = {boundary.value for boundary in Boundary} - {Boundary.CONTROLNET.value, Boundary.FLOAT16_GRAPH.value}
RECORDED = {Boundary.RECORDED_CALL.value, Boundary.RECORDED_STEP.value, Boundary.RECORDED_RUN.value}


@pytest.fixture
def bundle(sd15_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own to damage."""
    return Path(shutil.copytree(sd15_bundle, tmp_path / "bundle"))


def refresh(folder: Path) -> Path:
    """Hashes every file anew, so that nothing but the comparison itself can find the damage."""
    manifest = Manifest.read(folder)
    files = {path: FileRecord.of(folder / path) for path in manifest.files}
    (folder / MANIFEST).write_text(json.dumps(replace(manifest, files=files).to_json()), encoding="utf-8")
    return folder


def change_weight(folder: Path, change: Callable[[np.ndarray], object]) -> Path:
    """Lets ``change`` write into one tensor of the store."""
    store = folder / "unet/weights.safetensors"
    with SafetensorsFile.open(store) as file:
        info = file.info(WEIGHT)
    values = np.memmap(store, np.float32, "r+", info.offset, info.shape)
    change(values)
    values.flush()
    return refresh(folder)


def failing(report: Report) -> set[str]:
    return {verdict.boundary for verdict in report.failures}


def test_an_unaltered_bundle_holds_with_room_to_spare(sd15_bundle: Path) -> None:
    report = verify(sd15_bundle, against=SOURCE)

    assert report.ok, report.to_markdown()
    assert {verdict.boundary for verdict in report.verdicts} == ALL
    for verdict in report.verdicts:
        assert verdict.metrics is not None
        assert verdict.metrics.snr_db > 95


def test_engines_of_two_phases_swapped(bundle: Path) -> None:
    (strided, windowed) = (bundle / record.engines["onnxruntime"] for record in Manifest.read(bundle).phases)
    content = strided.read_bytes()
    strided.write_bytes(windowed.read_bytes())
    windowed.write_bytes(content)

    report = verify(refresh(bundle))

    assert failing(report) == LIVE | RECORDED
    assert not check(bundle).ok


def test_one_shift_changed_in_one_recorded_sample(bundle: Path) -> None:
    index = bundle / "reference/samples.json"
    samples = json.loads(index.read_text(encoding="utf-8"))
    shifts = samples["calls"][0]["window_shifts"]
    shifts[-1] = (shifts[-1] + 1) % 4
    index.write_text(json.dumps(samples), encoding="utf-8")

    report = verify(refresh(bundle))

    assert failing(report) == {Boundary.RECORDED_CALL.value}
    (found,) = report.failures
    assert found.metrics is not None
    assert found.metrics.snr_db < 40


def test_one_weight_changed_is_found_against_the_source(bundle: Path) -> None:
    change_weight(bundle, lambda values: np.multiply(values, 1.5, out=values))

    report = verify(bundle, against=SOURCE)

    assert failing(report) == {Boundary.WEIGHTS.value, Boundary.GRAPH.value} | LIVE | RECORDED
    assert WEIGHT in report.verdicts[0].fault
    assert not LIVE & failing(verify(bundle))


def test_one_weight_that_is_nan(bundle: Path) -> None:
    change_weight(bundle, lambda values: values.__setitem__((0, 0), np.nan))

    report = verify(bundle, against=SOURCE)

    assert failing(report) >= {Boundary.WEIGHTS.value, Boundary.GRAPH.value, *LIVE}
    assert all("NaN" in verdict.fault for verdict in report.failures if verdict.boundary == Boundary.RANDOM.value)
