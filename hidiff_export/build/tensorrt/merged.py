"""``layout: merged``: all phases as branches of one engine."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common

from hidiff_export.engines.tensorrt.lowering import lower
from hidiff_export.graph.merge import merge
from hidiff_export.graph.passes.attention_in_branches import AttentionInBranches
from hidiff_export.graph.portable import run_passes


def lower_merged(models: Mapping[str, ir.Model]) -> ir.Model:
    """One graph for TensorRT of all phases, which :func:`~hidiff_export.graph.merge.merge` describes.

    Args:
        models: the phases' portable graphs by name, in running order; they are taken apart.

    Raises:
        ExportError: a phase cannot be lowered, or the phases do not agree in inputs, outputs and weights.
    """
    for model in models.values():
        lower(model)
        run_passes(model, ir.passes.Sequential(AttentionInBranches(), common.RemoveUnusedNodesPass()))
    return merge(models)
