"""Engines for ONNX Runtime: the portable graph with its operators, still pointing into the weight store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from hidiff_export.engines.protocol import PortableGraph, Report
from hidiff_export.graph.passes.attention_to_mha import AttentionToMha
from hidiff_export.graph.passes.base import MICROSOFT
from hidiff_export.graph.passes.group_norm_to_layer_norm import GroupNormToLayerNorm
from hidiff_export.graph.passes.linear_to_gemm import LinearToGemm
from hidiff_export.graph.passes.merge_reshapes import MergeReshapes
from hidiff_export.graph.passes.merge_transposes import MergeTransposes
from hidiff_export.graph.passes.name_by_module import NameByModule
from hidiff_export.graph.passes.silu_to_quick_gelu import SiluToQuickGelu
from hidiff_export.graph.passes.split_gemm import SplitGemm
from hidiff_export.graph.portable import load_graph, run_passes, save


class OnnxRuntimeBuilder:
    """Lowers portable graphs for ONNX Runtime, above all for its CPU provider."""

    name = "onnxruntime"

    def check(self) -> None:
        """Accepts everything: lowering takes no library of the backend."""

    def key(self) -> Any:
        """Returns nothing: the lowered graph is the same for every target and version."""
        return {}

    def engines(self, graphs: Sequence[PortableGraph]) -> tuple[Path, ...]:
        """Returns ``strided.onnxruntime.onnx`` beside ``strided.onnx``."""
        return tuple(graph.path.with_suffix(f".{self.name}.onnx") for graph in graphs)

    def build(self, graphs: Sequence[PortableGraph], report: Report) -> tuple[Path, ...]:
        """Writes the lowered graphs; see :class:`~hidiff_export.engines.protocol.Builder`."""
        engines = self.engines(graphs)
        for index, (graph, engine) in enumerate(zip(graphs, engines, strict=True)):
            report(index, len(graphs), graph.path.stem)
            lower(graph.path, engine)
        return engines


def lower(graph: Path, engine: Path) -> None:
    """Writes the portable graph ``graph`` as ONNX Runtime's, in the same folder. Raises ExportError."""
    model = load_graph(graph)
    model.graph.opset_imports[MICROSOFT] = 1
    run_passes(model, lowering_passes(), engine.name)
    save(model, engine)


def lowering_passes() -> ir.passes.Sequential:
    """Returns the passes from the portable graph to ONNX Runtime's."""
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
