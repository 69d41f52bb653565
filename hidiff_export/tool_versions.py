"""The versions of the tools that take part in a build, without importing any of them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from hidiff_runtime.version import __version__

EXPORTERS = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
"""What weights, tables, graphs and reference depend on."""

ENGINE_BUILDERS = ("tensorrt", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "polygraphy", "cuda-python")
"""What engines alone depend on: another version builds them again, and nothing else."""

QUANTIZERS = ("nvidia-modelopt",)
"""What quantized graphs depend on beside the exporters."""


def tool_versions(names: tuple[str, ...] = (*EXPORTERS, *ENGINE_BUILDERS, *QUANTIZERS)) -> dict[str, str]:
    """Returns version by package name, of those installed."""
    found = {"hidiff-export": __version__, "hidiff-runtime": __version__}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
