"""A UNet's outermost layers alone, over deep features of an earlier evaluation, and the hook that gives these.

All of it is removable and none of it touches a weight. What is left out is taken from the module tree, since the blocks
of diffusers loop over their layers; the others keep their names, by which graphs find their weights.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from hidiff_export.families.reuse_depths import Cut
from hidiff_export.modules.window_attention import submodule

_SAMPLERS = ("downsamplers", "upsamplers")


class FeatureSlot:
    """Holds the deep features while one call of a UNet is under way: its blocks hand on nothing else."""

    def __init__(self) -> None:
        self._features: torch.Tensor | None = None

    def put(self, features: torch.Tensor) -> None:
        """Takes in the features, [batch, channels, height, width]."""
        self._features = features

    def take(self) -> torch.Tensor:
        """Returns the features and forgets them."""
        features, self._features = self._features, None
        assert features is not None  # whoever calls the UNet has put them in, or its hook has
        return features


def install_feature_output(unet: Any, cut: Cut, slot: FeatureSlot, handles: ExitStack) -> None:
    """Lets a UNet whose layers are all computed put its deep features into ``slot``, until ``handles`` is closed.

    Install it after a phase, which changes what the layers give.
    """

    # FreeU scales in place what enters a layer, here and below: hence copies, which a graph does not have.
    def keep(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        slot.put((output[0] if isinstance(output, tuple) else output).clone())

    handles.callback(submodule(unet, cut.source).register_forward_hook(keep).remove)


def install_shallow(unet: Any, cut: Cut, slot: FeatureSlot, handles: ExitStack) -> None:
    """Leaves of a UNet the layers of ``cut``, which start from the features in ``slot``, until ``handles`` is closed.

    Install it after a phase, whose modules may be among those left out. Of a ControlNet's residuals such a UNet takes
    those of the skip connections that are left; diffusers wants the middle block's too, and what it is has no effect.

    Args:
        unet: diffusers' ``UNet2DConditionModel``; also one that is in use.
        cut: of its configuration.
        slot: takes the features before each call, of the UNet's own type.
    """

    def start(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "hidden_states": slot.take().clone()}

    first_block = submodule(unet, ".".join(cut.first.split(".")[:2]))
    handles.callback(first_block.register_forward_pre_hook(start, with_kwargs=True).remove)
    _swap(unet, "mid_block", None, handles)
    for path in ("down_blocks", "up_blocks"):
        blocks = unet.get_submodule(path)
        kept = [key for key, _ in blocks.named_children() if any(n.startswith(f"{path}.{key}.") for n in cut.computed)]
        for key in kept:
            _trim_block(blocks.get_submodule(key), f"{path}.{key}", cut, handles)
        _swap(unet, path, _subset(blocks, kept), handles)


def _trim_block(block: nn.Module, path: str, cut: Cut, handles: ExitStack) -> None:
    for name in ("resnets", "attentions", *_SAMPLERS):
        modules = getattr(block, name, None)
        if modules is None:
            continue
        kept = [key for key, _ in modules.named_children() if f"{path}.{name}.{key}" in cut.computed]
        # An empty list of downsamplers would still count as a skip connection.
        _swap(block, name, _subset(modules, kept) if kept or name not in _SAMPLERS else None, handles)


def _subset(modules: nn.Module, keys: list[str]) -> nn.ModuleList:
    """Returns the modules of these keys, by which they are still called."""
    kept = nn.ModuleList()
    for key in keys:
        kept.add_module(key, modules.get_submodule(key))
    return kept


def _swap(owner: nn.Module, name: str, module: nn.Module | None, handles: ExitStack) -> None:
    handles.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, module)
