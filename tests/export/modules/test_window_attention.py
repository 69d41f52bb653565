"""Windows as permutations, against the same thing done token by token and by rolling."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional

from hidiff_export.errors import InputError
from hidiff_export.families.geometry import SHIFTS, WindowShape
from hidiff_export.modules.window_attention import (
    WINDOW_ORDERS,
    TokenOrder,
    WindowTables,
    from_windows,
    install_windows,
    to_windows,
    token_orders,
)

SHAPES = [WindowShape(8, 8), WindowShape(16, 24), WindowShape(9, 14), WindowShape(40, 6), WindowShape(6, 40)]
EVEN = [shape for shape in SHAPES if not shape.resized]


def order_of(shape: WindowShape, quarters: int) -> TokenOrder:
    tables = token_orders(shape)
    return TokenOrder(tables.gather[quarters], tables.restore[quarters])


@pytest.mark.parametrize("quarters", range(SHIFTS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_windows_token_by_token(shape: WindowShape, quarters: int) -> None:
    rows, columns = shape.shift(quarters)
    height, width = shape.window
    expected = [
        (window_row * height + row + rows) % (2 * height) * (2 * width)
        + (window_column * width + column + columns) % (2 * width)
        for window_row in range(2)
        for window_column in range(2)
        for row in range(height)
        for column in range(width)
    ]
    assert order_of(shape, quarters).gather.tolist() == expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_restore_undoes_gather(shape: WindowShape) -> None:
    tables = token_orders(shape)
    assert tables.gather.dtype == tables.restore.dtype == torch.int32
    tokens = torch.arange(tables.gather.shape[1])
    for gather, restore in zip(*tables, strict=True):
        assert torch.equal(tokens[gather][restore], tokens)


@pytest.mark.parametrize("quarters", range(SHIFTS))
@pytest.mark.parametrize("shape", EVEN, ids=str)
def test_there_and_back_is_the_identity(shape: WindowShape, quarters: int) -> None:
    tokens = torch.randn(2, shape.height * shape.width, 3)
    order = order_of(shape, quarters)
    windows = to_windows(tokens, order, shape)
    assert windows.shape == (8, shape.window[0] * shape.window[1], 3)
    assert torch.equal(from_windows(windows, order, shape), tokens)


def test_windows_do_not_mix_pictures() -> None:
    shape = WindowShape(8, 8)
    tokens = torch.arange(2).repeat_interleave(64).view(2, 64, 1)
    assert to_windows(tokens, order_of(shape, 1), shape)[..., 0].unique(dim=1).flatten().tolist() == [0] * 4 + [1] * 4


def test_odd_sizes_are_resized_there_and_back() -> None:
    shape = WindowShape(9, 14)
    image = torch.randn(2, 3, 9, 14)
    order = order_of(shape, 3)
    tokens = image.flatten(2).transpose(1, 2)
    larger = functional.interpolate(image, size=(10, 14), mode="bicubic")
    expected = functional.interpolate(larger, size=(9, 14), mode="bicubic")
    windows = to_windows(tokens, order, shape)
    assert windows.shape == (8, 35, 3)
    assert torch.equal(from_windows(windows, order, shape), expected.flatten(2).transpose(1, 2))


def test_tables_are_shared_by_shape_and_stay_out_of_the_state_dict() -> None:
    inner, outer = WindowShape(8, 8), WindowShape(16, 16)
    tables = WindowTables([outer, inner, inner, outer])
    assert len(list(tables.buffers())) == 4
    assert not tables.state_dict()
    picked = tables(torch.tensor([3, 0, 2, 1], dtype=torch.int32))
    for order, shape, quarters in zip(picked, tables.windows, (3, 0, 2, 1), strict=True):
        assert torch.equal(order.gather, order_of(shape, quarters).gather)
        assert torch.equal(order.restore, order_of(shape, quarters).restore)


def test_tables_need_a_shift_for_each_block() -> None:
    with pytest.raises(ValueError, match="shorter"):
        WindowTables([WindowShape(8, 8)] * 2)(torch.zeros(1, dtype=torch.int32))


class Block(nn.Module):
    """What matters of a transformer block: two attentions that are handed the same keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attention(8, heads=2, dim_head=4)
        self.attn2 = Attention(8, heads=2, dim_head=4)

    def forward(self, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.attn2(tokens + self.attn1(tokens, **kwargs), **kwargs)


def test_attention_stays_inside_its_window() -> None:
    shape = WindowShape(8, 8)
    blocks = nn.ModuleDict({"one": Block(), "two": Block()}).requires_grad_(False)
    orders = WindowTables([shape])(torch.tensor([0], dtype=torch.int32))
    tokens = torch.randn(1, 64, 8)
    changed = tokens.clone()
    changed[0, 0] += 1  # in the first window
    attention = blocks["one"].attn1
    with ExitStack() as handles:
        install_windows(blocks, ["one"], [shape], handles)
        difference = attention(tokens, window_orders=orders) - attention(changed, window_orders=orders)
    touched = difference[0].abs().sum(dim=1).view(8, 8) > 0
    assert touched[:4, :4].all()
    assert not touched[4:].any()
    assert not touched[:, 4:].any()


def test_other_attentions_never_see_the_orders(caplog: pytest.LogCaptureFixture) -> None:
    shape = WindowShape(8, 8)
    blocks = nn.ModuleDict({"one": Block(), "two": Block()}).requires_grad_(False)
    tokens = torch.randn(1, 64, 8)
    kwargs = {WINDOW_ORDERS: WindowTables([shape])(torch.tensor([0], dtype=torch.int32))}
    expected = blocks["two"](tokens)
    with ExitStack() as handles:
        install_windows(blocks, ["one"], [shape], handles)
        blocks["one"](tokens, **kwargs)
        assert torch.equal(blocks["two"](tokens, **kwargs), expected)
    assert not caplog.records
    assert list(kwargs) == [WINDOW_ORDERS]


def test_a_forward_that_was_already_shadowed_comes_back() -> None:
    blocks = nn.ModuleDict({"one": Block()})
    attention = blocks["one"].attn1
    earlier = attention.forward
    attention.forward = earlier  # as accelerate's offloading does
    with ExitStack() as handles:
        install_windows(blocks, ["one"], [WindowShape(8, 8)], handles)
        assert vars(attention)["forward"] is not earlier
    assert vars(attention)["forward"] is earlier


def test_without_windowed_blocks_nothing_is_installed() -> None:
    blocks = nn.ModuleDict({"one": Block()})
    with ExitStack() as handles:
        install_windows(blocks, [], [], handles)
        assert not any(module._forward_pre_hooks for module in blocks.modules())


def test_a_block_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="lacks a module"), ExitStack() as handles:
        install_windows(nn.ModuleDict({"one": Block()}), ["three"], [WindowShape(8, 8)], handles)
