"""The form in which a portable graph is judged: what it says, computed as a good engine computes it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_ir.passes import common

from hidiff_export.errors import BundleError
from hidiff_export.graph.passes.attention_to_mha import AttentionToMha
from hidiff_export.graph.passes.base import MICROSOFT
from hidiff_export.graph.passes.emulate_half import EmulateHalf
from hidiff_export.graph.passes.group_norm_to_layer_norm import GroupNormToLayerNorm
from hidiff_export.graph.portable import load_graph, run_passes, save


def write_rounded_copy(graph: Path, path: Path) -> None:
    """Writes the form of a portable graph that ONNX Runtime judges it by.

    A half-precision graph becomes a float32 one that rounds (:class:`EmulateHalf`). In every precision group
    normalization and attention are lowered for ONNX Runtime: its own GroupNormalization takes a variance as the mean of
    squares less the square of the mean, and loses the digits that both share; its own Attention holds all scores, and
    in float16 overflows where no engine does. Either would be a fault of that kernel, not of the graph.

    Args:
        graph: as the bundle holds it, or as it was before it was quantized.
        path: of the ONNX file, which finds its weights beside it under the names they have beside ``graph``.

    Raises:
        BundleError: ``graph`` is no ONNX file.
        ExportError: a pass found something that portable graphs do not have.
        OSError: a file cannot be read or written.
    """
    try:
        model = load_graph(graph)
    except (DecodeError, ValueError) as error:
        raise BundleError(
            "A portable graph cannot be read.", given=f"{graph}: {error}", advice="Build the bundle again."
        ) from error
    model.graph.opset_imports[MICROSOFT] = 1
    run_passes(model, rounded_copy_passes(), path.name)
    save(model, path)


def rounded_copy_passes() -> ir.passes.Sequential:
    """Lists the passes from the portable graph to the form that it is judged by."""
    return ir.passes.Sequential(
        EmulateHalf(),
        AttentionToMha(),
        GroupNormToLayerNorm(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )
