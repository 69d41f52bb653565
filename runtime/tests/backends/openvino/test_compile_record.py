"""The record that says how OpenVINO compiles a graph, before any library reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hidiff_runtime.backends.openvino.compile_record import FORMAT, CompileRecord
from hidiff_runtime.errors import BundleError

pytestmark = pytest.mark.alone

RECORD = CompileRecord("strided.onnx", "bfloat16", ("time_proj/Sin", "time_proj/Cos"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "strided.openvino.json"
    RECORD.write(path)
    return path


def changed(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return path


def test_a_record_reads_back_as_it_was_written(path: Path) -> None:
    assert CompileRecord.read(path) == RECORD
    assert list(json.loads(path.read_text())) == ["format", "graph", "precision", "float32"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": FORMAT + 1}, f"has format {FORMAT + 1}; this hidiff-runtime reads compile records up to {FORMAT}"),
        ({"format": True}, "format"),
        ({"graph": "../strided.onnx"}, "names a graph that is not beside it"),
        ({"graph": "below/strided.onnx"}, "names a graph that is not beside it"),
        ({"graph": ".."}, "names a graph that is not beside it"),
        ({"graph": "C:strided.onnx"}, "names a graph that is not beside it"),
        ({"precision": "float16"}, "precision"),
        ({"float32": "time_proj/Sin"}, "float32"),
        ({"float32": [1]}, "float32"),
        ({"more": 1}, "more"),
    ],
)
def test_what_is_no_record_is_refused(path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message.replace(".", r"\.")):
        CompileRecord.read(changed(path, **fields))


def test_a_record_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="A compile record cannot be read"):
        CompileRecord.read(tmp_path / "none.openvino.json")
