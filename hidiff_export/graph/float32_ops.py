"""Where a float16 or bfloat16 graph computes in float32, and why: the one table.

TensorRT runs the types that stand in the graph, and the types of a product's factors also say in which type it adds
up. So each place that needs float32 has to say so in the graph that TensorRT is given, unless its kernels are known to
compute in float32 on 16-bit tensors too. What is not in the table (convolutions, linear layers, activations, residual
sums) runs in the recipe's precision, as it does in PyTorch. ``benchmarks/normalizations.py`` has the figures.

ONNX Runtime needs none of this: its kernels add up in float32 whatever the type. So only the lowering for TensorRT
applies the table (:class:`~hidiff_export.graph.passes.float32_operations.Float32Operations`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from hidiff_export.recipe.field_types import Precision


class Means(Enum):
    """How an operator comes to compute in float32."""

    CASTS = "its inputs are cast to float32 and its output back"
    KERNELS = "the kernels add up in float32 whatever the types, and stash_type may state nothing else"
    AS_TRACED = "the network itself computes it in float32"


@dataclass(frozen=True)
class Float32Operation:
    """Operators that compute in float32 in every graph, whatever the precision.

    Args:
        name: of the part of the network.
        operators: ONNX operators.
        means: how they are made to.
        reason: what goes wrong otherwise; decibels are the signal-to-noise ratio against float64.
    """

    name: str
    operators: frozenset[str]
    means: Means
    reason: str


FLOAT32_OPERATIONS = (
    Float32Operation(
        "attention",
        frozenset({"Attention", "Softmax"}),
        Means.CASTS,
        "SD2.1's products of queries and keys exceed float16's 65504: infinities, then black pictures. In every "
        "family, float16 factors make TensorRT add up in float16, which over the 16384 keys of a window leaves 47 "
        "dB where float32 leaves 74 dB. And the scale is rounded to the factors' type: 1/sqrt(40) in bfloat16 is "
        "wrong by 0.4%, 45 dB. With casts TensorRT still runs one fused kernel on 16-bit factors, but adds up in "
        "float32 and scales exactly.",
    ),
    Float32Operation(
        "layer normalization",
        frozenset({"LayerNormalization"}),
        Means.CASTS,
        "16-bit sums over a token's 320 to 1280 channels leave 68 dB in float16 where float32 sums leave 73, 46 where "
        "the mean is 20 times the spread; 50 and 29 of 55 in bfloat16: too little to be seen as a fault. stash_type "
        "asks in vain: TensorRT 11 and TensorRT-RTX have nowhere to put it. The casts cost nothing: TensorRT takes "
        "them into the one kernel that it makes of a normalization anyway.",
    ),
    Float32Operation(
        "group normalization",
        frozenset({"GroupNormalization"}),
        Means.KERNELS,
        "A group's sum of squares passes float16's 65504: 16-bit sums over the 163840 elements of a group at 1024 "
        "pixels leave 0 dB or NaN where float32 sums leave 73 dB; 41 dB of 55 in bfloat16, 1 where the mean is 20 "
        "times the spread. TensorRT-RTX's kernels take them in float32, as their source says, which a plan carries; "
        "were it otherwise elsewhere, a float16 plan's first check would fail. Casts would take the fusion with the "
        "activation behind: a quarter more kernels and scratch memory, float32 through memory between the two.",
    ),
    Float32Operation(
        "time projection",
        frozenset({"Sin", "Cos"}),
        Means.AS_TRACED,
        "A timestep of 999 is known to 0.5 in float16, to 4 in bfloat16, and the fastest sinusoid turns once in 6."
        " SDXL's time_ids, sizes in pixels up to 8192, likewise; text_embeds join them in float32, before both are"
        " rounded.",
    ),
)

WHOLE_NETWORKS: Mapping[str, str] = {
    "vae": "Activations of SDXL's decoder exceed float16's 65504 in its convolutions: no single ones are enough.",
}
"""Networks that are float32 from end to end, weights and all, with the reason."""


def precision_of(network: str, precision: Precision) -> Precision:
    """Gives the precision of a network's weights, and of its graph before it is quantized, in a recipe of this one.

    bfloat16 has float32's range, so that `WHOLE_NETWORKS` stay in it.
    """
    whole = network in WHOLE_NETWORKS and precision.stored is Precision.FLOAT16
    return Precision.FLOAT32 if whole else precision.stored


def float32_operation_of(operator: str) -> Float32Operation | None:
    """Finds the float32 operation that an operator of ONNX's own domain belongs to."""
    return next((operation for operation in FLOAT32_OPERATIONS if operator in operation.operators), None)
