from __future__ import annotations

import subprocess
import sys

import pytest

import hidiff_runtime

FOREIGN = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "openvino",
    "hidiff_export",
    "tensorrt",
    "safetensors",
)
FOREIGN += ("PIL", "tokenizers", "fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client")

pytestmark = pytest.mark.alone

EVERY_MODULE = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    sys.modules[name] = None  # an import of it fails, as where it is not installed
import hidiff_runtime
for module in pkgutil.walk_packages(hidiff_runtime.__path__, "hidiff_runtime."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            print(module.name, error.name)
        else:
            print(module.name, "imported")
"""
ABSENT = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "hidiff_export", "safetensors")
ABSENT += ("tensorrt", "tensorrt_rtx", "cuda", "ray", "triton_python_backend_utils")


def loaded_after(code: str) -> set[str]:
    """The outermost modules that a fresh interpreter has loaded after ``code``."""
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", f"{code}; {report}"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_no_library() -> None:
    assert not loaded_after("import hidiff_runtime") & {*FOREIGN, "numpy"}


def imported(*absent: str) -> dict[str, str]:
    """What comes of importing each module of the package where these libraries are missing: the one that it lacks."""
    done = subprocess.run([sys.executable, "-c", EVERY_MODULE, *absent], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


def test_every_module_but_those_of_triton_imports_where_nothing_else_is_installed() -> None:
    found = imported(*ABSENT)
    assert len(found) > 100
    lacking = {name: library for name, library in found.items() if library != "imported"}
    assert set(lacking.values()) == {"triton_python_backend_utils"}
    assert all(name.startswith("hidiff_runtime.serving.triton.") for name in lacking)
    assert (
        imported("PIL", "numpy")["hidiff_runtime.sampling.scheduler_table"] == "numpy"
    )  # the control: what it needs is missed


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
