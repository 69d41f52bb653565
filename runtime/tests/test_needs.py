"""The marker ``needs``, in a pytest of its own: a requirement that is here, one that is not, one that nobody knows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import needs
import pytest

CONFTEST = """
import needs
from needs import pytest_runtest_setup
needs.KNOWN = {"here": lambda: "", "cuda": lambda: "no driver", "tensorrt": lambda: "not installed"}
"""
TESTS = """
import pytest

@pytest.fixture
def device():
    raise RuntimeError("reached the device")

@pytest.mark.needs("here")
def test_runs(): pass

def test_needs_nothing(): pass

@pytest.mark.needs("here", "cuda")
def test_device(device): pass

@pytest.mark.needs("tensorrt")
def test_library(): pass
"""


def run(folder: Path, require: str | None = None, tests: str = TESTS) -> tuple[int, str]:
    """The exit code and the summary of a pytest whose machine has ``here`` alone."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = needs(*names)\n")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "HIDIFF", "COV"))
    }
    environment["PYTHONPATH"] = str(Path(needs.__file__).parent)
    if require is not None:
        environment[needs.REQUIRE] = require
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--strict-markers", str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def test_it_skips_with_the_reason_before_any_fixture(tmp_path: Path) -> None:
    code, output = run(tmp_path)
    assert code == 0, output
    assert "2 passed, 2 skipped" in output
    assert "needs cuda: no driver" in output
    assert "needs tensorrt: not installed" in output


def test_it_fails_where_the_environment_requires_it(tmp_path: Path) -> None:
    code, output = run(tmp_path, "cuda")
    assert code == 1, output
    assert "2 passed, 1 skipped, 1 error" in output
    assert "needs cuda: no driver (HIDIFF_REQUIRE=cuda)" in output
    code, output = run(tmp_path, "cuda, tensorrt")
    assert "2 passed, 2 errors" in output, output


def test_what_is_here_is_not_missed(tmp_path: Path) -> None:
    code, output = run(tmp_path, "here")
    assert code == 0, output
    assert "2 passed, 2 skipped" in output


@pytest.mark.parametrize("where", ["mark", "environment"])
def test_an_unknown_name_is_an_error(tmp_path: Path, where: str) -> None:
    if where == "mark":
        code, output = run(tmp_path, tests=TESTS.replace('"tensorrt"', '"tensorflow"'))
    else:
        code, output = run(tmp_path, "tensorflow")
    assert code != 0, output
    assert "tensorflow" in output
    assert "cuda" in output


def test_the_driver_is_asked_here() -> None:
    assert isinstance(needs.missing("cuda"), str)
