"""What a UNet or ControlNet costs by its configuration: parameters, and floating-point operations in a phase.

Two operations for each multiply-add of a convolution, a linear layer or an attention product, which is how
``torch.utils.flop_counter`` counts; norms, activations and resizing are left out. Everything is for one latent of the
batch. The architectures are those of diffusers' ``UNet2DConditionModel`` and ``ControlNetModel``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hidiff_export.families.geometry import Feature, UNetGeometry, WindowShape
from hidiff_export.families.graph_io import PROMPT_TOKENS
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.families.reuse_depths import Cut
from hidiff_runtime.phases import Phase, PhaseKind

_WINDOWS = 4
_CONTROL_IMAGE_CHANNELS = 3
_STOCK = Phase(PhaseKind.WINDOWED)


@dataclass(frozen=True)
class Cost:
    """Of a layer or a network.

    Args:
        parameters: how many weights and biases.
        flops: floating-point operations of one evaluation.
    """

    parameters: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.flops + other.flops)


def unet_cost(config: Mapping[str, Any], layout: Layout, geometry: UNetGeometry, cut: Cut | None = None) -> Cost:
    """Returns cost of a UNet in the phase of ``geometry``; the stock UNet's, with a layout without windows.

    Args:
        config: of diffusers' ``UNet2DConditionModel``.
        layout: where the phase's changes go.
        geometry: of the phase.
        cut: of a shallow evaluation, which computes its layers alone.
    """
    return sum(_unet(config, layout, geometry, cut), Cost())


def stock_geometry(
    config: Mapping[str, Any], layout: Layout, latent_height: int, latent_width: int
) -> tuple[Layout, UNetGeometry]:
    """Returns layout and geometry of the UNet as it was published, without HiDiffusion."""
    stock = layout.without_windows()
    return stock, UNetGeometry.of(config, stock, _STOCK, latent_height, latent_width)


def controlnet_cost(
    config: Mapping[str, Any], unet_config: Mapping[str, Any], layout: Layout, height: int, width: int
) -> Cost:
    """Returns cost of a ControlNet.

    Args:
        config: of diffusers' ``ControlNetModel``.
        unet_config: of the UNet beside it.
        height: of the latents that the ControlNet sees; ``width`` likewise.
    """
    layout, geometry = stock_geometry(unet_config, layout, height, width)
    return sum(_controlnet(config, layout, geometry), Cost())


def _dense(inputs: int, outputs: int, positions: int = 1, *, kernel: int = 1, bias: bool = True) -> Cost:
    """Returns a linear layer, or a convolution of a square kernel, at ``positions`` output positions."""
    weights = inputs * outputs * kernel**2
    return Cost(weights + outputs * bias, 2 * weights * positions)


def _norm(channels: int) -> Cost:
    return Cost(2 * channels)


def _unet(config: Mapping[str, Any], layout: Layout, geometry: UNetGeometry, cut: Cut | None = None) -> Iterator[Cost]:
    yield from _embeddings(config)
    for name, cost in _features(config, layout, geometry, geometry.features):
        if cut is None or name in cut.computed:
            yield cost
    yield _norm(config["block_out_channels"][0])


def _controlnet(config: Mapping[str, Any], layout: Layout, geometry: UNetGeometry) -> Iterator[Cost]:
    yield from _embeddings(config)
    half = [feature for feature in geometry.features if not feature.name.startswith(("up_blocks", "conv_out"))]
    for _, cost in _features(config, layout, geometry, half):
        yield cost
    for channels, height, width in (*geometry.skips, geometry.mid):
        yield _dense(channels, channels, height * width)
    yield from _control_image(config, geometry.latent_height * geometry.latent_width)


def _control_image(config: Mapping[str, Any], latent_positions: int) -> Iterator[Cost]:
    """Yields the convolutions that bring the control image from pixels to the latents' size."""
    widths = config.get("conditioning_embedding_out_channels", (16, 32, 96, 256))
    scale = 4 ** (len(widths) - 1)
    yield _dense(_CONTROL_IMAGE_CHANNELS, widths[0], latent_positions * scale, kernel=3)
    for inner, outer in pairwise(widths):
        yield _dense(inner, inner, latent_positions * scale, kernel=3)
        scale //= 4
        yield _dense(inner, outer, latent_positions * scale, kernel=3)
    yield _dense(widths[-1], config["block_out_channels"][0], latent_positions, kernel=3)


