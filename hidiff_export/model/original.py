"""Checkpoints in the layout of their training code: which tensors are a network's, and their names in its library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hidiff_export.errors import CheckpointError
from hidiff_export.model.component import Component

_UNET_PREFIX = "model.diffusion_model."
_UNET_FIRST = "input_blocks.0.0.weight"
_CLIP_PREFIX = "text_model."
_POSITIONS = "embeddings.position_ids"


def own_names(component: Component, names: Sequence[str]) -> Sequence[str]:
    """Those of a file's tensors that are the network's: of a whole original checkpoint a part, else all of them."""
    if component in (Component.UNET, Component.CONTROLNET):
        return [name for name in names if name.startswith(_UNET_PREFIX)] or names
    return names


def without_prefix(component: Component, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the network's own names, without what a whole checkpoint puts before them."""
    if component.is_text:
        return dict(tensors)
    return {name.removeprefix(_UNET_PREFIX): tensor for name, tensor in tensors.items()}


def under_library_names(
    component: Component, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tensors under the names that diffusers and transformers give them today; the same memory.

    Args:
        component: the network.
        config: of the network.
        tensors: under its library's names, of today or earlier, or under the original ones.

    Raises:
        CheckpointError: a tensor is missing, or an original layout is not taken.
    """
    if component.is_text:
        return _clip(component, tensors)
    if _UNET_FIRST not in tensors:
        return dict(tensors)
    if component is not Component.UNET:
        raise CheckpointError(
            "A ControlNet in the original layout is not taken.",
            given=_UNET_FIRST,
            advice="Convert it with diffusers' ControlNetModel.from_single_file, then save_pretrained.",
        )
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    try:
        converted = convert_ldm_unet_checkpoint({_UNET_PREFIX + name: value for name, value in tensors.items()}, config)
    except KeyError as error:
        raise CheckpointError(
            "The checkpoint lacks a tensor.", given=str(error.args[0]), advice="Copy or download the checkpoint again."
        ) from error
    return {name: tensor for name, tensor in converted.items() if tensor is not None}


def _clip(component: Component, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published files have a buffer that is none of the weights, and a prefix that one of the classes has dropped."""
    prefix = _CLIP_PREFIX if component is Component.TEXT_ENCODER else ""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if not name.endswith(_POSITIONS)}
