"""A bundle that leaves work out, in the place of a pipeline's UNet: against ``apply_hidiffusion`` with its settings.

PyTorch in the engines' place where the kind of pipeline matters, ONNX Runtime's engines in one slow test.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import seal

import hidiff_runtime
from hidiff_export import Forecast, Reuse, apply_hidiffusion
from hidiff_export.compiler.compile import build as build_bundle
from hidiff_export.diffusers_api.bundle_unet import BundleUNet
from hidiff_export.errors import InputError
from hidiff_export.recipe import Recipe
from tests.conftest import NoDisplay
from tests.export.verification.torch_bundle import TorchBackend, use
from tests.export.verification.torch_bundle import build as build_torch_bundle
from tests.parity.pipelines import Case, build, trajectory
from tests.parity.test_bundle_unet import CONTROL_CALL, IN_PYTORCH, SD15, given, off

STEPS = 12
FORECAST = Forecast(warm_up=2, growth=0.0, last=0.3)
"""With it a run has a shallow evaluation in every phase, and forecast ones between."""
SETTINGS: dict[str, Any] = {"guidance_until": 0.6, "reuse": 3, "forecast": FORECAST}
DDIM = replace(SD15, scheduler="DDIMScheduler", steps=STEPS)
CASES = {
    "sd15": DDIM,
    "three without guidance": replace(DDIM, call={"num_images_per_prompt": 3, "guidance_scale": 1.0}),
    "two rescaled": replace(DDIM, call={"num_images_per_prompt": 2, "guidance_rescale": 0.7}),
    "second order": replace(DDIM, scheduler="HeunDiscreteScheduler", steps=6),
    "noise in every step": replace(DDIM, scheduler="EulerAncestralDiscreteScheduler"),
    "from a picture": replace(DDIM, pipeline="StableDiffusionImg2ImgPipeline", call={"strength": 0.8}),
    "sdxl": replace(IN_PYTORCH["sdxl"], steps=STEPS),
    "inpainting": replace(IN_PYTORCH["inpainting"], scheduler="DDIMScheduler", steps=STEPS),
}
CONTROLS = {
    "sd15": replace(IN_PYTORCH["sd15 controlnet"], scheduler="DDIMScheduler", steps=STEPS),
    "sdxl in guess mode": replace(
        IN_PYTORCH["sdxl controlnet"],
        steps=STEPS,
        call={**CONTROL_CALL, "guess_mode": True, "num_images_per_prompt": 2},
    ),
}


def recipe_of(case: Case, settings: Mapping[str, Any]) -> Recipe:
    size = {"width": 8 * case.width, "height": 8 * case.height}
    own: dict[str, Any] = {**settings}
    if "forecast" in own:
        own["forecast"] = vars(own["forecast"])
    if "reuse" in own:
        own["reuse"] = {"every": own["reuse"], "depth": 1}
    return Recipe.from_dict(
        {"family": case.family.value, "task": case.task.value, **size, **own}
        | {"source": "random:0", "unet_width": "tiny", "sampler": "ddim", "steps": [STEPS]}
    )


def run(pipe: Any, case: Case, **call: Any) -> list[torch.Tensor]:
    return trajectory(pipe, given(case) | call)


@functools.cache
def applied(case: Case, **settings: Any) -> list[torch.Tensor]:
    with apply_hidiffusion(pipe := build(case), **settings):
        return run(pipe, case)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """A recipe's bundle with PyTorch in the engines' place, each built once."""
    return functools.cache(
        lambda recipe: build_torch_bundle(recipe, tmp_path_factory.mktemp("bundle"), reference=False)
    )


@pytest.fixture
def unet_of(folder_of: Callable[[Recipe], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., BundleUNet]:
    """Makes the UNet of a bundle with these settings."""

    def made(case: Case, settings: Mapping[str, Any] = SETTINGS, **options: Any) -> BundleUNet:
        recipe = recipe_of(case, settings)
        use(TorchBackend(recipe), monkeypatch)
        return BundleUNet(folder_of(recipe), **options)

    return made


def on_bundle(unet: BundleUNet, case: Case, **call: Any) -> list[torch.Tensor]:
    pipe = build(case)
    with unet as pipe.unet:
        return run(pipe, case, **call)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_kind_of_pipeline_leaves_out_what_the_bundle_does(unet_of: Any, case: Case) -> None:
    assert off(applied(case, **SETTINGS), on_bundle(unet_of(case), case)) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", CONTROLS.values(), ids=CONTROLS)
def test_a_controlnet_is_asked_for_what_the_step_takes(unet_of: Any, case: Case) -> None:
    due, found = [], []
    for pipe, batches in ((build(case), due), (build(case), found)):
        pipe.controlnet.register_forward_pre_hook(
            lambda _module, args, kwargs, batches=batches: batches.append(len((*args, *kwargs.values())[0])),
            with_kwargs=True,
        )
        if batches is due:
            with apply_hidiffusion(pipe, **SETTINGS):
                expected = run(pipe, case)
        else:
            with unet_of(case) as pipe.unet:
                assert off(expected, run(pipe, case)) == []
    assert due == found


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_alone(unet_of: Any, name: str) -> None:
    alone = {name: SETTINGS[name]}
    found = on_bundle(unet_of(DDIM, alone), DDIM)
    assert off(applied(DDIM, **alone), found) == []
    assert off(applied(DDIM), found)


def test_a_full_run_leaves_nothing_out(unet_of: Any) -> None:
    assert off(applied(DDIM), on_bundle(unet_of(DDIM, full_run=True), DDIM)) == []


@pytest.mark.parametrize(
    "other",
    [
        {"guidance_until": 0.5},
        {"reuse": 2},
        {"reuse": Reuse(3, 2)},
        {"forecast": False},
        {"forecast": Forecast(warm_up=3, growth=0.0, last=0.3)},
    ],
    ids=repr,
)
def test_other_settings_give_other_latents(unet_of: Any, other: dict[str, Any]) -> None:
    assert off(applied(DDIM, **SETTINGS | other), on_bundle(unet_of(DDIM), DDIM))


def test_runs_know_nothing_of_each_other(unet_of: Any) -> None:
    pipe = build(DDIM)

    def stop(_pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 3:
            raise KeyboardInterrupt
        return {}

    with unet_of(DDIM) as pipe.unet:
        with pytest.raises(KeyboardInterrupt):
            pipe(**given(DDIM), callback_on_step_end=stop)
        assert off(applied(DDIM, **SETTINGS), run(pipe, DDIM)) == []


def test_a_list_of_generators_gives_each_picture_its_own_shifts(unet_of: Any) -> None:
    case = replace(DDIM, call={"num_images_per_prompt": 2})

    def two(pipe: Any) -> list[torch.Tensor]:
        return trajectory(pipe, given(case), generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)])

    with apply_hidiffusion(pipe := build(case), **SETTINGS):
        expected = two(pipe)
    pipe = build(case)
    with unet_of(case) as pipe.unet:
        assert off(expected, two(pipe)) == []


def stopping(pipe: Any, case: Case) -> list[torch.Tensor]:
    """A run whose callback turns guidance off after the fourth step, as diffusers' documentation does."""
    latents = []

    def stop(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].clone())
        if step != 3:
            return {}
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}

    inputs = ["latents", "prompt_embeds"]
    generator = torch.Generator().manual_seed(1)
    pipe(**given(case), generator=generator, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=inputs)
    return latents


