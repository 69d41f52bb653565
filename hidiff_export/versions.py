"""The versions of the tools that take part in a build, without importing any of them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from hidiff_runtime import __version__

TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def tool_versions() -> dict[str, str]:
    """Version by package name, of those installed."""
    found = {"hidiff-export": __version__, "hidiff-runtime": __version__}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
