"""Checkpoints in the layout of their training code: which tensors are a network's, and their names in its library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from hidiff_export.errors import CheckpointError
from hidiff_export.model.component import Component

_UNET_PREFIX = "model.diffusion_model."
_UNET_FIRST = "input_blocks.0.0.weight"
_VAE_PREFIXES = ("first_stage_model.", "vae.")
_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_VAE_FIRST = "encoder.down.0.block.0.conv1.weight"
_VAE_ATTENTION = ".mid_block.attentions.0."
_EARLIER = {"query.": "to_q.", "key.": "to_k.", "value.": "to_v.", "proj_attn.": "to_out.0."}
"""What diffusers called parts of the VAE's attention until 2023, as the files of published checkpoints still do."""

_CLIP = "text_model."
_POSITIONS = "position_ids"
_CLIP_PREFIXES = {
    Component.TEXT_ENCODER: ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
    Component.TEXT_ENCODER_2: (),
}
"""What whole checkpoints put before the names of CLIP's text encoder."""

_OPEN_CLIP_PREFIXES = {
    Component.TEXT_ENCODER: ("cond_stage_model.model.",),
    Component.TEXT_ENCODER_2: ("conditioner.embedders.1.model.",),
}
"""What they put before the names of OpenCLIP's, which are others."""


def own_names(component: Component, names: Sequence[str]) -> Sequence[str]:
    """Those of a file's tensors that are the network's: of a whole original checkpoint a part, else all of them."""
    if component.is_text:
        prefixes = (*_CLIP_PREFIXES[component], *_OPEN_CLIP_PREFIXES[component])
        weights = [name for name in names if not name.endswith(_POSITIONS)]  # a buffer of integers
        return [name for name in weights if name.startswith(prefixes)] or weights
    if component is Component.VAE:
        within = [name for name in names if name.startswith(_VAE_PREFIXES)]
        return within or [name for name in names if name.startswith(_VAE_PARTS)]
    return [name for name in names if name.startswith(_UNET_PREFIX)] or names


def without_prefix(component: Component, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the network's own names, without what a whole checkpoint puts before them."""
    if component.is_text:
        return dict(tensors)
    found = dict(tensors)
    for prefix in _VAE_PREFIXES if component is Component.VAE else (_UNET_PREFIX,):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


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
        return _clip(component, config, tensors)
    if component is Component.VAE:
        return _vae(config, tensors)
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


def _vae(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under diffusers' names of today; what is a convolution in the original layout's attention becomes a matrix."""
    if not tensors:
        raise CheckpointError(
            "There is no VAE in this checkpoint.",
            given=f"no tensor that begins with {', '.join((*_VAE_PREFIXES, *_VAE_PARTS))}",
            advice="Give a checkpoint with its VAE, or set vae: false for a bundle without.",
        )
    if _VAE_FIRST in tensors:
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        return dict(convert_ldm_vae_checkpoint(dict(tensors), config))
    found = {}
    for name, tensor in tensors.items():
        block, within, part = name.partition(_VAE_ATTENTION)
        for earlier, today in _EARLIER.items():
            if within and part.startswith(earlier):
                name = f"{block}{within}{today}{part.removeprefix(earlier)}"
        found[name] = tensor
    return found


def _clip(
    component: Component, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Under the names of today, of which one class has dropped a prefix that older files have."""
    found = dict(tensors)
    for prefix in _CLIP_PREFIXES[component]:
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    for prefix in _OPEN_CLIP_PREFIXES[component]:
        if any(name.startswith(prefix) for name in found):
            found = _from_open_clip(config, found, prefix)
    if component is Component.TEXT_ENCODER:
        found = {name.removeprefix(_CLIP): tensor for name, tensor in found.items()}
    if not any(name.endswith("token_embedding.weight") for name in found):
        raise CheckpointError(
            f"There is no {component.value} in this checkpoint.",
            given=f"{len(found)} tensors, {', '.join(sorted(found)[:4])}",
            advice="Give a checkpoint with its text encoders, or set text: false for a bundle without.",
        )
    return found


def _from_open_clip(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], prefix: str
) -> dict[str, torch.Tensor]:
    """OpenCLIP keeps queries, keys and values in one matrix, and projects with the transposed one."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    like = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    return dict(convert_open_clip_checkpoint(like, dict(tensors), prefix))
