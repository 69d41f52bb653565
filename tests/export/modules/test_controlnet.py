"""A ControlNet at its own size beside a UNet at another, whatever the family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch.nn import functional

from hidiff_export import apply_hidiffusion
from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import load
from hidiff_export.errors import CheckpointError, InputError
from hidiff_export.families.family import Family, Task, Width, controlnet_config, unet_config
from hidiff_export.families.geometry import UNetGeometry
from hidiff_export.families.graph_io import control_residuals
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.modules.controlnet import ControlNetModule, control_image_size, fit_residuals, nearest
from hidiff_runtime.phases import Phase, PhaseKind
from tests.export.checkpoints.checkpoint_files import arrays, write_folder
from tests.parity.pipelines import SD15_NAME, Case, arguments, build, network, trajectory

FAMILIES = [Family.SD15, Family.SD21, Family.SDXL]
# A ControlNet sees latents of 128 at the longer side. 192 makes that a downscale, and 16 keeps it cheap.
HEIGHT, WIDTH = 16, 192
CONTROL_LATENT = (8, 128)
SD15 = Case(
    "StableDiffusionControlNetPipeline",
    Family.SD15,
    Task.CONTROLNET,
    SD15_NAME,
    "DDIMScheduler",
    height=HEIGHT,
    width=WIDTH,
    call={"guidance_scale": 1.0},
)


def inputs(family: Family, model_batch: int = 2) -> dict[str, torch.Tensor]:
    """Random inputs of a :class:`ControlNetModule`."""
    generator = torch.Generator().manual_seed(0)
    config = controlnet_config(family, Width.TINY)
    given = {
        "latents": torch.randn(model_batch, 4, HEIGHT, WIDTH, generator=generator),
        "timestep": torch.tensor([481.0]),
        "prompt_embeds": torch.randn(model_batch, 5, config["cross_attention_dim"], generator=generator),
        "control_image": torch.rand(model_batch, 3, *control_image_size(HEIGHT, WIDTH), generator=generator),
        "conditioning_scale": torch.tensor([0.7]),
    }
    if family.is_sdxl:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        given["text_embeds"] = torch.randn(model_batch, pooled, generator=generator)
        given["time_ids"] = torch.tensor([[128.0, 1536.0, 0.0, 0.0, 128.0, 1536.0]]).expand(model_batch, 6)
    return given


def geometry(family: Family, kind: PhaseKind, height: int = HEIGHT, width: int = WIDTH) -> UNetGeometry:
    config = unet_config(family, Task.CONTROLNET, Width.TINY)
    return UNetGeometry.of(config, Layout.of(family), Phase(kind, control=True), height, width)


# Sizes


def test_the_control_image_is_eight_times_the_latents() -> None:
    assert control_image_size(256, 256) == (1024, 1024)
    assert control_image_size(HEIGHT, WIDTH) == (64, 1024)


@pytest.mark.parametrize(
    ("family", "kind", "size"),
    [
        *((family, kind, (135, 95)) for family in FAMILIES for kind in PhaseKind),
        *((family, PhaseKind.STRIDED_POOLED, size) for family in FAMILIES for size in ((HEIGHT, WIDTH), (256, 384))),
    ],
    ids=str,
)
def test_residuals_come_to_the_unets_sizes(family: Family, kind: PhaseKind, size: tuple[int, int]) -> None:
    sizes = geometry(family, kind, *size)
    config = unet_config(family, Task.CONTROLNET, Width.TINY)
    specs = control_residuals(config, Layout.of(family), *size, model_batch=2)
    *given, given_mid = (torch.randn(spec.shape) for spec in specs)
    down, mid = fit_residuals(given, given_mid, sizes)
    assert [tuple(residual.shape[1:]) for residual in (*down, mid)] == [*sizes.skips, sizes.mid]
    for fitted, residual in zip((*down, mid), (*given, given_mid), strict=True):
        published = functional.interpolate(residual, tuple(fitted.shape[-2:]), mode="bicubic")
        torch.testing.assert_close(fitted, published, rtol=0, atol=0)


def test_a_bicubic_resize_to_the_same_size_changes_nothing() -> None:
    """So it is left out."""
    residual = torch.randn(1, 3, 7, 5)
    assert torch.equal(functional.interpolate(residual, (7, 5), mode="bicubic"), residual)


def test_residuals_of_another_family_are_refused() -> None:
    residuals = [torch.randn(1, 32, 8, 8)] * 9
    with pytest.raises(InputError, match="12 skip connections"):
        fit_residuals(residuals, residuals[0], geometry(Family.SD15, PhaseKind.STRIDED))


# As a module of its own


@pytest.mark.parametrize("family", FAMILIES)
def test_the_module_is_the_controlnet_at_its_own_size(family: Family) -> None:
    controlnet, given = network(Component.CONTROLNET, family), inputs(family)
    module = ControlNetModule(controlnet, HEIGHT, WIDTH)
    with torch.no_grad():
        residuals = module(**given)
        added = {key: given[key] for key in ("text_embeds", "time_ids") if key in given}
        down, mid = controlnet(
            functional.interpolate(given["latents"], CONTROL_LATENT),
            given["timestep"],
            given["prompt_embeds"],
            given["control_image"],
            0.7,
            added_cond_kwargs=added,
            return_dict=False,
        )
    config = unet_config(family, Task.CONTROLNET, Width.TINY)
    specs = control_residuals(config, Layout.of(family), HEIGHT, WIDTH, model_batch=2)
    assert [tuple(residual.shape) for residual in residuals] == [spec.shape for spec in specs]
    assert all(torch.equal(*pair) for pair in zip(residuals, (*down, mid), strict=True))


def test_a_half_precision_module_takes_and_gives_float32() -> None:
    module = ControlNetModule(network(Component.CONTROLNET, Family.SDXL).to(torch.bfloat16), HEIGHT, WIDTH)
    with torch.no_grad():
        assert {residual.dtype for residual in module(**inputs(Family.SDXL, 1))} == {torch.float32}


def test_the_module_exports_as_one_static_graph() -> None:
    controlnet, given = network(Component.CONTROLNET, Family.SDXL), inputs(Family.SDXL, model_batch=1)
    module = ControlNetModule(controlnet, HEIGHT, WIDTH)
    with torch.no_grad():
        expected = module(**given)
        program = torch.export.export(module, (), given)
        given["conditioning_scale"] = torch.tensor([1.4])
        doubled = program.module()(**given)
    for residual, double in zip(expected, doubled, strict=True):
        torch.testing.assert_close(2 * residual, double, rtol=1e-4, atol=1e-4)


# Beside a pipeline


def calls_of(module: torch.nn.Module) -> list[tuple[Any, ...]]:
    """Fills with the positional arguments of the module's calls."""
    calls: list[tuple[Any, ...]] = []
    module.register_forward_pre_hook(lambda _module, args: calls.append(args))
    return calls


