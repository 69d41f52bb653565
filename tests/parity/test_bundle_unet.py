"""A bundle in the place of a real pipeline's UNet, against ``apply_hidiffusion`` on the PyTorch UNet it was built from:
diffusers' own classes, schedulers, loops and callbacks on both sides, and the same seed.

ONNX Runtime's engines where the session's SD1.5 bundle serves, PyTorch in the engines' place for the other kinds.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hidiff_runtime
from hidiff_export import apply_hidiffusion
from hidiff_export.diffusers_api.bundle_unet import BundleUNet
from hidiff_export.errors import EngineError, InputError
from hidiff_export.families.family import Family, Task, Width, unet_config
from hidiff_export.recipe import Recipe
from hidiff_export.reference.tolerances import TOLERANCES, Boundary
from hidiff_runtime.phases import PhaseRule
from hidiff_runtime.verification.comparison import compare
from tests.export.verification.torch_bundle import TorchBackend, use
from tests.export.verification.torch_bundle import build as build_torch_bundle
from tests.parity.pipelines import Case, arguments, build, scheduler_of, trajectory

SD, SD_I2I, SD_INPAINT, SD_CONTROL = (
    f"StableDiffusion{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint", "ControlNet")
)
XL, XL_CONTROL, XL_CONTROL_I2I = (
    f"StableDiffusionXL{kind}Pipeline" for kind in ("", "ControlNet", "ControlNetImg2Img")
)
BOUND = TOLERANCES[Boundary.RUN, "float32"]

SD15 = Case(SD, Family.SD15, steps=5)
ON_ENGINES = {
    "guidance": SD15,
    "three without guidance": replace(SD15, steps=2, call={"num_images_per_prompt": 3, "guidance_scale": 1.0}),
    "second order": replace(SD15, scheduler="HeunDiscreteScheduler", steps=3),
    "noise in every step": replace(SD15, scheduler="EulerAncestralDiscreteScheduler"),
    "image-to-image": Case(SD_I2I, Family.SD15, steps=6, call={"strength": 0.75}),
    "mask blend": Case(SD_INPAINT, Family.SD15, call={"strength": 0.8}),
}
# A ControlNet sees latents of 128 at the longer side. 192 makes that a downscale, and 16 keeps it cheap.
WIDE: dict[str, Any] = {"height": 16, "width": 192}
CONTROL_CALL = {"controlnet_conditioning_scale": 0.8}
IN_PYTORCH = {
    "sdxl": Case(XL, Family.SDXL, steps=7),  # the fewest with every phase
    "inpainting": Case(SD_INPAINT, Family.SD15, Task.INPAINTING),
    "sd15 controlnet": Case(SD_CONTROL, Family.SD15, Task.CONTROLNET, steps=3, call=CONTROL_CALL, **WIDE),
    "sdxl controlnet": Case(XL_CONTROL, Family.SDXL, Task.CONTROLNET, steps=3, call=CONTROL_CALL, **WIDE),
    "sdxl controlnet image-to-image": Case(
        XL_CONTROL_I2I,
        Family.SDXL,
        Task.CONTROLNET_IMAGE_TO_IMAGE,
        steps=4,
        call={**CONTROL_CALL, "strength": 0.8},
        **WIDE,
    ),
}


def given(case: Case) -> dict[str, Any]:
    """What the pipeline is called with, the prompt as long as a bundle's."""
    call = arguments(case)
    config = unet_config(case.family, case.task, Width.TINY)
    prompts = torch.randn(2, 1, 77, config["cross_attention_dim"], generator=torch.Generator().manual_seed(3))
    return {**call, "prompt_embeds": prompts[0], "negative_prompt_embeds": prompts[1]}


@functools.cache
def reference(case: Case, seed: int = 1) -> list[torch.Tensor]:
    with apply_hidiffusion(pipe := build(case)):
        return trajectory(pipe, given(case), seed)


def off(expected: list[torch.Tensor], found: list[torch.Tensor]) -> list[int]:
    """The steps after which the latents are further apart than a whole run's bound."""
    assert len(expected) == len(found)
    pairs = enumerate(zip(expected, found, strict=True))
    return [step for step, (a, b) in pairs if not compare("run", a.numpy(), b.numpy(), BOUND).ok]


