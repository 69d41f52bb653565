"""From a phase's float16 graph to the same graph in int8 or fp8."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from hidiff_export.child_process import run_child
from hidiff_export.errors import EngineError
from hidiff_export.graph.passes.linear_to_gemm import LinearToGemm
from hidiff_export.graph.passes.merge_reshapes import MergeReshapes
from hidiff_export.graph.passes.name_by_module import NameByModule
from hidiff_export.graph.passes.quantize_tensors import QuantizeTensors
from hidiff_export.graph.portable import load_graph, run_passes, save
from hidiff_export.graph.quantized_tensor import QuantizedTensor
from hidiff_export.quantization import worker
from hidiff_export.quantization.layers import quantized_layers
from hidiff_export.recipe.field_types import Precision
from hidiff_runtime.format import safetensors
from hidiff_runtime.onnxruntime_import import SWITCH

Inputs = Mapping[str, NDArray[Any]]
"""Every input of a graph, by name."""

KINDS = {Precision.INT8: ir.DataType.INT8, Precision.FP8: ir.DataType.FLOAT8E4M3FN}
"""What the quantized tensors of each precision are."""

QUIET = {SWITCH: "1"}
"""What the process of ModelOpt, which imports ONNX Runtime by itself, has in its environment."""

WORKER = ["-m", worker.__name__]
"""What Python runs to measure ranges."""

_ADVICE = "Choose precision float16, or report this with the versions that 'hidiff-export doctor' shows."


def check_quantizer() -> None:
    """Refuses early, before anything is written.

    Raises:
        EngineError: NVIDIA ModelOpt is not installed.
    """
    if importlib.util.find_spec("modelopt") is None:
        raise EngineError(
            "Precisions int8 and fp8 take NVIDIA ModelOpt, which is not installed.",
            advice="Run: pip install 'hidiff-export[quantization]'",
        )


def quantize_graph(graph: Path, evaluations: Sequence[Inputs], precision: Precision, quantized: Path) -> None:
    """Writes a quantized copy of a graph, over the same weight store.

    Convolutions and linear layers get ranges for their inputs, one for each tensor, and for their weights, one for each
    output channel; `hidiff_export.quantization.layers` says which. Ranges are constants of the graph.

    Args:
        graph: a portable float16 graph.
        evaluations: what to measure the ranges on; at least one.
        precision: int8 or fp8.
        quantized: the file to write, in the same folder.

    Raises:
        EngineError: NVIDIA ModelOpt failed.
        ExportError: a pass failed.
        OSError: a file cannot be written.
    """
    model = load_graph(graph)
    run_passes(model, _preparing_passes(), quantized.name)
    layers = quantized_layers(model.graph)
    prepared = quantized.with_suffix(".prepared.onnx")  # beside the weights, which it names relative to itself
    try:
        # ModelOpt leaves copies of the weights in the folder for temporary files.
        with tempfile.TemporaryDirectory(dir=quantized.parent, prefix="quantize.") as folder:
            save(model, prepared)
            tensors = _measure(prepared, evaluations, precision, layers, Path(folder))
    finally:
        prepared.unlink(missing_ok=True)
    _check_complete(tensors, layers, graph)
    run_passes(model, ir.passes.Sequential(QuantizeTensors(tensors, KINDS[precision]), NameByModule()), quantized.name)
    save(model, quantized)


def _check_complete(tensors: Sequence[QuantizedTensor], layers: Sequence[str], graph: Path) -> None:
    """Refuses what would compute some layers in float16: ModelOpt passes over tensors whose type it does not know."""
    found = {use for tensor in tensors for use in tensor.uses}
    missing = [name for name in layers if not {(name, 0), (name, 1)} <= found]
    if missing:
        raise EngineError(
            f"NVIDIA ModelOpt left {len(missing)} of {len(layers)} layers of {graph.name} as they were.",
            given=", ".join(missing[:3]),
            advice=_ADVICE,
        )


def _preparing_passes() -> ir.passes.Sequential:
    """Linear layers that read their weights as the store has them, so that each output channel has its own scale."""
    return ir.passes.Sequential(
        LinearToGemm(),
        MergeReshapes(),
        common.RemoveUnusedNodesPass(),
        NameByModule(),
    )


def _measure(
    graph: Path, evaluations: Sequence[Inputs], precision: Precision, layers: Sequence[str], folder: Path
) -> tuple[QuantizedTensor, ...]:
    """Asks ModelOpt; ``folder`` takes the inputs that it is asked with."""
    inputs = folder / "inputs.safetensors"
    safetensors.write(
        inputs,
        {
            f"{number}{worker.SEPARATOR}{name}": array
            for number, evaluation in enumerate(evaluations)
            for name, array in evaluation.items()
        },
    )
    request = {"graph": str(graph), "evaluations": str(inputs), "precision": precision.value, "layers": list(layers)}
    ended = run_child(WORKER, request, environment={"TMPDIR": str(folder), **QUIET})
    if ended.code != 0 or ended.answer.get("event") != "done":
        raise EngineError(
            f"NVIDIA ModelOpt cannot quantize {graph.name}.",
            given=f"exit code {ended.code}: {ended.words}",
            advice=_ADVICE,
        )
    return tuple(map(QuantizedTensor.from_json, ended.answer["tensors"]))
