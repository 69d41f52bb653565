"""The marker ``needs``: a test that wants a device or a library skips with the reason where there is none.

``@pytest.mark.needs("cuda", "tensorrt")`` names what a test needs. A machine that is meant to have it says so, with
``HIDIFF_REQUIRE=cuda,tensorrt``: there the test fails instead of skipping. Both test trees import the hook from here.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

REQUIRE = "HIDIFF_REQUIRE"
TRITON_VENV = "HIDIFF_TRITON_VENV"


def _cuda() -> str:
    """Asks the driver itself, which makes no context and needs no Python package."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no NVIDIA driver ({error})"
    count = ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code:
        return f"the NVIDIA driver answers with error {code}"
    return "" if count.value else "the NVIDIA driver finds no device"


def _module(name: str) -> Callable[[], str]:
    def missing() -> str:
        try:
            import_module(name)
        except Exception as error:  # a library that is there but does not load may raise anything
            return f"{name} does not import ({error})"
        return ""

    return missing


def _installed(name: str) -> Callable[[], str]:
    """Looks for a library without importing it, which takes long or starts something."""

    def missing() -> str:
        return "" if find_spec(name) is not None else f"{name} is not installed"

    return missing


def _clip_vocabulary() -> str:
    """Looks for the file without importing the package, which needs more than is installed with it."""
    if clip_vocabulary() is None:
        return "pip install --no-deps open_clip_torch, which CLIP's byte-pair vocabulary comes with"
    return ""


def clip_vocabulary() -> Path | None:
    """CLIP's byte-pair vocabulary, as the package open_clip_torch carries it; None where that is not installed."""
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    return path if path.is_file() else None


def _private_mounts() -> str:
    """Whether a process may mount in namespaces of its own, which some containers do not allow."""
    try:
        done = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "true"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        return str(error)
    return done.stderr.strip()


def _tritonserver() -> str:
    folder = triton_folder()
    server = folder / "bin/tritonserver"
    if not server.is_file():
        return f"no {server}; 'make install' makes it, or {TRITON_VENV} names its environment"
    version = folder.parents[2].name.removeprefix("python")
    stub = folder / "python_backend_stubs" / version
    return "" if stub.is_dir() else f"Triton's Python backend is for other versions than Python {version}"


def triton_folder() -> Path:
    """The folder of the server, its backends and their stubs in the environment that has them; it may be missing."""
    named = os.environ.get(TRITON_VENV)
    environment = Path(named) if named else Path(__file__).parents[2] / ".venv-triton"
    found = sorted(environment.glob("lib/python3*/site-packages/pytriton/tritonserver"))
    return found[-1] if found else environment / "tritonserver"


def _chromium() -> str:
    missing = _module("playwright")()
    if missing:
        return missing
    return "" if chromium() is not None else "no chromium: apt-get install chromium"


def chromium() -> str | None:
    """The browser that the machine has; playwright's own, which it would download, is never used."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def _deploy_tools() -> str:
    """Looks for them without importing any: Helm's brings a runtime with threads and signal handlers of its own."""
    modules = ("helm_python", "kubernetes_validate", "compose_spec", "promql_parser")
    missing = [name for name in modules if find_spec(name) is None]
    if hadolint() is None:
        missing.append("hadolint")
    return f"no {', '.join(missing)}; hidiff-export's extra dev has them for Linux on x86-64" if missing else ""


def hadolint() -> str | None:
    """The linter of Dockerfiles, beside this Python or on the path."""
    folders = (str(Path(sys.executable).parent), os.environ.get("PATH", ""))
    return shutil.which("hadolint", path=os.pathsep.join(folders))


def _promtool() -> str:
    return "" if shutil.which("promtool") else "no promtool, which comes with Prometheus"


def _onnxruntime_cuda() -> str:
    missing = _module("onnxruntime")() or _cuda()
    if missing:
        return missing
    providers = import_module("onnxruntime").get_available_providers()
    return "" if "CUDAExecutionProvider" in providers else f"onnxruntime has {', '.join(providers)} alone"


def _torch_cuda() -> str:
    missing = _module("torch")()
    if missing:
        return missing
    return "" if import_module("torch").cuda.is_available() else "torch finds no CUDA device"


KNOWN: Mapping[str, Callable[[], str]] = {
    "cuda": _cuda,
    "cuda-python": _module("cuda.bindings.runtime"),
    "tensorrt": _module("tensorrt"),
    "tensorrt-rtx": _module("tensorrt_rtx"),
    "onnxruntime-cuda": _onnxruntime_cuda,
    "torch-cuda": _torch_cuda,
    "clip-vocabulary": _clip_vocabulary,
    "pyarrow": _module("pyarrow"),
    "yaml": _module("yaml"),
    "ray": _installed("ray"),
    "matplotlib": _installed("matplotlib"),
    "moto": _installed("moto"),
    "chromium": _chromium,
    "tritonserver": _tritonserver,
    "private-mounts": _private_mounts,
    "deploy-tools": _deploy_tools,
    "promtool": _promtool,
}
"""What a test can need, and what finds out what is missing; the empty text where nothing is."""


@cache
def missing(name: str) -> str:
    """Why ``name`` is not here; empty if it is. Raises UsageError for a name that is not one of `KNOWN`."""
    if name not in KNOWN:
        raise pytest.UsageError(f"needs {name!r}: there is no such requirement. Use one of {', '.join(KNOWN)}.")
    return KNOWN[name]()


def required() -> tuple[str, ...]:
    """What this machine is meant to have. Raises UsageError for a name that is not one of `KNOWN`."""
    names = tuple(name for part in os.environ.get(REQUIRE, "").split(",") if (name := part.strip()))
    unknown = [name for name in names if name not in KNOWN]
    if unknown:
        raise pytest.UsageError(f"{REQUIRE}={','.join(names)}: {unknown[0]!r} is not one of {', '.join(KNOWN)}.")
    return names


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture: skips a test whose needs are not met, or fails it where the environment requires them."""
    wanted = dict.fromkeys(name for mark in item.iter_markers("needs") for name in mark.args)
    reasons = {name: reason for name in wanted if (reason := missing(name))}
    if not reasons:
        return
    text = "; ".join(f"needs {name}: {reason}" for name, reason in reasons.items())
    if set(reasons) & set(required()):
        pytest.fail(f"{text} ({REQUIRE}={os.environ[REQUIRE]})", pytrace=False)
    pytest.skip(text)
