"""Checkpoints: from a source to tensors by name, and from tensors to a diffusers network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hidiff_export.checkpoints.checkpoint_file import open_weights, refuse_quantized
from hidiff_export.checkpoints.compatibility import check_config, check_family, check_pipeline_settings, check_shapes
from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.contents import changing_kind, listed
from hidiff_export.checkpoints.original_layout import under_library_names, without_prefix
from hidiff_export.checkpoints.sources import find_checkpoint
from hidiff_export.checkpoints.spare_tensors import SortedNames, left_out_notices, sort_names
from hidiff_export.checkpoints.state_dict import map_tensors, shapes_of
from hidiff_export.checkpoints.stored_configs import CONFIG, read_config
from hidiff_export.checkpoints.synthetic import synthesize
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.errors import CheckpointError, InputError
from hidiff_export.families.family import Family, Task, Width
from hidiff_export.recipe.field_types import random_seed
from hidiff_runtime.format.safetensors import SafetensorsFile


class Checkpoint(NamedTuple):
    """A network's configuration and tensors.

    Args:
        config: arguments of the network's diffusers class.
        state_dict: tensors under diffusers' names in whatever precision the source has them, read or computed when
            they are looked up; nothing is held in memory.
        notices: what its user has to be told, a line each: which variant was taken, which tensors are left out.
    """

    config: dict[str, Any]
    state_dict: Mapping[str, torch.Tensor]
    notices: tuple[str, ...] = ()


def load(component: Component, source: str, family: Family, task: Task, width: Width = Width.FULL) -> Checkpoint:
    """Returns a network of a checkpoint.

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
    try:
        seed = random_seed(source)
    except ValueError:
        raise InputError("A fabricated checkpoint needs a seed.", given=source, advice="Write random:0.") from None
    if seed is not None:
        return Checkpoint(expected, synthesize(component, expected, seed))
    files = find_checkpoint(source, component)
    if component is Component.CONTROLNET and files.config is None:
        _refuse_pooling(files.paths[0])
    tensors, notices = _read(files.paths, component, expected)
    if component in (Component.UNET, Component.CONTROLNET):
        check_family(component, family, task, width, shapes_of(tensors))
    config = expected
    if files.config is not None:
        check_pipeline_settings(component, family, files.config)
        config = check_config(component, expected, files.config)
    tensors = under_library_names(component, config, tensors)
    check_shapes(component, config, shapes_of(tensors))
    return Checkpoint(config, tensors, (*files.notices, *notices))


def build(
    component: Component,
    config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Returns a network of its library's own class, in evaluation mode, that holds the given tensors themselves.

    Tensors that are of ``dtype`` already are not copied: parameters of a mapped state dict stay mapped.

    Raises CheckpointError when the tensors are not those of the configuration.
    """
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


def load_stored(component: Component, store: WeightStore, dtype: torch.dtype = torch.float32) -> Any:
    """Returns a network of a bundle over the weights that it stores, mapped where they are of ``dtype``.

    Raises BundleError for a configuration that cannot be read, and what `build` raises.
    """
    return build(component, read_config(store.path.with_name(CONFIG)), store.state_dict(), dtype)


def _read(
    paths: Sequence[Path], component: Component, config: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Returns the tensors that a network has in one or more files, mapped, and the lines that say what is left out."""
    with ExitStack() as stack:
        files = [stack.enter_context(open_weights(path)) for path in paths]
        holders: dict[str, SafetensorsFile] = {}
        for file in files:
            if repeated := holders.keys() & set(file.names()):
                raise CheckpointError(
                    "A tensor is in two shards of the checkpoint.",
                    given=f"{min(repeated)}, again in {file.path}",
                    advice="Keep the shards of one checkpoint alone in the folder.",
                )
            holders.update(dict.fromkeys(file.names(), file))
        names = sort_names(component, tuple(holders), config)
        _refuse_adapters(component, names)
        types = {name: holders[name].info(name).dtype for name in names.own}
        refuse_quantized(types, str(paths[0]))
        tensors: dict[str, torch.Tensor] = {}
        for file in files:
            tensors.update(map_tensors(file, (name for name in file.names() if name in types)))
    return without_prefix(component, tensors), left_out_notices(component, names)


def _refuse_pooling(path: Path) -> None:
    """Raises CheckpointError for a single file of a ControlNet that only its name tells from others."""
    if "shuffle" in path.stem.lower():
        raise CheckpointError(
            "A shuffle ControlNet averages its residuals over the picture, which is not built.",
            given=path,
            advice="Give another ControlNet; if this one is none of that kind, rename the file.",
        )


def _refuse_adapters(component: Component, names: SortedNames) -> None:
    """Raises CheckpointError when an adapter beside a network would be left out, or the network itself."""
    if not names.own and any(name.startswith("model_ema.") for name in names.left_out):
        raise CheckpointError(
            f"The checkpoint holds only EMA copies of a {component.class_name}'s weights.",
            given=listed(sorted(names.left_out)),
            advice="Give the file that has the weights too, or one with the EMA weights under the weights' names.",
        )
    kind = changing_kind(names.stray)
    if kind is None or not names.own:
        return
    if component is Component.CONTROLNET and kind.is_control:
        summary, advice = f"The checkpoint is no whole {component.class_name}: it is {kind.what}.", kind.advice
    else:
        summary = f"Beside its {component.class_name} the checkpoint has {kind.what}, which would be left out."
        advice = "Give a checkpoint that has it in its weights, or one without; a LoRA can be given as --lora."
    raise CheckpointError(summary, given=listed(sorted(names.stray)), advice=advice)
