"""Names, shapes and types of what goes in and out of a graph, a phase's or the ControlNet's: the one list that
capturing, recording and the manifest share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hidiff_export.errors import InputError
from hidiff_export.families.family import PIXELS_PER_LATENT
from hidiff_export.families.geometry import UNetGeometry, control_latent
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.families.reuse_depths import Cut
from hidiff_runtime.format.manifest import TensorSpec
from hidiff_runtime.format.validation import CONDITIONING_SCALE, CONTROL_IMAGE
from hidiff_runtime.phases import Phase, PhaseKind
from hidiff_runtime.reused_features import DEEP_FEATURES

PROMPT_TOKENS = 77
"""Length of a prompt's embedding, or of one chunk of it: what CLIP's tokenizer pads to."""

TIME_IDS = 6
"""SDXL's micro-conditioning: original size, crop and target size."""

DOWN_RESIDUAL = "down_residual_"
MID_RESIDUAL = "mid_residual"


def down_residual_name(index: int) -> str:
    """Returns name of the ControlNet's residual for skip connection ``index``."""
    return f"{DOWN_RESIDUAL}{index:02d}"


def control_residuals(
    config: Mapping[str, Any], layout: Layout, latent_height: int, latent_width: int, model_batch: int
) -> tuple[TensorSpec, ...]:
    """Returns what a ControlNet beside this UNet gives: a residual for each skip connection, then the middle block's.

    Args:
        config: of the UNet.
        latent_height: of the UNet's latents; the ControlNet sees :func:`control_latent` of them.
        model_batch: latents of one evaluation, the negative prompt's included.
    """
    size = control_latent(latent_height, latent_width)
    stock = UNetGeometry.of(config, layout, Phase(PhaseKind.WINDOWED), *size)
    down = (TensorSpec(down_residual_name(i), (model_batch, *skip), "float32") for i, skip in enumerate(stock.skips))
    return (*down, TensorSpec(MID_RESIDUAL, (model_batch, *stock.mid), "float32"))


def phase_inputs(
    config: Mapping[str, Any],
    layout: Layout,
    phase: Phase,
    latent_height: int,
    latent_width: int,
    model_batch: int,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    own_shifts: bool = False,
    reuse_depth: int | None = None,
) -> tuple[TensorSpec, ...]:
    """Returns the inputs of a phase's graph, in its order.

    ``latents`` (scaled by the sampler), ``timestep``, ``prompt_embeds``; ``window_shifts``, 0 to 3 for each windowed
    block, if there are any, as :func:`shifts_shape` says; for SDXL's architecture ``text_embeds`` and ``time_ids``;
    where the phase has control, ``down_residual_00`` and so on, and ``mid_residual``. Everything is float32 but the
    shifts, which are int32.

    A shallow phase takes the same, used or not, but of the residuals those of its own skip connections alone; last of
    all come the ``deep_features``, [model batch, channels, height, width].

    Args:
        config: of diffusers' ``UNet2DConditionModel``.
        model_batch: latents of one evaluation, the negative prompt's included.
        prompt_tokens: of a prompt's embedding, a multiple of `PROMPT_TOKENS`.
        own_shifts: whether each latent of the batch has window shifts of its own.
        reuse_depth: layers on the way up that a shallow phase computes; full ones take nothing for it.

    Raises:
        InputError: the UNet cannot be cut at this depth, or a shallow phase has none.
    """
    cut = shallow_cut(config, phase, reuse_depth)
    specs = [*_sample(config, latent_height, latent_width, model_batch, prompt_tokens)]
    if layout.windowed_blocks:
        specs.append(TensorSpec("window_shifts", shifts_shape(layout, model_batch if own_shifts else None), "int32"))
    specs.extend(_added_conditions(config, model_batch))
    if phase.control:
        residuals = control_residuals(config, layout, latent_height, latent_width, model_batch)
        specs.extend(residuals if cut is None else residuals[: cut.depth])
    if cut is not None:
        geometry = UNetGeometry.of(config, layout, phase, latent_height, latent_width)
        specs.append(_deep_features(cut, geometry, model_batch))
    return tuple(specs)


def shallow_cut(config: Mapping[str, Any], phase: Phase, reuse_depth: int | None) -> Cut | None:
    """Returns where a shallow phase is cut; None of a full one.

    Args:
        config: of diffusers' ``UNet2DConditionModel``.

    Raises:
        InputError: the UNet cannot be cut at this depth, or a shallow phase has none.
    """
    if not phase.shallow:
        return None
    if reuse_depth is None:
        raise InputError("A shallow phase has a depth.", given=phase.name, advice="Give `reuse_depth`.")
    return Cut.of(config, reuse_depth)


def _deep_features(cut: Cut, geometry: UNetGeometry, model_batch: int) -> TensorSpec:
    deep = cut.deep_features(geometry)
    return TensorSpec(DEEP_FEATURES, (model_batch, deep.channels, deep.height, deep.width), "float32")


def shifts_shape(layout: Layout, model_batch: int | None = None) -> tuple[int, ...]:
    """Returns the shape of ``window_shifts``: [windowed blocks], or one row of them for each latent of a batch."""
    blocks = (len(layout.windowed_blocks),)
    return blocks if model_batch is None else (model_batch, *blocks)


