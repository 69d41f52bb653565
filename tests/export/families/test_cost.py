"""Counted costs are the ones measured on the published package, and what torch's own counter finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from hidiff_export.checkpoints.component import Component
from hidiff_export.families.cost import controlnet_cost, stock_geometry, unet_cost
from hidiff_export.families.family import Family, Task, Width, controlnet_config, unet_config
from hidiff_export.families.geometry import UNetGeometry
from hidiff_export.families.graph_io import phase_inputs
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.families.reuse_depths import DEPTHS, Cut
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_runtime.phases import Phase, PhaseKind
from tests.parity.published import unet_arguments

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


def _tiny(component: Component, family: Family) -> Any:
    """A network whose weights are whatever memory holds: only the sizes of its products are looked at."""
    model = component.empty(component.config(family, Task.TEXT_TO_IMAGE, Width.TINY)).to_empty(device="cpu")
    model.set_attn_processor(AttnProcessor())  # plain products, which the counter sees on every device
    return model


def _inputs(
    family: Family, kind: PhaseKind, latent: tuple[int, int], reuse_depth: int | None = None
) -> dict[str, torch.Tensor]:
    """Zeros for each input of a phase's graph."""
    config, layout = unet_config(family, Task.TEXT_TO_IMAGE, Width.TINY), Layout.of(family)
    dtypes = {"float32": torch.float32, "int32": torch.int32}
    phase = Phase(kind, shallow=reuse_depth is not None)
    specs = phase_inputs(config, layout, phase, *latent, model_batch=1, reuse_depth=reuse_depth)
    return {spec.name: torch.zeros(spec.shape, dtype=dtypes[spec.dtype]) for spec in specs}


def _counted(model: torch.nn.Module, **inputs: object) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", [Family.SD15, Family.SD21, Family.SDXL])
def test_the_stock_unet_costs_what_torch_counts(family: Family) -> None:
    latent = (15, 22)
    inputs = _inputs(family, PhaseKind.WINDOWED, latent)
    counted = _counted(
        _tiny(Component.UNET, family), sample=inputs["latents"], timestep=inputs["timestep"], **unet_arguments(inputs)
    )
    assert _flops(family, Width.TINY, STOCK, latent) == counted


@pytest.mark.parametrize(
    ("family", "kind"),
    [(Family.SD15, PhaseKind.STRIDED_POOLED), (Family.SDXL, PhaseKind.POOLED), (Family.SDXL, PhaseKind.STRIDED)],
)
def test_a_phase_costs_what_torch_counts_odd_windows_included(family: Family, kind: PhaseKind) -> None:
    latent = (15, 22)
    unet = PhaseUNet(_tiny(Component.UNET, family), Layout.of(family), Phase(kind), *latent)
    assert _flops(family, Width.TINY, kind.value, latent) == _counted(unet, **_inputs(family, kind, latent))


@pytest.mark.parametrize("depth", DEPTHS[Family.SD15])
@pytest.mark.parametrize("family", [Family.SD15, Family.SDXL])
def test_a_shallow_evaluation_costs_what_torch_counts(family: Family, depth: int) -> None:
    latent, kind = (15, 22), PhaseKind.STRIDED_POOLED
    config, layout = unet_config(family, Task.TEXT_TO_IMAGE, Width.TINY), Layout.of(family)
    geometry = UNetGeometry.of(config, layout, Phase(kind), *latent)
    counted = unet_cost(config, layout, geometry, Cut.of(config, depth))
    unet = PhaseUNet(_tiny(Component.UNET, family), layout, Phase(kind, shallow=True), *latent, reuse_depth=depth)
    assert counted.flops == _counted(unet, **_inputs(family, kind, latent, depth))
    assert counted.parameters == sum(parameter.numel() for parameter in unet.parameters())


@pytest.mark.parametrize("family", [Family.SD15, Family.SD21, Family.SDXL])
def test_a_controlnet_costs_what_torch_counts(family: Family) -> None:
    latent = (16, 24)
    inputs = _inputs(family, PhaseKind.WINDOWED, latent)
    counted = _counted(
        _tiny(Component.CONTROLNET, family),
        sample=inputs["latents"],
        timestep=inputs["timestep"],
        controlnet_cond=torch.zeros(1, 3, 8 * latent[0], 8 * latent[1]),
        **unet_arguments(inputs),
    )
    config, unet = controlnet_config(family, Width.TINY), unet_config(family, Task.TEXT_TO_IMAGE, Width.TINY)
    assert controlnet_cost(config, unet, Layout.of(family), *latent).flops == counted


@pytest.mark.parametrize("task", [Task.TEXT_TO_IMAGE, Task.INPAINTING])
@pytest.mark.parametrize("family", [Family.SD15, Family.SD21, Family.SDXL])
def test_parameters_are_the_models(family: Family, task: Task) -> None:
    config = unet_config(family, task, Width.TINY)
    unet = Component.UNET.empty(config)
    counted = unet_cost(config, *stock_geometry(config, Layout.of(family), 64, 64)).parameters
    assert counted == sum(p.numel() for p in unet.parameters())


def test_controlnet_parameters_are_the_models() -> None:
    config, unet = controlnet_config(Family.SDXL, Width.TINY), unet_config(Family.SDXL, Task.TEXT_TO_IMAGE, Width.TINY)
    controlnet = Component.CONTROLNET.empty(config)
    counted = controlnet_cost(config, unet, Layout.of(Family.SDXL), 16, 16).parameters
    assert counted == sum(p.numel() for p in controlnet.parameters())


@pytest.mark.parametrize(("family", "parameters"), FULL_PARAMETERS.items())
def test_full_parameters_are_the_published_ones(family: Family, parameters: tuple[int, int]) -> None:
    config, layout = unet_config(family, Task.TEXT_TO_IMAGE), Layout.of(family)
    counted = (
        unet_cost(config, *stock_geometry(config, layout, 64, 64)).parameters,
        controlnet_cost(controlnet_config(family), config, layout, 8, 8).parameters,
    )
    assert counted == parameters
