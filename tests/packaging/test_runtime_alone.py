"""The runtime in an environment that has nothing else: installs, opens, checks, draws, and drags nothing in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUNTIME = Path(__file__).parents[2] / "runtime"
FOREIGN = {"torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "safetensors", "hidiff-export"}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """The command's output; what it printed is shown when it fails."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "COV"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment made from a copy of ``runtime/`` and its test extra; the copy lies beside it."""
    folder = tmp_path_factory.mktemp("alone")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache")
    shutil.copytree(RUNTIME, folder / "runtime", ignore=ignored)
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    run(folder / "venv/bin/python", "-m", "pip", "install", "--quiet", f"{folder / 'runtime'}[test]", cwd=folder)
    shutil.rmtree(folder / "runtime/hidiff_runtime")  # so that the tests meet the installed package, not the copy
    return folder


def test_nothing_else_is_installed(environment: Path) -> None:
    listed = run(environment / "venv/bin/python", "-m", "pip", "list", "--format", "json", cwd=environment)
    names = {entry["name"].lower().replace("_", "-") for entry in json.loads(listed.splitlines()[0])}
    assert {"hidiff-runtime", "numpy"} <= names
    assert not names & FOREIGN


def test_its_own_tests_of_being_alone_pass(environment: Path) -> None:
    """Every module is imported, and a toy bundle opened, checked, drawn from and served; the rest runs beside these."""
    out = run(environment / "venv/bin/python", "-m", "pytest", "-q", "-m", "alone", cwd=environment / "runtime")
    passed = re.search(r"(\d+) passed", out)
    assert passed is not None, out
    assert int(passed[1]) > 200


def test_the_installed_package_has_its_types_and_its_command(environment: Path) -> None:
    where = "import hidiff_runtime, pathlib; print(pathlib.Path(hidiff_runtime.__file__).parent)"
    package = Path(run(environment / "venv/bin/python", "-c", where, cwd=environment).strip())
    assert package.is_relative_to(environment / "venv")
    assert (package / "py.typed").is_file()
    assert "hidiff-run" in run(environment / "venv/bin/hidiff-run", "--version", cwd=environment)
