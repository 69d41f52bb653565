"""`hidiff-export doctor`: the machine's builders, backends and tools."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from click.testing import CliRunner

from hidiff_export.cli import main


def test_doctor_knows_the_backends() -> None:
    done = CliRunner().invoke(main, ["doctor", "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["backends"]["onnxruntime"]["usable"] is True
    assert {"tensorrt", "tensorrt-rtx"} <= set(found["backends"])
    assert "torch" in found["tools"]
    assert "onnxruntime" in CliRunner().invoke(main, ["doctor"]).stdout


def test_doctor_knows_what_tensorrt_rtx_builds_for() -> None:
    pytest.importorskip("tensorrt_rtx")
    found = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)["builders"]["tensorrt-rtx"]
    assert found["usable"] is True
    assert "sm89" in found["detail"]
    assert "sm120" in found["detail"]


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_doctor_says_how_to_get_what_is_missing() -> None:
    found = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)["builders"]["tensorrt"]
    assert found["usable"] is False
    assert "pip install 'hidiff-export[tensorrt]'" in found["advice"]
    assert "hidiff-export[tensorrt]" in CliRunner().invoke(main, ["doctor"], env={"COLUMNS": "200"}).stdout
