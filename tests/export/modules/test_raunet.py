"""The changes themselves, and that a UNet is exactly as before when they are taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from hidiff_export.checkpoints.component import Component
from hidiff_export.errors import InputError
from hidiff_export.families.family import Family
from hidiff_export.families.geometry import UNetGeometry
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.modules.raunet import every_other, install_phase, pooled, restored
from hidiff_export.modules.window_attention import WINDOW_ORDERS, WindowTables
from hidiff_runtime.phases import Phase, PhaseKind
from tests.export.checkpoints.snapshots import snapshot
from tests.parity.pipelines import network

BOTH = Phase(PhaseKind.STRIDED_POOLED)


@pytest.mark.parametrize("size", range(1, 41))
def test_stride_four_is_a_slice_and_stride_two(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    image = torch.randn(2, 3, size, 41 - size, dtype=torch.float64, generator=generator)
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64, generator=generator)
    bias = torch.randn(5, dtype=torch.float64, generator=generator)
    published = functional.conv2d(image, weight, bias, stride=4, padding=2, dilation=2)
    assert torch.equal(functional.conv2d(every_other(image), weight, bias, stride=2, padding=1), published)


def test_pooling_rounds_up() -> None:
    image = torch.tensor([[[[1.0, 3.0, 10.0], [5.0, 7.0, 20.0], [2.0, 4.0, 6.0]]]])
    assert pooled(image).tolist() == [[[[4.0, 15.0], [3.0, 6.0]]]]


def test_restoring_keeps_a_constant_and_takes_any_size() -> None:
    assert torch.allclose(restored(torch.full((1, 2, 3, 4), 7.0), (5, 9)), torch.full((1, 2, 5, 9), 7.0))


def call(unet: Any, geometry: UNetGeometry) -> torch.Tensor:
    shifts = torch.ones(len(geometry.windows), dtype=torch.int32)
    kwargs = {WINDOW_ORDERS: WindowTables(geometry.windows)(shifts)} if geometry.windows else None
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, geometry.latent_height, geometry.latent_width, generator=generator)
    prompt = torch.randn(1, 77, 32, generator=generator)
    with torch.no_grad():
        return unet(latents, 500, prompt, cross_attention_kwargs=kwargs, return_dict=False)[0]


def test_a_live_unet_gets_a_phase_and_is_as_before_afterwards() -> None:
    unet = network(Component.UNET, Family.SD15)
    layout = Layout.of(Family.SD15)
    geometry = UNetGeometry.of(unet.config, layout, BOTH, 16, 16)
    stock = UNetGeometry.of(unet.config, layout.without_windows(), Phase(PhaseKind.WINDOWED), 16, 16)
    before = snapshot(unet)
    expected = call(unet, stock)
    with install_phase(unet, layout, geometry):
        assert snapshot(unet) != before
        assert not torch.allclose(call(unet, geometry), expected, atol=1e-3)
    assert snapshot(unet) == before
    assert torch.equal(call(unet, stock), expected)


def test_a_failing_call_leaves_nothing_behind() -> None:
    unet = network(Component.UNET, Family.SD15)
    layout = Layout.of(Family.SD15)
    geometry = UNetGeometry.of(unet.config, layout, BOTH, 16, 16)
    before = snapshot(unet)
    with pytest.raises(RuntimeError, match="channels"), install_phase(unet, layout, geometry):
        unet(torch.zeros(1, 5, 16, 16), 500, torch.zeros(1, 77, 32))
    assert snapshot(unet) == before


def test_a_failing_installation_leaves_nothing_behind() -> None:
    unet = network(Component.UNET, Family.SD15)
    # SD has all of SDXL's places but the second transformer block, which is looked for last.
    layout = Layout.of(Family.SDXL)
    geometry = UNetGeometry.of(unet.config, layout, BOTH, 16, 16)
    before = snapshot(unet)
    with pytest.raises(InputError, match="lacks a module") as caught:
        install_phase(unet, layout, geometry)
    assert caught.value.given == "down_blocks.1.attentions.0.transformer_blocks.1.attn1"
    assert snapshot(unet) == before


def test_a_failing_hook_registration_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = network(Component.UNET, Family.SD15)
    layout = Layout.of(Family.SD15)
    geometry = UNetGeometry.of(unet.config, layout, BOTH, 16, 16)
    before = snapshot(unet)
    last = unet.get_submodule(f"{layout.windowed_blocks[-1]}.attn2")
    monkeypatch.setattr(last, "register_forward_pre_hook", None)
    with pytest.raises(TypeError):
        install_phase(unet, layout, geometry)
    monkeypatch.undo()
    assert snapshot(unet) == before