@functools.cache
def recipe_of(case: Case) -> Recipe:
    size = {"width": 8 * case.width, "height": 8 * case.height}
    task = {"task": case.task.value}
    return Recipe.from_dict(
        {"family": case.family.value, **task, **size, "source": "random:0", "unet_width": "tiny", "steps": [1]}
    )


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """The bundle for a pipeline, each built once."""

    @functools.cache
    def built(recipe: Recipe) -> Path:
        return build_torch_bundle(recipe, tmp_path_factory.mktemp("bundle"), reference=False)

    return lambda case: built(recipe_of(case))


@pytest.mark.parametrize("case", ON_ENGINES.values(), ids=ON_ENGINES)
def test_engines_give_every_step_of_apply_hidiffusion(sd15_bundle: Path, case: Case) -> None:
    pipe = build(case)
    with BundleUNet(sd15_bundle, verify="size") as pipe.unet:
        assert off(reference(case), trajectory(pipe, given(case))) == []


@pytest.mark.parametrize("case", IN_PYTORCH.values(), ids=IN_PYTORCH)
def test_every_kind_of_pipeline_takes_a_bundle(
    folder_of: Callable[[Case], Path], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(case)
    use(TorchBackend(recipe_of(case)), monkeypatch)
    pipe = build(case)
    with BundleUNet(folder) as pipe.unet:
        assert off(reference(case), trajectory(pipe, given(case))) == []


@pytest.fixture(scope="module")
def sd15(folder_of: Callable[[Case], Path]) -> Path:
    return folder_of(SD15)


@pytest.fixture
def unet(sd15: Path, monkeypatch: pytest.MonkeyPatch) -> BundleUNet:
    """An SD1.5 bundle's, PyTorch in the engines' place."""
    use(TorchBackend(recipe_of(SD15)), monkeypatch)
    return BundleUNet(sd15)


def run(unet: Any, case: Case = SD15, **call: Any) -> list[torch.Tensor]:
    pipe = build(case)
    pipe.unet = unet
    return trajectory(pipe, given(case) | call)


def test_a_bundle_in_one_phase_all_through_gives_other_latents(unet: BundleUNet) -> None:
    unet.bundle.manifest = replace(unet.bundle.manifest, rule=PhaseRule())
    assert len(off(reference(SD15), run(unet))) == len(reference(SD15))


def test_shifts_of_another_seed_give_other_latents(unet: BundleUNet) -> None:
    case = replace(SD15, scheduler="DDIMScheduler")  # draws nothing, so that only the shifts can differ
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    with apply_hidiffusion(pipe := build(case)):
        expected = trajectory(pipe, given(case) | {"latents": latents}, seed=1)
    pipe = build(case)
    pipe.unet = unet
    assert off(expected, trajectory(pipe, given(case) | {"latents": latents}, seed=1)) == []
    assert off(expected, trajectory(pipe, given(case) | {"latents": latents}, seed=2)) == [0, 1, 2, 3, 4]


def test_a_run_may_be_broken_off_and_a_scheduler_put_in_between_runs(unet: BundleUNet) -> None:
    pipe = build(SD15)
    pipe.unet = unet

    def stop(_pipe: Any, step: int, _timestep: Any, _given: Any) -> dict[str, Any]:
        if step == 1:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        pipe(**given(SD15), callback_on_step_end=stop)
    assert off(reference(SD15), trajectory(pipe, given(SD15))) == []
    case = replace(SD15, scheduler="HeunDiscreteScheduler", steps=3)
    pipe.scheduler = scheduler_of(Family.SD15, case.scheduler)
    assert off(reference(case), trajectory(pipe, given(case))) == []


def test_pipelines_that_share_the_unet_each_follow_their_own_run(unet: BundleUNet) -> None:
    first, second = build(SD15), build(ON_ENGINES["image-to-image"])
    first.unet = second.unet = unet
    for _ in range(2):
        assert off(reference(SD15), trajectory(first, given(SD15))) == []
        case = ON_ENGINES["image-to-image"]
        assert off(reference(case), trajectory(second, given(case))) == []


def test_another_unet_in_its_place_finds_everything_as_it_was(folder_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(IN_PYTORCH["sd15 controlnet"], steps=1)
    use(TorchBackend(recipe_of(case)), monkeypatch)
    pipe = build(case)
    own, owners = pipe.unet, (pipe, pipe.scheduler, pipe.controlnet)
    expected = trajectory(pipe, given(case))
    before = [set(vars(owner)) for owner in owners]
    with BundleUNet(folder_of(case)) as pipe.unet:
        assert off(expected, trajectory(pipe, given(case))) == [0]
        assert [set(vars(owner)) for owner in owners] != before
        pipe.unet = own
        assert torch.equal(trajectory(pipe, given(case))[0], expected[0])
        assert [set(vars(owner)) for owner in owners] == before


def test_closing_leaves_the_pipeline_as_it_was_and_keeps_a_bundle_that_was_open(sd15: Path, unet: BundleUNet) -> None:
    with hidiff_runtime.open(sd15) as bundle:
        pipe = build(SD15)
        before = set(vars(pipe.scheduler))
        pipe.unet = BundleUNet(bundle)
        trajectory(pipe, given(SD15))
        pipe.unet.close()
        assert set(vars(pipe.scheduler)) == before
        assert bundle.open_phases
    run(unet)
    assert unet.bundle.open_phases
    unet.close()
    assert not unet.bundle.open_phases


def test_the_size_need_not_be_given_and_the_dtype_is_the_pipelines(unet: BundleUNet) -> None:
    pipe = build(SD15)
    pipe.vae = copy.deepcopy(pipe.vae)  # other tests' pipelines share it, and it is about to change its type
    pipe.unet = unet
    call = {name: value for name, value in given(SD15).items() if name not in ("height", "width")}
    assert off(reference(SD15), trajectory(pipe, call)) == []
    pipe.to(torch.bfloat16)
    assert unet.dtype == torch.bfloat16
    assert trajectory(pipe, {**call, "num_inference_steps": 1})[0].dtype == torch.bfloat16


def test_a_loop_of_ones_own_names_its_pipeline(unet: BundleUNet) -> None:
    case = replace(SD15, scheduler="DDIMScheduler", call={"guidance_scale": 1.0})
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    with apply_hidiffusion(pipe := build(case)):
        pipe.scheduler.set_timesteps(3)
        expected = loop(pipe, case, latents)
    pipe = build(case)
    pipe.unet = unet
    pipe.scheduler.set_timesteps(3)
    with pytest.raises(InputError, match="called outside a pipeline"):
        loop(pipe, case, latents)
    unet.follow(pipe)
    assert off([expected], [loop(pipe, case, latents)]) == []


def loop(pipe: Any, case: Case, latents: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            noise = pipe.unet(latents, timestep, given(case)["prompt_embeds"], return_dict=False)[0]
            latents = pipe.scheduler.step(noise, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ({"height": 256, "width": 256}, "height=128, width=128"),
        ({"cross_attention_kwargs": {"gligen": {}}}, "cross_attention_kwargs(.|\n)*lora in the recipe"),
        ({"ip_adapter_image_embeds": [torch.zeros(2, 1, 1, 4)]}, "image_embeds|encoder_hid_proj"),
    ],
    ids=["size", "attention options", "ip-adapter"],
)
def test_what_the_graphs_cannot_do_is_refused(unet: BundleUNet, call: dict[str, Any], match: str) -> None:
    with pytest.raises((InputError, AttributeError), match=match):
        run(unet, **call)


def test_what_a_bundle_has_not_says_that_it_is_fixed(unet: BundleUNet) -> None:
    assert not hasattr(unet, "load_lora_adapter")
    with pytest.raises(AttributeError, match="fixed when it is built"):
        unet.load_lora_adapter({})


def test_a_pipeline_of_another_task_or_family_is_refused(unet: BundleUNet, folder_of: Any) -> None:
    with pytest.raises(InputError, match="was built for text-to-image"):
        run(unet, replace(IN_PYTORCH["sd15 controlnet"], height=16, width=16))
    with pytest.raises(InputError, match="Use a pipeline for sdxl, text-to-image"):
        run(BundleUNet(folder_of(IN_PYTORCH["sdxl"])))


def test_a_bundle_does_not_take_over_in_the_middle_of_a_run(unet: BundleUNet) -> None:
    pipe = build(SD15)

    def swap(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe.unet = unet
        return {}

    with pytest.raises(InputError, match="in the middle of a run"):
        pipe(**given(SD15), callback_on_step_end=swap)


def test_nan_names_phase_and_step(sd15: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = TorchBackend(recipe_of(SD15), spoil=lambda out: {name: np.full_like(a, np.nan) for name, a in out.items()})
    use(spoilt, monkeypatch)
    with pytest.raises(EngineError, match="phase strided, step 1 of 6"):
        run(BundleUNet(sd15))
