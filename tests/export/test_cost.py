"""Counted costs are the ones measured on the published package, and what torch's own counter finds."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from hidiff_export.cost import controlnet_cost, stock_geometry, unet_cost, unet_parameters
from hidiff_export.families import Family, Layout, Task, Width, controlnet_config, unet_config
from hidiff_export.geometry import UNetGeometry
from hidiff_runtime.phases import Phase, PhaseKind

# TFLOPs of one evaluation at batch 1, measured with the published package.
STOCK = "stock"
MEASURED = [
    (Family.SD15, 1024, {STOCK: 4.67, "windowed": 3.39, "strided": 1.81}),
    (Family.SD15, 2048, {STOCK: 42.2, "windowed": 21.6, "strided": 12.6, "strided_pooled": 11.3}),
    (Family.SDXL, 2048, {STOCK: 35.9, "windowed": 30.8, "strided": 13.3, "pooled": 9.97}),
    (Family.SDXL, 4096, {STOCK: 288.0, "windowed": 205.0, "pooled": 52.6, "strided_pooled": 35.2}),
]

# Of the published UNet, and of a ControlNet beside it.
FULL_PARAMETERS = {
    Family.SD15: (859_520_964, 361_279_120),
    Family.SD21: (865_910_724, 364_228_240),
    Family.SDXL: (2_567_463_684, 1_251_014_160),
}


def _flops(family: Family, width: Width, kind: str, latent: tuple[int, int]) -> int:
    config, layout = unet_config(family, Task.TEXT_TO_IMAGE, width), Layout.of(family)
    if kind == STOCK:
        return unet_cost(config, *stock_geometry(config, layout, *latent)).flops
    return unet_cost(config, layout, UNetGeometry.of(config, layout, Phase(PhaseKind(kind)), *latent)).flops


@pytest.mark.parametrize(
    ("family", "pixels", "kind", "tera"),
    [(family, pixels, kind, tera) for family, pixels, costs in MEASURED for kind, tera in costs.items()],
)
def test_costs_are_the_measured_ones(family: Family, pixels: int, kind: str, tera: float) -> None:
    latent = (pixels // 8, pixels // 8)
    assert _flops(family, Width.FULL, kind, latent) / 1e12 == pytest.approx(tera, rel=0.01)


def _inputs(family: Family, config: dict[str, object], height: int, width: int) -> dict[str, object]:
    inputs: dict[str, object] = {
        "sample": torch.zeros(1, 4, height, width, device="meta"),
        "timestep": torch.zeros(1, device="meta"),
        "encoder_hidden_states": torch.zeros(1, 77, config["cross_attention_dim"], device="meta"),
    }
    if family.is_sdxl:
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(1, 32, device="meta"),
            "time_ids": torch.zeros(1, 6, device="meta"),
        }
    return inputs


def _counted(model: torch.nn.Module, **inputs: object) -> int:
    model.set_attn_processor(AttnProcessor())  # plain products, which the counter sees on every device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", [Family.SD15, Family.SD21, Family.SDXL])
def test_the_stock_unet_costs_what_torch_counts(family: Family) -> None:
    latent = (15, 22)
    config = unet_config(family, Task.TEXT_TO_IMAGE, Width.TINY)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert _flops(family, Width.TINY, STOCK, latent) == _counted(unet, **_inputs(family, config, *latent))


@pytest.mark.parametrize("family", [Family.SD15, Family.SDXL])
def test_a_controlnet_costs_what_torch_counts(family: Family) -> None:
    config, latent = controlnet_config(family, Width.TINY), (16, 24)
    with torch.device("meta"):
        controlnet = ControlNetModel(**config)
        picture = torch.zeros(1, 3, 8 * latent[0], 8 * latent[1])
    counted = _counted(controlnet, controlnet_cond=picture, **_inputs(family, config, *latent))
    unet = unet_config(family, Task.TEXT_TO_IMAGE, Width.TINY)
    assert controlnet_cost(config, unet, Layout.of(family), *latent).flops == counted


@pytest.mark.parametrize("task", [Task.TEXT_TO_IMAGE, Task.INPAINTING])
@pytest.mark.parametrize("family", [Family.SD15, Family.SD21, Family.SDXL])
def test_parameters_are_the_models(family: Family, task: Task) -> None:
    config = unet_config(family, task, Width.TINY)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert unet_parameters(config, Layout.of(family)) == sum(p.numel() for p in unet.parameters())


def test_controlnet_parameters_are_the_models() -> None:
    config, unet = controlnet_config(Family.SDXL, Width.TINY), unet_config(Family.SDXL, Task.TEXT_TO_IMAGE, Width.TINY)
    with torch.device("meta"):
        controlnet = ControlNetModel(**config)
    counted = controlnet_cost(config, unet, Layout.of(Family.SDXL), 16, 16).parameters
    assert counted == sum(p.numel() for p in controlnet.parameters())


@pytest.mark.parametrize(("family", "parameters"), FULL_PARAMETERS.items())
def test_full_parameters_are_the_published_ones(family: Family, parameters: tuple[int, int]) -> None:
    config, layout = unet_config(family, Task.TEXT_TO_IMAGE), Layout.of(family)
    counted = (
        unet_parameters(config, layout),
        controlnet_cost(controlnet_config(family), config, layout, 8, 8).parameters,
    )
    assert counted == parameters