@pytest.mark.parametrize(
    "case",
    [
        SD15,
        replace(SD15, family=Family.SD21, name="stabilityai/stable-diffusion-2-1-base"),
        replace(
            SD15, pipeline="StableDiffusionControlNetImg2ImgPipeline", task=Task.CONTROLNET_IMAGE_TO_IMAGE, steps=6
        ),
    ],
    ids=["sd15", "sd21", "image-to-image"],
)
def test_sd_pipelines_take_a_controlnet(case: Case) -> None:
    """The published package fails on these with a TypeError."""
    with apply_hidiffusion(pipe := build(case)) as hidiff:
        assert hidiff.task is case.task
        latents, images = calls_of(pipe.controlnet.conv_in), calls_of(pipe.controlnet.controlnet_cond_embedding)
        steered = trajectory(pipe, arguments(case))
    steps = len(steered)
    assert {tuple(call[0].shape[-2:]) for call in latents} == {CONTROL_LATENT}
    assert {tuple(call[0].shape[-2:]) for call in images} == {(64, 1024)}
    # Nothing is computed once the residuals are no longer used, after 0.6 of the steps.
    assert len(latents) == len(images) == sum(step < 0.6 * steps for step in range(steps)) < steps
    idle = replace(case, call={**case.call, "controlnet_conditioning_scale": 0.0})
    with apply_hidiffusion(pipe := build(case)):
        assert not torch.allclose(trajectory(pipe, arguments(idle))[0], steered[0], atol=1e-2)