def test_a_batch_that_changes_in_mid_run_is_computed_whole(unet_of: Any) -> None:
    settings = {"guidance_until": 0.6, "reuse": 3}
    with apply_hidiffusion(pipe := build(DDIM), **settings):
        expected = stopping(pipe, DDIM)
    pipe = build(DDIM)
    with unet_of(DDIM, settings) as pipe.unet:
        assert off(expected, stopping(pipe, DDIM)) == []


@pytest.mark.parametrize("on_engines", [False, True])
def test_a_batch_that_changes_in_mid_run_cannot_be_forecast(unet_of: Any, on_engines: bool) -> None:
    pipe = build(DDIM)
    unet = unet_of(DDIM) if on_engines else None
    pipe.unet = unet or pipe.unet
    with unet or apply_hidiffusion(pipe, **SETTINGS), pytest.raises(InputError, match="changes in mid-run"):
        stopping(pipe, DDIM)


@pytest.mark.parametrize("name", ["reuse", "forecast"])
def test_several_calls_for_a_step_are_refused(unet_of: Any, name: str) -> None:
    pipe = build(DDIM)
    inputs = (torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 77, 32))
    with unet_of(DDIM, {name: SETTINGS[name]}) as pipe.unet, torch.no_grad():
        pipe.unet.follow(pipe)
        pipe.scheduler.set_timesteps(4)
        pipe.unet(*inputs)
        pipe.scheduler.step(inputs[0], pipe.scheduler.timesteps[0], inputs[0])
        pipe.unet(*inputs)
        with pytest.raises(InputError, match=r"more than once for a step(.|\n)*full_run=True"):
            pipe.unet(*inputs)


@pytest.mark.slow
def test_engines_leave_out_what_the_bundles_own_runs_do(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    build_bundle(recipe_of(DDIM, SETTINGS), folder, NoDisplay())
    expected = applied(DDIM, **SETTINGS)
    assert off(expected, on_bundle(BundleUNet(folder), DDIM)) == []
    assert off(applied(DDIM), on_bundle(BundleUNet(folder, full_run=True), DDIM)) == []
    with hidiff_runtime.open(folder) as bundle:
        call = {name: tensor.numpy() for name, tensor in given(DDIM).items() if name.endswith("prompt_embeds")}
        found = hidiff_runtime.Denoiser(bundle).denoise(**call, steps=STEPS, seed=1, guidance_scale=7.5)
        manifest = bundle.manifest
    assert off(expected[-1:], [torch.from_numpy(found)]) == []
    without = {name: value for name, value in SETTINGS.items() if name != "forecast"}
    shutil.rmtree(folder / "reference")  # whose forecast evaluations another manifest does not have
    seal(folder, replace(manifest, forecast=None, reference=None))
    assert off(applied(DDIM, **without), on_bundle(BundleUNet(folder), DDIM)) == []
