from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hidiff_runtime.backends.tensorrt.plan_record import FORMAT, PlanRecord
from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.manifest import TensorSpec

RECORD = PlanRecord(
    backend="tensorrt-rtx",
    version="1.7.1.116",
    targets=("sm89", "sm120"),
    device=None,
    parts=("strided.tensorrt-rtx.plan", "unet.tensorrt-rtx.tail"),
    phase="strided",
    inputs=(TensorSpec("latents", (2, 4, 8, 8), "float32"), TensorSpec("scalar", (), "int32")),
    outputs=(TensorSpec("noise_pred", (2, 4, 8, 8), "float32"),),
    options={"opset": 23, "tf32": False},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "strided.tensorrt-rtx.json"
    RECORD.write(path)
    return path


def changed(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return path


def test_a_record_reads_back_as_it_was_written(path: Path) -> None:
    assert PlanRecord.read(path) == RECORD
    tied = replace(RECORD, backend="tensorrt", device="NVIDIA H100 80GB HBM3", phase=None)
    tied.write(path)
    assert PlanRecord.read(path) == tied


def test_the_file_has_the_fields_that_it_always_had_in_their_order(path: Path) -> None:
    assert list(json.loads(path.read_text())) == [
        *("format", "backend", "version", "targets", "device", "parts", "phases", "selectors"),
        *("inputs", "outputs", "options"),
    ]


def test_the_parts_lie_beside_the_record(path: Path) -> None:
    assert RECORD.paths(path) == tuple(path.parent / part for part in RECORD.parts)


def test_a_phase_and_its_absence_read_as_older_versions_wrote_them(path: Path) -> None:
    assert {key: json.loads(path.read_text())[key] for key in ("phases", "selectors")} == {
        "phases": ["strided"],
        "selectors": [],
    }
    assert PlanRecord.read(changed(path, phases=["windowed"])).phase == "windowed"
    assert PlanRecord.read(changed(path, phases=[])).phase is None


def test_a_plan_of_several_phases_is_refused_with_the_way_out(path: Path) -> None:
    with pytest.raises(BundleError, match=r"several phases \(layout: merged\)") as caught:
        PlanRecord.read(changed(path, phases=["strided", "windowed"], selectors=["select_windowed"]))
    assert f"given: {path.name}: strided, windowed" in str(caught.value)
    assert "hidiff-export build" in caught.value.advice


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"backend": "onnxruntime"}, "backend must be one of"),
        ({"targets": []}, "targets must be"),
        ({"targets": ["cuda"]}, "targets must be"),
        ({"parts": []}, "parts must be"),
        ({"parts": ["../other.plan"]}, "parts must be"),
        ({"parts": [".."]}, "parts must be"),
        ({"phases": "strided"}, "phases must be"),
        ({"selectors": ["is_windowed"]}, "selectors must be empty"),
        ({"outputs": []}, "names of their own"),
        ({"inputs": [{"name": "latents", "shape": [0], "dtype": "float32"}]}, "whole number of 1 or more"),
        ({"inputs": [{"name": "latents", "shape": [1], "dtype": "float16"}]}, "dtype must be one of"),
        ({"version": ""}, "version must be a text"),
        ({"device": 0}, "device must be a text"),
        ({"novelty": 1}, "novelty is not a field"),
    ],
)
def test_a_broken_record_names_its_file_and_the_field(path: Path, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(BundleError, match=named) as caught:
        PlanRecord.read(changed(path, **fields))
    assert path.name in str(caught.value)
    assert "next:" in str(caught.value)


def test_a_newer_format_is_told_from_a_foreign_file(path: Path) -> None:
    with pytest.raises(BundleError, match=f"format {FORMAT + 1}; this hidiff-runtime reads plan records up to"):
        PlanRecord.read(changed(path, format=FORMAT + 1))
    with pytest.raises(BundleError, match="is no plan record"):
        PlanRecord.read(changed(path, format="one"))
    path.write_text("{}")
    with pytest.raises(BundleError, match="is no plan record"):
        PlanRecord.read(path)
    path.write_bytes(b"\x80\x00plan")
    with pytest.raises(BundleError, match="is not whole JSON"):
        PlanRecord.read(path)
    path.write_text("[1]")
    with pytest.raises(BundleError, match="JSON object"):
        PlanRecord.read(path)
    path.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        PlanRecord.read(path)
