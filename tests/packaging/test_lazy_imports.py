"""Commands that need no torch do not import it, nor anything else that is slow to load."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hidiff_export.cli import COMMANDS

HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "openvino", "numpy")

PROGRAM = """
import json, sys
from click.testing import CliRunner
from hidiff_export.cli import main
result = CliRunner().invoke(main, sys.argv[1:])
roots = {name.partition(".")[0] for name in sys.modules}
print(json.dumps({"code": result.exit_code, "output": result.output, "roots": sorted(roots)}))
"""


def _roots(*arguments: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True, timeout=600
    )
    answer = json.loads(run.stdout)
    assert answer["code"] == 0, answer["output"]
    return set(answer["roots"])


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        *((command, "--help") for command in COMMANDS),
        ("recipes", "list"),
        ("recipes", "schema"),
        ("plan", "sdxl-2048"),
        ("plan", "sdxl-controlnet-2048", "--json"),
    ],
    ids=" ".join,
)
def test_it_answers_without_heavy_libraries(arguments: tuple[str, ...]) -> None:
    assert not _roots(*arguments).intersection(HEAVY)


def test_the_check_sees_an_import() -> None:
    assert "yaml" in _roots("plan", "demo")