def controlnet_inputs(
    config: Mapping[str, Any],
    latent_height: int,
    latent_width: int,
    model_batch: int,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
) -> tuple[TensorSpec, ...]:
    """Returns the inputs of the ControlNet's graph, in its order; all are float32.

    ``latents``, ``timestep`` and ``prompt_embeds`` as the phases take them; ``control_image``, 0 to 1, at eight times
    :func:`control_latent`; ``conditioning_scale``; for SDXL's architecture ``text_embeds`` and ``time_ids``.

    Args:
        config: of diffusers' ``ControlNetModel``.
        latent_height: of the UNet's latents, not of those the ControlNet sees; ``latent_width`` likewise.
        model_batch: latents of one evaluation, the negative prompt's included.
        prompt_tokens: of a prompt's embedding, a multiple of `PROMPT_TOKENS`.
    """
    pixels = (size * PIXELS_PER_LATENT for size in control_latent(latent_height, latent_width))
    return (
        *_sample(config, latent_height, latent_width, model_batch, prompt_tokens),
        TensorSpec(CONTROL_IMAGE, (model_batch, 3, *pixels), "float32"),
        TensorSpec(CONDITIONING_SCALE, (1,), "float32"),
        *_added_conditions(config, model_batch),
    )


def controlnet_outputs(
    config: Mapping[str, Any], latent_height: int, latent_width: int, model_batch: int
) -> tuple[TensorSpec, ...]:
    """Returns the outputs of the ControlNet's graph: what :func:`control_residuals` says of a UNet that it fits.

    Args:
        config: of diffusers' ``ControlNetModel``; the rest as for :func:`controlnet_inputs`.
    """
    height, width = control_latent(latent_height, latent_width)
    channels = config["block_out_channels"]
    shapes = [(channels[0], height, width)]
    for index, depth in enumerate(channels):
        shapes += [(depth, height, width)] * config["layers_per_block"]
        if index < len(channels) - 1:
            height, width = height // 2, width // 2
            shapes.append((depth, height, width))
    down = (TensorSpec(down_residual_name(i), (model_batch, *shape), "float32") for i, shape in enumerate(shapes))
    return (*down, TensorSpec(MID_RESIDUAL, (model_batch, channels[-1], height, width), "float32"))


def text_encoder_inputs() -> tuple[TensorSpec, ...]:
    """Returns the inputs of a text encoder's graph: one prompt's tokens, and how many layers its embeddings skip."""
    return TensorSpec("input_ids", (1, PROMPT_TOKENS), "int32"), TensorSpec("clip_skip", (1,), "int32")


def text_encoder_outputs(config: Mapping[str, Any], *, pooled: bool) -> tuple[TensorSpec, ...]:
    """Returns the outputs of a text encoder's graph, float32: ``prompt_embeds``, and ``text_embeds`` where it pools.

    Args:
        config: of transformers' ``CLIPTextConfig``.
    """
    embeds = TensorSpec("prompt_embeds", (1, PROMPT_TOKENS, config["hidden_size"]), "float32")
    return (embeds, TensorSpec("text_embeds", (1, config["projection_dim"]), "float32")) if pooled else (embeds,)


def most_skipped(config: Mapping[str, Any], *, penultimate: bool) -> int:
    """Returns the most layers that a text encoder's embeddings can skip: the first layer's output always remains."""
    return int(config["num_hidden_layers"]) - (2 if penultimate else 1)


def _sample(
    config: Mapping[str, Any], latent_height: int, latent_width: int, model_batch: int, prompt_tokens: int
) -> tuple[TensorSpec, ...]:
    """Returns what every network is asked about."""
    return (
        TensorSpec("latents", (model_batch, config["in_channels"], latent_height, latent_width), "float32"),
        TensorSpec("timestep", (1,), "float32"),
        TensorSpec("prompt_embeds", (model_batch, prompt_tokens, config["cross_attention_dim"]), "float32"),
    )


def _added_conditions(config: Mapping[str, Any], model_batch: int) -> tuple[TensorSpec, ...]:
    """Returns what SDXL's architecture is conditioned on beside the prompt."""
    if config.get("addition_embed_type") != "text_time":
        return ()
    pooled = config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]
    return (
        TensorSpec("text_embeds", (model_batch, pooled), "float32"),
        TensorSpec("time_ids", (model_batch, TIME_IDS), "float32"),
    )


def phase_outputs(
    config: Mapping[str, Any],
    layout: Layout,
    phase: Phase,
    latent_height: int,
    latent_width: int,
    model_batch: int,
    *,
    reuse_depth: int | None = None,
) -> tuple[TensorSpec, ...]:
    """Returns the outputs of a phase's graph, float32: ``noise_pred``, and where features are reused, of a full phase
    ``deep_features`` as the shallow one takes them.

    Args:
        config: of diffusers' ``UNet2DConditionModel``.
        model_batch: latents of one evaluation, the negative prompt's included.
        reuse_depth: layers on the way up that shallow phases compute; None where nothing is reused.

    Raises:
        InputError: the UNet cannot be cut at this depth.
    """
    noise = TensorSpec("noise_pred", (model_batch, config["out_channels"], latent_height, latent_width), "float32")
    if reuse_depth is None or phase.shallow:
        return (noise,)
    geometry = UNetGeometry.of(config, layout, phase, latent_height, latent_width)
    return noise, _deep_features(Cut.of(config, reuse_depth), geometry, model_batch)
