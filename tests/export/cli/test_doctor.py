"""`hidiff-export doctor`: the machine's backends and tools."""

from __future__ import annotations

import json

from click.testing import CliRunner

from hidiff_export.cli import main


def test_doctor_knows_the_backends() -> None:
    done = CliRunner().invoke(main, ["doctor", "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["backends"]["onnxruntime"]["usable"] is True
    assert "torch" in found["tools"]
    assert "onnxruntime" in CliRunner().invoke(main, ["doctor"]).stdout
