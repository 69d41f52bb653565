"""Which layers are quantized, and which stay in float16, and why: the one table."""

from __future__ import annotations

import onnx_ir as ir

OPERATORS = frozenset({"Conv", "Gemm"})
"""Operators with weights. Attention has none: it stays one fused kernel on 16-bit factors, added up in float32."""


KEPT = {
    ("conv_in", "conv_out"): (
        "First and last: what is lost here is lost for the whole network, and four channels are next to no work."
    ),
    ("time_embedding", "time_emb_proj", "add_embedding"): (
        "Every block adds what comes of the timestep, and these work on one row for each picture: nothing to gain."
    ),
    ("conv_shortcut", "proj_in", "proj_out"): (
        "They carry the residual stream itself, so that their error stays in it at full size to the end; what other "
        "layers add to the stream is small beside it. 1x1 convolutions, a tenth of the work, worth 3 to 4 dB."
    ),
    ("downsamplers", "upsamplers"): (
        "They read the residual stream as it is. All other layers read what a normalization has levelled, so that one "
        "range serves every step and prompt; this one's follows the latents."
    ),
}
"""Names of modules, at any depth, that stay in float16: what quantizing them costs, and what it would gain."""


def quantized_layers(graph: ir.Graph) -> tuple[str, ...]:
    """Lists the names of the nodes to quantize, in order.

    Requires: nodes are named ``module/operator``, linear layers are ``Gemm``.
    """
    kept = {module for modules in KEPT for module in modules}
    return tuple(
        node.name
        for node in graph
        if node.domain == "" and node.op_type in OPERATORS and node.name and kept.isdisjoint(_modules(node.name))
    )


def _modules(name: str) -> list[str]:
    return name.rpartition("/")[0].split(".")
