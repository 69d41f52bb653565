"""RAU-Net as hooks: what a phase changes in a diffusers UNet, all of it removable and none of it touching a weight.

The stride-4 downsampler is a slice before the ordinary one: convolution with stride 4, dilation 2 and padding 2 equals
``x[..., ::2, ::2]`` followed by stride 2 and padding 1, for even and odd sizes. So all phases share all weights.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hidiff_export.families.geometry import UNetGeometry
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.modules.window_attention import install_windows, submodule

_MORE_THAN_ANY_SIZE = 32
"""With so many upsamplers no size is divisible, so diffusers always upsamples to the skip connection's size."""


def every_other(hidden_states: torch.Tensor) -> torch.Tensor:
    """Returns every other row and column of [batch, channels, height, width], the first ones included."""
    return hidden_states[..., ::2, ::2]


def pooled(hidden_states: torch.Tensor) -> torch.Tensor:
    """Means over two by two; odd sizes round up."""
    return functional.avg_pool2d(hidden_states, kernel_size=2, ceil_mode=True)


def restored(hidden_states: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Returns [batch, channels, height, width] brought to ``size``, bicubic."""
    return functional.interpolate(hidden_states, size=size, mode="bicubic")


def install_phase(unet: Any, layout: Layout, geometry: UNetGeometry) -> ExitStack:
    """Gives ``unet`` a phase, until the returned stack is closed; then it is exactly as before.

    With windowed blocks in the layout, the UNet must be called with
    ``cross_attention_kwargs={WINDOW_ORDERS: orders}``, ``orders`` from
    :class:`~hidiff_export.modules.window_attention.WindowTables`.

    Args:
        unet: diffusers' ``UNet2DConditionModel``; also one that is in use.
        layout: where the changes go.
        geometry: of the phase and of the latents that the UNet will be called with.

    Raises:
        InputError: the UNet lacks a module that the layout names; then nothing is changed.
    """
    with ExitStack() as handles:
        handles.callback(setattr, unet, "num_upsamplers", unet.num_upsamplers)
        unet.num_upsamplers = _MORE_THAN_ANY_SIZE
        if geometry.kind.strided:
            _install_stride(submodule(unet, layout.downsampler), handles)
        if geometry.restore is not None:
            pool = submodule(unet, layout.pooled_attention)
            restore = submodule(unet, layout.restored_attention)
            _install_pool(pool, restore, geometry.restore, handles)
        install_windows(unet, layout.windowed_blocks, geometry.windows, handles)
        return handles.pop_all()


def _install_stride(downsampler: nn.Module, handles: ExitStack) -> None:
    def slice_input(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (every_other(args[0]), *args[1:])

    handles.callback(downsampler.register_forward_pre_hook(slice_input).remove)


def _install_pool(pool: nn.Module, restore: nn.Module, size: tuple[int, int], handles: ExitStack) -> None:
    # Both modules are Transformer2DModel, which the UNet's blocks call with return_dict=False: a tuple comes out.
    def pool_output(_module: nn.Module, _args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> Any:
        return (pooled(output[0]), *output[1:])

    def restore_output(_module: nn.Module, _args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> Any:
        return (restored(output[0], size), *output[1:])

    handles.callback(pool.register_forward_hook(pool_output).remove)
    handles.callback(restore.register_forward_hook(restore_output).remove)
