"""Engines for ONNX Runtime: the portable graph with its operators, still pointing into the weight store."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from hidiff_export.graph.passes.attention_to_mha import AttentionToMha
from hidiff_export.graph.passes.base import MICROSOFT
from hidiff_export.graph.passes.group_norm_to_layer_norm import GroupNormToLayerNorm
from hidiff_export.graph.passes.linear_to_gemm import LinearToGemm
from hidiff_export.graph.passes.merge_reshapes import MergeReshapes
from hidiff_export.graph.passes.merge_transposes import MergeTransposes
from hidiff_export.graph.passes.name_by_module import NameByModule
from hidiff_export.graph.passes.silu_to_quick_gelu import SiluToQuickGelu
from hidiff_export.graph.passes.split_gemm import SplitGemm
from hidiff_export.graph.portable import run_passes, save


class OnnxRuntimeBuilder:
    """Lowers portable graphs for ONNX Runtime, above all for its CPU provider."""

    name = "onnxruntime"

    def engine_path(self, graph: Path) -> Path:
        """``strided.onnxruntime.onnx`` beside ``strided.onnx``."""
        return graph.with_suffix(f".{self.name}.onnx")

    def build(self, graph: Path, engine: Path) -> None:
        """Writes the lowered graph; see :class:`~hidiff_export.build.protocol.Builder`."""
        model = ir.load(graph)
        model.graph.opset_imports[MICROSOFT] = 1
        run_passes(model, lowering_passes())
        save(model, engine)


def lowering_passes() -> ir.passes.Sequential:
    """From the portable graph to ONNX Runtime's."""
    return ir.passes.Sequential(
        AttentionToMha(),
        LinearToGemm(),
        SplitGemm(),
        GroupNormToLayerNorm(),
        SiluToQuickGelu(),
        MergeTransposes(),
        MergeReshapes(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        NameByModule(),
        common.RemoveUnusedOpsetsPass(),
    )
