"""Seeded random checkpoints: a family's real architecture with made-up weights.

They stand in for a download wherever only size, speed and equality matter. The weights are chosen so that the network
behaves like a trained one numerically: activations stay of order one through the whole depth, attention looks at some
tokens more than at others, and the output depends on the latents, the prompt, the timestep and every single tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.state_dict import LazyStateDict

_AFTER_SILU = 1.0 / math.sqrt(0.356)  # E[silu(z)^2] = 0.356 for z ~ N(0, 1)
_AFTER_GEGLU = 1.0 / math.sqrt(0.425)  # E[(y * gelu(z))^2] = 0.425 for independent y, z ~ N(0, 1)
_BRANCH = 0.5  # what a residual branch adds, beside the stream of order one
_SHARP = math.sqrt(2.0)  # for queries and keys alike: attention scores get a standard deviation of 2
_ATTENDED = 2.0  # attention averages values over tokens, which takes most of their variance away
_ZERO_CONV = 0.2  # a ControlNet's "zero" convolutions, which training has moved away from zero

_AFTER_GELU = 1.0 / math.sqrt(0.425)  # E[gelu(z)^2] = 0.425 for z ~ N(0, 1); quick_gelu's differs in the third digit
_TEXT_BRANCH = 0.25  # in text encoders, whose stream SDXL takes as it is after up to 62 branches
_EMBEDDED = math.sqrt(0.5)  # tokens and positions, which are added

_LATENT_SPREAD = 0.15  # undoes a VAE's scaling factor, so that latents come in at order one
_PICTURE_SPREAD = 0.4  # of a decoded picture, which keeps it within -1 to 1 for the most part
_MEANS, _LOGVAR = 5.0, -6.0  # an encoder's means outweigh the noise that is drawn round them, as trained ones do

_GAINS: tuple[tuple[str, float], ...] = (
    (".conv1", _AFTER_SILU),
    (".conv2", _AFTER_SILU * _BRANCH),
    ("decoder.conv_out", _AFTER_SILU * _PICTURE_SPREAD),
    ("conv_out", _AFTER_SILU),
    ("post_quant_conv", _LATENT_SPREAD),
    (".time_emb_proj", _AFTER_SILU),
    ("time_embedding.linear_1", math.sqrt(2.0)),  # of sines and cosines, whose mean square is a half
    ("_embedding.linear_2", _AFTER_SILU),
    (".to_q", _SHARP),
    (".to_k", _SHARP),
    (".to_out.0", _ATTENDED * _BRANCH),
    (".ff.net.2", _AFTER_GEGLU * _BRANCH),
    (".proj_out", _BRANCH),
    (".q_proj", _SHARP),
    (".k_proj", _SHARP),
    (".out_proj", _ATTENDED * _TEXT_BRANCH),
    (".mlp.fc2", _AFTER_GELU * _TEXT_BRANCH),
    ("cond_embedding.blocks", _AFTER_SILU),
    ("controlnet_down_blocks", _ZERO_CONV),
    ("controlnet_mid_block", _ZERO_CONV),
)
_NORM_SPREAD = 0.1
_BIAS_SPREAD = 0.1


def synthesize(component: Component, config: Mapping[str, Any], seed: int) -> LazyStateDict:
    """Returns the float32 tensors of a network, each computed when it is asked for.

    A tensor's values depend on the seed, the component, its name and its shape alone: not on the order, the threads,
    the machine or the rest of the network.

    Args:
        component: the network.
        config: the network's configuration for diffusers or transformers.
        seed: a whole number from 0 on.
    """
    shapes = component.shapes(config)
    return LazyStateDict(shapes, lambda name: _tensor(f"{component.value}/{seed}/{name}", name, shapes[name]))


def _tensor(key: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    middle, deviation = _distribution(name, shape)
    # Uniform rather than normal: bits of the generator scaled by exact arithmetic, so no machine's logarithm matters,
    # and five times faster. 24 bits, from -sqrt(3) to sqrt(3) deviations.
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(hashlib.sha256(key.encode()).digest(), "little")))
    values = generator.random(shape, dtype=np.float32)
    values -= np.float32(0.5)
    values *= np.float32(math.sqrt(12.0) * deviation)
    if middle:
        values += np.float32(middle)
    if name == "quant_conv.weight":
        values[: shape[0] // 2] *= np.float32(_MEANS)
    if name == "quant_conv.bias":
        values[shape[0] // 2 :] += np.float32(_LOGVAR)
    return torch.from_numpy(values)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Returns mean and standard deviation of a tensor's values."""
    module, _, kind = name.rpartition(".")
    if kind == "bias":
        return 0.0, _BIAS_SPREAD
    if len(shape) == 1:
        return 1.0, _NORM_SPREAD
    if module.endswith(("token_embedding", "position_embedding")):
        return 0.0, _EMBEDDED
    fan_in = math.prod(shape[1:])
    gain = next((gain for part, gain in _GAINS if part in module), 1.0)
    return 0.0, gain / math.sqrt(fan_in)
