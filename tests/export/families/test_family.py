"""Architectures and layouts are the published checkpoints' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers import schedulers as diffusers_schedulers

from hidiff_export.families.family import Family, Task, Width, controlnet_config, default_scheduler, unet_config
from hidiff_export.families.hidiffusion_rules import Layout

# Counted on the published checkpoints, in millions.
UNET_PARAMETERS = {Family.SD15: 859.52, Family.SD21: 865.91, Family.SDXL: 2567.46}
CONTROLNET_PARAMETERS = {Family.SD15: 361.28, Family.SD21: 364.23, Family.SDXL: 1251.01}


def _millions(model: torch.nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2)


def _unet(family: Family, width: Width, task: Task = Task.TEXT_TO_IMAGE) -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel(**unet_config(family, task, width))


@pytest.mark.parametrize("family", CONTROLNET_PARAMETERS)
def test_a_full_controlnet_has_the_published_parameters(family: Family) -> None:
    with torch.device("meta"):
        controlnet = ControlNetModel(**controlnet_config(family))
    assert _millions(controlnet) == CONTROLNET_PARAMETERS[family]


@pytest.mark.parametrize("family", [Family.SDXL_TURBO, Family.PLAYGROUND])
def test_sdxl_variants_share_its_architecture(family: Family) -> None:
    assert unet_config(family, Task.TEXT_TO_IMAGE) == unet_config(Family.SDXL, Task.TEXT_TO_IMAGE)


def test_inpainting_adds_the_mask_and_the_masked_picture() -> None:
    plain, inpainting = (unet_config(Family.SDXL, task, Width.TINY) for task in (Task.TEXT_TO_IMAGE, Task.INPAINTING))
    assert inpainting == plain | {"in_channels": 9}
    assert plain["in_channels"] == 4


@pytest.mark.parametrize("family", [Family.SD15, Family.SDXL])
def test_every_place_of_the_layout_exists(family: Family) -> None:
    layout = Layout.of(family)
    modules = dict(_unet(family, Width.TINY).named_modules())
    places = (layout.downsampler, layout.pooled_attention, layout.restored_attention, *layout.windowed_blocks)
    assert not [place for place in places if place not in modules]
    assert len(layout.windowed_blocks) == (10 if family.is_sdxl else 5)


def test_windows_can_be_switched_off_alone() -> None:
    layout = Layout.of(Family.SDXL)
    stock = layout.without_windows()
    assert stock.windowed_blocks == ()
    assert stock.downsampler == layout.downsampler


@pytest.mark.parametrize("family", [Family.SD15, Family.SD21, Family.SDXL])
def test_full_width_is_the_published_size_and_tiny_keeps_every_module_in_its_place(family: Family) -> None:
    full_unet = _unet(family, Width.FULL)
    full, tiny = dict(full_unet.named_modules()), dict(_unet(family, Width.TINY).named_modules())
    # SDXL's tiny UNet has 2 instead of 10 transformer blocks at the deepest level, and nothing else less.
    missing = {name for name in full.keys() - tiny.keys() if "transformer_blocks" not in name}
    assert not missing
    assert _millions(full_unet) == UNET_PARAMETERS[family]
    assert not tiny.keys() - full.keys()
    assert {type(full[name]) for name in tiny} == {type(module) for module in tiny.values()}


@pytest.mark.parametrize("family", Family)
def test_schedulers_take_their_configuration(family: Family) -> None:
    name, config = default_scheduler(family)
    scheduler = getattr(diffusers_schedulers, name).from_config(config)
    assert {key: scheduler.config.get(key) for key in config} == config


def test_configurations_are_not_shared() -> None:
    unet_config(Family.SD15, Task.TEXT_TO_IMAGE)["block_out_channels"].append(0)
    assert 0 not in unet_config(Family.SD15, Task.TEXT_TO_IMAGE)["block_out_channels"]
