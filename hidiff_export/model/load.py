"""Checkpoints: from a source to tensors by name, and from tensors to a diffusers network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hidiff_export.errors import BundleError, CheckpointError, InputError
from hidiff_export.families import Family, Task, Width
from hidiff_export.model.component import Component
from hidiff_export.model.fabricate import fabricate
from hidiff_export.model.identify import check_config, check_family, check_shapes
from hidiff_export.model.sources import find_checkpoint
from hidiff_export.model.state_dict import map_tensors, shapes_of
from hidiff_runtime.safetensors import SafetensorsFile

_LDM_PREFIX = "model.diffusion_model."
_LDM_FIRST = "input_blocks.0.0.weight"


class Checkpoint(NamedTuple):
    """A network's configuration and tensors.

    Args:
        config: arguments of the network's diffusers class.
        state_dict: tensors under diffusers' names in whatever precision the source has them, read or computed when
            they are looked up; nothing is held in memory.
    """

    config: dict[str, Any]
    state_dict: Mapping[str, torch.Tensor]


def load_unet(source: str, family: Family, task: Task, width: Width = Width.FULL) -> Checkpoint:
    """The UNet of a checkpoint.

    Args:
        source: hub id, diffusers folder (of the pipeline or the UNet, sharded or not), ``.safetensors`` file in the
            original LDM layout or under diffusers' names, or ``random:SEED`` for a fabricated one.
        family: what the checkpoint has to be.
        task: decides the number of input channels.
        width: what the checkpoint has to be; fabricated ones exist in both widths.

    Raises:
        CheckpointError: when it is missing, damaged, a pickle, or another family's, task's or width's.
        InputError: for a malformed ``random:SEED``.
        StorageError: when a download cannot be written.
    """
    return _load(Component.UNET, source, family, task, width)


def load_controlnet(source: str, family: Family, width: Width = Width.FULL) -> Checkpoint:
    """The ControlNet of a checkpoint; sources and errors as for `load_unet`, single files under diffusers' names."""
    return _load(Component.CONTROLNET, source, family, Task.CONTROLNET, width)


def build_unet(
    config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> Any:
    """A diffusers ``UNet2DConditionModel`` in evaluation mode that holds the given tensors themselves.

    Tensors that are of ``dtype`` already are not copied: parameters of a mapped state dict stay mapped.

    Raises CheckpointError when the tensors are not those of the configuration.
    """
    return _build(Component.UNET, config, state_dict, dtype)


def build_controlnet(
    config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> Any:
    """A diffusers ``ControlNetModel``, as `build_unet` makes a UNet."""
    return _build(Component.CONTROLNET, config, state_dict, dtype)


def _build(
    component: Component, config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> torch.nn.Module:
    check_shapes(component, config, shapes_of(state_dict))
    network = component.empty(config)
    cast = {name: tensor.to(dtype) for name, tensor in state_dict.items()}
    network.load_state_dict(cast, strict=True, assign=True)
    return network


def _load(component: Component, source: str, family: Family, task: Task, width: Width) -> Checkpoint:
    expected = component.config(family, task, width)
    kind, colon, seed = source.partition(":")
    if kind == "random":
        if not (colon and seed.isascii() and seed.isdigit()):
            raise InputError("A fabricated checkpoint needs a seed.", given=source, advice="Write random:0.")
        return Checkpoint(expected, fabricate(component, expected, int(seed)))
    files = find_checkpoint(source, component)
    tensors = _read(files.weights)
    check_family(component, family, task, width, shapes_of(tensors))
    if _LDM_FIRST in tensors:
        config, tensors = expected, _from_ldm(component, expected, tensors)
    else:
        config = expected if files.config is None else check_config(component, expected, files.config)
    check_shapes(component, config, shapes_of(tensors))
    return Checkpoint(config, tensors)


def _read(paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The tensors of one or more files, mapped; of a whole original checkpoint, the UNet's without their prefix."""
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            file = SafetensorsFile.open(path)
        except BundleError as error:
            raise CheckpointError(error.summary, given=error.given, advice=error.advice) from error
        with file:
            unet = [name for name in file if name.startswith(_LDM_PREFIX)]
            found = map_tensors(file, unet or file.names())
        if repeated := tensors.keys() & found.keys():
            raise CheckpointError(
                "A tensor is in two shards of the checkpoint.",
                given=f"{min(repeated)}, again in {path}",
                advice="Copy or download the checkpoint again.",
            )
        tensors.update(found)
    return {name.removeprefix(_LDM_PREFIX): tensor for name, tensor in tensors.items()}


def _from_ldm(
    component: Component, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tensors under the original LDM names, under diffusers' names instead; the same memory."""
    if component is not Component.UNET:
        raise CheckpointError(
            "A ControlNet in the original layout is not taken.",
            given=_LDM_FIRST,
            advice="Convert it with diffusers' ControlNetModel.from_single_file, then save_pretrained.",
        )
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    try:
        converted = convert_ldm_unet_checkpoint({_LDM_PREFIX + name: value for name, value in tensors.items()}, config)
    except KeyError as error:
        raise CheckpointError(
            "The checkpoint lacks a tensor.", given=str(error.args[0]), advice="Copy or download the checkpoint again."
        ) from error
    return {name: tensor for name, tensor in converted.items() if tensor is not None}
