from __future__ import annotations

import subprocess
import sys

import pytest

import hidiff_runtime

FOREIGN = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "hidiff_export", "tensorrt", "safetensors")
FOREIGN += ("PIL", "tokenizers", "fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client")


def loaded_after(code: str) -> set[str]:
    """The outermost modules that a fresh interpreter has loaded after ``code``."""
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", f"{code}; {report}"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_no_library() -> None:
    assert not loaded_after("import hidiff_runtime") & {*FOREIGN, "numpy"}


def test_every_public_name_is_there_and_loads_numpy_alone() -> None:
    names = ", ".join(name for name in hidiff_runtime.__all__ if not name.startswith("_"))
    loaded = loaded_after(f"from hidiff_runtime import {names}")
    assert "numpy" in loaded
    assert not loaded & set(FOREIGN)


def test_the_command_line_loads_no_library_before_its_command() -> None:
    assert not loaded_after("import hidiff_runtime.cli") & {*FOREIGN, "numpy"}


def test_public_names_are_listed_and_others_refused() -> None:
    assert set(hidiff_runtime.__all__) <= set(dir(hidiff_runtime))
    for name in hidiff_runtime.__all__:
        assert getattr(hidiff_runtime, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = hidiff_runtime.nothing
