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
from hidiff_export.model.identify import check_config, check_family, check_pipeline_settings, check_shapes
from hidiff_export.model.original import own_names, under_library_names, without_prefix
from hidiff_export.model.sources import find_checkpoint
from hidiff_export.model.state_dict import map_tensors, shapes_of
from hidiff_runtime.safetensors import SafetensorsFile


class Checkpoint(NamedTuple):
    """A network's configuration and tensors.

    Args:
        config: arguments of the network's diffusers class.
        state_dict: tensors under diffusers' names in whatever precision the source has them, read or computed when
            they are looked up; nothing is held in memory.
    """

    config: dict[str, Any]
    state_dict: Mapping[str, torch.Tensor]


def load(component: Component, source: str, family: Family, task: Task, width: Width = Width.FULL) -> Checkpoint:
    """A network of a checkpoint.

    Args:
        component: the network wanted.
        source: hub id, diffusers folder (of the pipeline; for a UNet or ControlNet its own too; sharded or not),
            ``.safetensors`` file in the original layout or under diffusers' names, or ``random:SEED`` for a fabricated
            one.
        family: what the checkpoint has to be.
        task: decides the UNet's number of input channels.
        width: what the checkpoint has to be; fabricated ones exist in both widths.

    Raises:
        CheckpointError: when it is missing, damaged, a pickle, or another family's, task's or width's.
        InputError: for a malformed ``random:SEED``.
        StorageError: when a download cannot be written.
    """
    expected = component.config(family, task, width)
    kind, colon, seed = source.partition(":")
    if kind == "random":
        if not (colon and seed.isascii() and seed.isdigit()):
            raise InputError("A fabricated checkpoint needs a seed.", given=source, advice="Write random:0.")
        return Checkpoint(expected, fabricate(component, expected, int(seed)))
    files = find_checkpoint(source, component)
    tensors = _read(files.weights, component)
    if component in (Component.UNET, Component.CONTROLNET):
        check_family(component, family, task, width, shapes_of(tensors))
    config = expected
    if files.config is not None:
        check_pipeline_settings(component, family, files.config)
        config = check_config(component, expected, files.config)
    tensors = under_library_names(component, config, tensors)
    check_shapes(component, config, shapes_of(tensors))
    return Checkpoint(config, tensors)


def load_unet(source: str, family: Family, task: Task, width: Width = Width.FULL) -> Checkpoint:
    """The UNet of a checkpoint; see `load`."""
    return load(Component.UNET, source, family, task, width)


def load_controlnet(source: str, family: Family, width: Width = Width.FULL) -> Checkpoint:
    """The ControlNet of a checkpoint; see `load`. Single files are under diffusers' names."""
    return load(Component.CONTROLNET, source, family, Task.CONTROLNET, width)


def build_unet(
    config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> Any:
    """A diffusers ``UNet2DConditionModel`` in evaluation mode that holds the given tensors themselves.

    Tensors that are of ``dtype`` already are not copied: parameters of a mapped state dict stay mapped.

    Raises CheckpointError when the tensors are not those of the configuration.
    """
    return build(Component.UNET, config, state_dict, dtype)


def build_controlnet(
    config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> Any:
    """A diffusers ``ControlNetModel``, as `build_unet` makes a UNet."""
    return build(Component.CONTROLNET, config, state_dict, dtype)


def build(
    component: Component,
    config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A network of its library's own class, as `build_unet` makes a UNet."""
    check_shapes(component, config, shapes_of(state_dict))
    network = component.empty(config)
    cast = {name: tensor.to(dtype) for name, tensor in state_dict.items()}
    network.load_state_dict(cast, strict=True, assign=True)
    if component.is_text:
        # The one buffer that no state dict holds.
        for name, buffer in list(network.named_buffers()):
            owner, _, key = name.rpartition(".")
            setattr(network.get_submodule(owner), key, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return network


def _read(paths: Sequence[Path], component: Component) -> dict[str, torch.Tensor]:
    """The tensors of one or more files, mapped; of a whole original checkpoint, those of the network alone."""
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            file = SafetensorsFile.open(path)
        except BundleError as error:
            raise CheckpointError(error.summary, given=error.given, advice=error.advice) from error
        with file:
            found = map_tensors(file, own_names(component, file.names()))
        if repeated := tensors.keys() & found.keys():
            raise CheckpointError(
                "A tensor is in two shards of the checkpoint.",
                given=f"{min(repeated)}, again in {path}",
                advice="Copy or download the checkpoint again.",
            )
        tensors.update(found)
    return without_prefix(component, tensors)
