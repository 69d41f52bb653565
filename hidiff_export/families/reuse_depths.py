"""Where a UNet is cut so that its outermost layers run alone, over deep features of an earlier evaluation. No torch.

Layers are counted as DeepCache (https://arxiv.org/abs/2312.00858) counts them: one is a resnet with its attention, if
it has any; on the way down conv_in and each downsampler are layers of their own, since each makes a skip connection;
on the way up an upsampler belongs to the layer before it. Depth d is its ``cache_branch_id`` d - 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hidiff_export.errors import InputError
from hidiff_export.families.family import Family
from hidiff_export.families.geometry import Feature, UNetGeometry
from hidiff_runtime.reused_features import DEEP_FEATURES, Reuse

DEPTHS = {family: tuple(range(1, 7)) for family in Family}
"""The depths that each family has: those of its two outermost levels, three layers each. Deeper ones would save little
of an evaluation and hold the middle block's neighbors still."""


@dataclass(frozen=True)
class Cut:
    """What a shallow evaluation computes.

    Args:
        depth: layers on the way up, counted from the output; as many skip connections come from the way down.
        source: the module whose output is the deep feature.
        first: the module that the deep feature enters, once the skip connection is concatenated.
        computed: every convolution, resnet, attention and sampler that is computed.
    """

    depth: int
    source: str
    first: str
    computed: frozenset[str]

    @classmethod
    def of(cls, config: Mapping[str, Any], depth: int) -> Cut:
        """Returns the cut at ``depth``.

        Args:
            config: of diffusers' ``UNet2DConditionModel``.

        Raises:
            InputError: the UNet has no layer below those, from which deep features could come.
        """
        down, up = list(_down_layers(config)), list(_up_layers(config))
        if not 1 <= depth < len(up):
            raise InputError(
                f"A UNet of {len(up)} layers on the way up has no deep features at this depth.",
                given=depth,
                advice=f"Choose a depth of 1 to {len(up) - 1}.",
            )
        names = (name for layer in (*down[:depth], *up[-depth:], ("conv_out",)) for name in layer)
        return cls(depth, up[-depth - 1][-1], up[-depth][0], frozenset(names))

    def deep_features(self, geometry: UNetGeometry) -> Feature:
        """Returns the deep feature's name, channels, height and width in the phase of ``geometry``.

        After the restored attention it has the restored size: that of the layer which it enters.
        """
        (source,) = (feature for feature in geometry.features if feature.name == self.source)
        height, width = geometry.size_of(self.first)
        return replace(source, name=DEEP_FEATURES, height=height, width=width)


def reuse_error(reuse: Reuse, family: Family) -> InputError | None:
    """Returns what is wrong with reusing features so in a UNet of this family, if anything is."""
    if reuse.every < 2:
        return InputError(
            "Features that are computed at every evaluation are never reused.",
            given=f"every {reuse.every}",
            advice="Compute them every 2 evaluations, or every 3.",
        )
    if reuse.depth not in DEPTHS[family]:
        return InputError(
            f"{family.value} has no features to be reused at this depth.",
            given=f"depth {reuse.depth}",
            advice=f"Choose one of {', '.join(map(str, DEPTHS[family]))}.",
        )
    return None


def _down_layers(config: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yields the modules of each layer on the way down, one layer for each skip connection."""
    yield ("conv_in",)
    types = config["down_block_types"]
    for block, kind in enumerate(types):
        for layer in range(config["layers_per_block"]):
            yield _layer(f"down_blocks.{block}", kind, layer)
        if block < len(types) - 1:
            yield (f"down_blocks.{block}.downsamplers.0",)


def _up_layers(config: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yields the modules of each layer on the way up; each takes one skip connection, the last made first."""
    types = config["up_block_types"]
    last = config["layers_per_block"]
    for block, kind in enumerate(types):
        for layer in range(last + 1):
            upsamples = layer == last and block < len(types) - 1
            upsampler = (f"up_blocks.{block}.upsamplers.0",) if upsamples else ()
            yield *_layer(f"up_blocks.{block}", kind, layer), *upsampler


def _layer(block: str, kind: str, layer: int) -> tuple[str, ...]:
    resnet = f"{block}.resnets.{layer}"
    return (resnet, f"{block}.attentions.{layer}") if kind.startswith("CrossAttn") else (resnet,)