def test_the_unet_gets_the_residuals_that_the_rule_lets_in() -> None:
    """Against a loop of our own: residuals from the module, resized by hand, into the UNet in its phase."""
    call = arguments(SD15)
    seen: list[tuple[Any, Any]] = []

    def see(_unet: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((kwargs["down_block_additional_residuals"], kwargs["mid_block_additional_residual"]))

    with apply_hidiffusion(pipe := build(SD15)):
        inputs_of_unet = calls_of(pipe.unet)
        pipe.unet.register_forward_pre_hook(see, with_kwargs=True)
        trajectory(pipe, call)
        calls = [(args[0], args[1]) for args in inputs_of_unet]
    assert [mid is None for _, mid in seen] == [False, False, False, True, True]
    module = ControlNetModule(network(Component.CONTROLNET, Family.SD15, seed=1), HEIGHT, WIDTH)
    image = nearest(call["image"], control_image_size(HEIGHT, WIDTH))
    for step, kind in enumerate([PhaseKind.STRIDED, PhaseKind.STRIDED, PhaseKind.WINDOWED]):
        latents, timestep = calls[step]
        with torch.no_grad():
            *down, mid = module(latents, timestep, call["prompt_embeds"], image, torch.tensor([1.0]))
        down, mid = fit_residuals(down, mid, geometry(Family.SD15, kind))
        given, given_mid = seen[step]
        for expected, residual in zip((*down, mid), (*given, given_mid), strict=True):
            torch.testing.assert_close(residual, expected)


def test_guess_mode_leaves_the_negative_prompt_alone() -> None:
    call = {**arguments(SD15), "guidance_scale": 4.0, "num_inference_steps": 2}
    with apply_hidiffusion(pipe := build(SD15)):
        guessed = trajectory(pipe, {**call, "guess_mode": True})
        assert not torch.allclose(guessed[-1], trajectory(pipe, call)[-1], atol=1e-2)


def test_several_controlnets_add_up() -> None:
    call = {**arguments(SD15), "num_inference_steps": 2}
    pipe = build(SD15)
    nets = [pipe.controlnet, network(Component.CONTROLNET, Family.SD15, seed=2)]
    parts = {**pipe.components, "controlnet": nets}
    several = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    several.set_progress_bar_config(disable=True)
    images = [call["image"], 1 - call["image"]]
    with apply_hidiffusion(several):
        both = trajectory(several, {**call, "image": images, "controlnet_conditioning_scale": [1.0, 0.5]})
        first = trajectory(several, {**call, "image": images, "controlnet_conditioning_scale": [1.0, 0.0]})
    with apply_hidiffusion(pipe):
        alone = trajectory(pipe, call)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[-1], alone[-1], atol=1e-2)


def test_an_idle_controlnet_gives_its_output_class_to_whoever_wants_it() -> None:
    with apply_hidiffusion(pipe := build(SD15)):
        pipe.scheduler.set_timesteps(1)
        pipe.scheduler.step(torch.zeros(1, 4, 8, 8), pipe.scheduler.timesteps[0], torch.zeros(1, 4, 8, 8))
        given = (torch.ones(1, 4, 8, 8), 1, torch.ones(1, 5, 32), torch.ones(1, 3, 64, 64))
        assert pipe.controlnet(*given).down_block_res_samples == ()
        assert pipe.controlnet(*given, return_dict=False)[0] == ()


def test_a_controlnet_that_pools_its_residuals_is_refused(tmp_path: Path) -> None:
    config = Component.CONTROLNET.config(Family.SD15, Task.CONTROLNET, Width.TINY)
    pooling = {**config, "global_pool_conditions": True}
    write_folder(tmp_path / "control", arrays(Component.CONTROLNET, config), pooling, "ControlNetModel")
    with pytest.raises(CheckpointError, match="controlnet pools its residuals over the picture") as caught:
        load(Component.CONTROLNET, str(tmp_path / "control"), Family.SD15, Task.CONTROLNET, Width.TINY)
    assert "global_pool_conditions True" in str(caught.value)
