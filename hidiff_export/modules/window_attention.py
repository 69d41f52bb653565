"""MSW-MSA: self-attention in four large windows, shifted, with the shifts as a run-time input.

Rolling the feature map and cutting it into windows only moves tokens, so each of the four shifts is a permutation. A
:class:`WindowTables` holds the permutations and picks by shift; the picked orders travel to the windowed blocks in
``cross_attention_kwargs``. Nothing is stored between calls, so the UNet exports and compiles as one graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional

from hidiff_export.errors import InputError
from hidiff_export.families.geometry import SHIFTS, WindowShape

WINDOW_ORDERS = "window_orders"
"""Key of ``cross_attention_kwargs`` under which the UNet takes one :class:`TokenOrder` for each windowed block."""


class TokenOrder(NamedTuple):
    """A permutation of a feature map's tokens, the same one for each feature map of a batch or one for each.

    Args:
        gather: int32 [tokens]; windows are ``tokens[gather]``. Where each feature map has its own, [batch * tokens], of
            the tokens of all of them in a row.
        restore: of the same shape; its inverse.
    """

    gather: torch.Tensor
    restore: torch.Tensor


def token_orders(shape: WindowShape) -> TokenOrder:
    """Returns the permutations of all shifts: both int32 [4, tokens], tokens of the padded feature map in rows."""
    rows = torch.arange(math.prod(shape.padded), dtype=torch.int32).view(shape.padded)
    height, width = shape.window
    orders = []
    for quarters in range(SHIFTS):
        down, right = shape.shift(quarters)
        rolled = torch.roll(rows, shifts=(-down, -right), dims=(0, 1))
        orders.append(rolled.view(2, height, 2, width).transpose(1, 2).flatten())
    gather = torch.stack(orders)
    return TokenOrder(gather, torch.argsort(gather, dim=1).to(torch.int32))


class WindowTables(nn.Module):
    """Picks each windowed block's token order by its shift.

    The tables are buffers, one pair for each distinct window shape, and no part of the state dict.
    """

    def __init__(self, windows: Sequence[WindowShape]) -> None:
        super().__init__()
        self.windows = tuple(windows)
        for shape in dict.fromkeys(self.windows):
            orders = token_orders(shape)
            self.register_buffer(_buffer_name("gather", shape), orders.gather, persistent=False)
            self.register_buffer(_buffer_name("restore", shape), orders.restore, persistent=False)

    def forward(self, shifts: torch.Tensor) -> tuple[TokenOrder, ...]:
        """Returns one order for each windowed block.

        Args:
            shifts: int32, each 0 to 3: [windowed blocks] for all feature maps alike, or [batch, windowed blocks].
        """
        columns = (column.reshape(-1) for column in torch.split(shifts, 1, dim=-1))
        return tuple(
            TokenOrder(
                _rows(self.get_buffer(_buffer_name("gather", shape)), column),
                _rows(self.get_buffer(_buffer_name("restore", shape)), column),
            )
            for shape, column in zip(self.windows, columns, strict=True)
        )


def _rows(table: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Returns the orders of ``shifts``, int32 [feature maps], one behind the other, each of its own tokens."""
    orders = table.index_select(0, shifts)
    batch, tokens = orders.shape
    if batch > 1:
        orders = orders + torch.arange(0, batch * tokens, tokens, dtype=torch.int32, device=table.device)[:, None]
    return orders.flatten()


def _buffer_name(table: str, shape: WindowShape) -> str:
    return f"{table}_{shape.height}x{shape.width}"


def to_windows(tokens: torch.Tensor, order: TokenOrder, shape: WindowShape) -> torch.Tensor:
    """Returns [batch, tokens, channels] as [batch * 4, window's tokens, channels]; odd sizes are resized up first."""
    if shape.resized:
        tokens = _resized(tokens, (shape.height, shape.width), shape.padded)
    windows = _ordered(tokens, order.gather)
    return windows.view(-1, math.prod(shape.window), tokens.shape[-1])


def from_windows(windows: torch.Tensor, order: TokenOrder, shape: WindowShape) -> torch.Tensor:
    """Returns the inverse of :func:`to_windows`; odd sizes are resized back."""
    tokens = windows.reshape(-1, math.prod(shape.padded), windows.shape[-1])
    tokens = _ordered(tokens, order.restore)
    if shape.resized:
        tokens = _resized(tokens, shape.padded, (shape.height, shape.width))
    return tokens


def _ordered(tokens: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    if len(order) == tokens.shape[1]:
        return tokens.index_select(1, order)
    return tokens.flatten(0, 1).index_select(0, order).view(tokens.shape)


def _resized(tokens: torch.Tensor, size: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    # Contiguous, since the channels-last kernel rounds differently from the one that the published package gets.
    image = tokens.transpose(1, 2).reshape(-1, tokens.shape[-1], *size).contiguous()
    return functional.interpolate(image, size=target, mode="bicubic").flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class _WindowedForward:
    """Stands in for the ``forward`` of a windowed block's self-attention."""

    forward: Callable[..., torch.Tensor]
    index: int
    shape: WindowShape

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        order: TokenOrder = kwargs.pop(WINDOW_ORDERS)[self.index]
        windows = to_windows(hidden_states, order, self.shape)
        return from_windows(self.forward(windows, *args, **kwargs), order, self.shape)


def submodule(unet: nn.Module, name: str) -> nn.Module:
    """Returns the module called ``name``.

    Raises:
        InputError: there is none.
    """
    try:
        return unet.get_submodule(name)
    except AttributeError as error:
        advice = "Check that the family is the checkpoint's."
        raise InputError("The UNet lacks a module of its family.", given=name, advice=advice) from error


def install_windows(
    unet: nn.Module, windowed_blocks: Sequence[str], windows: Sequence[WindowShape], handles: ExitStack
) -> None:
    """Cuts the self-attention of ``windowed_blocks`` into windows until ``handles`` is closed.

    The attention's ``forward`` is shadowed rather than hooked: the order is needed before and after it, and a pair of
    hooks could only pass it on by storing it.

    Raises:
        InputError: the UNet has no such blocks.
    """
    if not windowed_blocks:
        return
    windowed = [submodule(unet, f"{block}.attn1") for block in windowed_blocks]
    for module in unet.modules():
        if isinstance(module, Attention) and module not in windowed:
            handles.callback(module.register_forward_pre_hook(_without_orders, with_kwargs=True).remove)
    for index, (attention, shape) in enumerate(zip(windowed, windows, strict=True)):
        _shadow_forward(attention, _WindowedForward(attention.forward, index, shape), handles)


def _without_orders(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # The blocks hand all cross_attention_kwargs to every attention, which warns of those its processor does not know.
    return args, {key: value for key, value in kwargs.items() if key != WINDOW_ORDERS}


def _shadow_forward(module: nn.Module, forward: Callable[..., torch.Tensor], handles: ExitStack) -> None:
    own = vars(module)
    if "forward" in own:  # as accelerate's offloading leaves it
        handles.callback(own.__setitem__, "forward", own["forward"])
    else:
        handles.callback(own.pop, "forward")
    own["forward"] = forward
