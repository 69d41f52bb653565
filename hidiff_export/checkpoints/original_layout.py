"""Checkpoints in the layout of their training code: the names of their tensors in diffusers and transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.contents import UNET_PREFIX
from hidiff_export.checkpoints.spare_tensors import ROOTS, VAE_PARTS, VAE_PREFIXES
from hidiff_export.errors import CheckpointError

_UNET_FIRST = "input_blocks.0.0.weight"
_VAE_FIRST = "encoder.down.0.block.0.conv1.weight"
_VAE_ATTENTION = ".mid_block.attentions.0."
_EARLIER = {"query.": "to_q.", "key.": "to_k.", "value.": "to_v.", "proj_attn.": "to_out.0."}
"""What diffusers called parts of the VAE's attention until 2023, as the files of published checkpoints still do."""

_SIZES = {
    f"add_embedding.linear_{1 + place // 2}.{kind}": f"label_emb.0.{place}.{kind}"
    for place in (0, 2)
    for kind in ("weight", "bias")
}
"""SDXL's embedding of sizes, which diffusers' conversion of a ControlNet leaves out."""

_CLIP_PREFIXES = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "text_model.")
"""What comes before the names of CLIP's text encoder in whole checkpoints, and in older files of its class."""

_OPEN_CLIP_PREFIX = {
    Component.TEXT_ENCODER: "cond_stage_model.model.",
    Component.TEXT_ENCODER_2: "conditioner.embedders.1.model.",
}
"""What whole checkpoints put before the names of OpenCLIP's, which are others."""

_OPEN_CLIP_PARTS = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


def without_prefix(component: Component, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns tensors under the network's own names, without what a whole checkpoint puts before them."""
    return dict(tensors) if component.is_text else _without(ROOTS[component], tensors)


def under_library_names(
    component: Component, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns tensors under the names that diffusers and transformers give them today; the same memory.

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
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint, convert_ldm_unet_checkpoint

    try:
        if component is Component.CONTROLNET:
            converted = convert_controlnet_checkpoint(dict(tensors), config)
            converted |= {ours: tensors[theirs] for ours, theirs in _SIZES.items() if theirs in tensors}
        else:
            converted = convert_ldm_unet_checkpoint(
                {UNET_PREFIX + name: tensor for name, tensor in tensors.items()}, config
            )
    except KeyError as error:
        raise CheckpointError(
            "The checkpoint lacks a tensor.",
            given=str(error.args[0]),
            advice="Give the checkpoint as it was published.",
        ) from error
    return _with_unknown({name: tensor for name, tensor in converted.items() if tensor is not None}, tensors)


def _with_unknown(
    converted: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Adds what diffusers dropped without a word, under its own names; it hands on the same memory."""
    kept = {tensor.data_ptr() for tensor in converted.values()}
    return {**converted, **{name: tensor for name, tensor in tensors.items() if tensor.data_ptr() not in kept}}


def _vae(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under diffusers' names of today; what is a convolution in the original layout's attention becomes a matrix."""
    if not tensors:
        raise CheckpointError(
            "There is no VAE in this checkpoint.",
            given=f"no tensor that begins with {', '.join((*VAE_PREFIXES, *VAE_PARTS))}",
            advice="Give a checkpoint with its VAE, or set vae: false for a bundle without.",
        )
    if _VAE_FIRST in tensors:
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        return _with_unknown(convert_ldm_vae_checkpoint(dict(tensors), config), tensors)
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
    found, prefix = dict(tensors), _OPEN_CLIP_PREFIX[component]
    if any(name.startswith(prefix) for name in found):
        found = _from_open_clip(config, found, prefix)
    if component is Component.TEXT_ENCODER:
        found = _without(_CLIP_PREFIXES, found)
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
    converted = convert_open_clip_checkpoint(like, dict(tensors), prefix)
    known = tuple(prefix + part for part in _OPEN_CLIP_PARTS)
    return {**converted, **{name: tensor for name, tensor in tensors.items() if not name.startswith(known)}}


def _without(prefixes: Iterable[str], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = dict(tensors)
    for prefix in prefixes:
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found
