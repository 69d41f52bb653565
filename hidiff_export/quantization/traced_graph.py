"""Where the graph lies that a quantized one is made from."""

from __future__ import annotations

from pathlib import Path

from hidiff_export.recipe.field_types import Precision


def traced_graph(graph: Path, precision: Precision) -> Path:
    """Finds the graph as it is traced: ``strided.float16.onnx`` for a quantized ``strided.onnx``, else that itself."""
    return graph.with_suffix(f".{precision.stored.value}.onnx") if precision.quantized else graph