def _embeddings(config: Mapping[str, Any]) -> Iterator[Cost]:
    base = config["block_out_channels"][0]
    inputs = [base]
    if config.get("addition_embed_type") == "text_time":
        inputs.append(config["projection_class_embeddings_input_dim"])
    for width in inputs:
        yield _dense(width, 4 * base)
        yield _dense(4 * base, 4 * base)


def _features(
    config: Mapping[str, Any], layout: Layout, geometry: UNetGeometry, features: Sequence[Feature]
) -> Iterator[tuple[str, Cost]]:
    """Yields name and cost of what computes each feature map; it enters with as many channels as the one before had."""
    windows = dict(zip(layout.windowed_blocks, geometry.windows, strict=True))
    skips = [channels for channels, _, _ in geometry.skips]
    channels = config["in_channels"]
    for feature in features:
        part = feature.name.split(".")
        positions = feature.height * feature.width
        if "attentions" in part:
            cost = sum(_transformer(config, feature, windows), Cost())
        elif "resnets" in part:
            concatenated = skips.pop() if part[0] == "up_blocks" else 0
            cost = sum(_resnet(config, channels + concatenated, feature.channels, positions), Cost())
        else:
            cost = _dense(channels, feature.channels, positions, kernel=3)
        yield feature.name, cost
        channels = feature.channels


def _resnet(config: Mapping[str, Any], inputs: int, outputs: int, positions: int) -> Iterator[Cost]:
    yield _norm(inputs)
    yield _dense(inputs, outputs, positions, kernel=3)
    yield _dense(4 * config["block_out_channels"][0], outputs)
    yield _norm(outputs)
    yield _dense(outputs, outputs, positions, kernel=3)
    if inputs != outputs:
        yield _dense(inputs, outputs, positions)


def _layers_of(config: Mapping[str, Any], name: str) -> int:
    layers = config.get("transformer_layers_per_block", 1)
    if isinstance(layers, int):
        return layers
    block = name.split(".")
    if block[0] == "mid_block":
        return int(layers[-1])
    return int((layers if block[0] == "down_blocks" else layers[::-1])[int(block[1])])


def _transformer(config: Mapping[str, Any], feature: Feature, windows: Mapping[str, WindowShape]) -> Iterator[Cost]:
    channels, tokens = feature.channels, feature.height * feature.width
    yield _norm(channels)
    yield _dense(channels, channels, tokens)
    for layer in range(_layers_of(config, feature.name)):
        window = windows.get(f"{feature.name}.transformer_blocks.{layer}")
        yield from _self_attention(channels, tokens, window)
        yield from _cross_attention(channels, tokens, config["cross_attention_dim"])
        yield _norm(channels)
        yield _dense(channels, 8 * channels, tokens)
        yield _dense(4 * channels, channels, tokens)
    yield _dense(channels, channels, tokens)


def _self_attention(channels: int, tokens: int, window: WindowShape | None) -> Iterator[Cost]:
    sequences = 1
    if window is not None:
        sequences, tokens = _WINDOWS, math.prod(window.padded)
    yield _norm(channels)
    for _ in range(3):
        yield _dense(channels, channels, tokens, bias=False)
    yield _attention_products(channels, tokens, tokens // sequences)
    yield _dense(channels, channels, tokens)


def _cross_attention(channels: int, tokens: int, text_channels: int) -> Iterator[Cost]:
    yield _norm(channels)
    yield _dense(channels, channels, tokens, bias=False)
    for _ in range(2):
        yield _dense(text_channels, channels, PROMPT_TOKENS, bias=False)
    yield _attention_products(channels, tokens, PROMPT_TOKENS)
    yield _dense(channels, channels, tokens)


def _attention_products(channels: int, queries: int, keys: int) -> Cost:
    """Scores and their product with the values, each ``queries x keys x channels`` over all heads."""
    return Cost(flops=2 * math.prod((2, queries, keys, channels)))
