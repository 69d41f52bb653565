"""The denoiser's runs from a picture beside diffusers' own pipelines under HiDiffusion: same seed, each step's latents.

The engines are PyTorch itself, and pictures are given as latents, so that a VAE computes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hidiff_export import apply_hidiffusion
from hidiff_export.families.family import Task, default_scheduler
from hidiff_export.recipe import Recipe
from hidiff_export.reference.reference_weights import networks_of_store
from hidiff_export.scheduler_tables.diffusers_schedulers import build_scheduler
from hidiff_export.scheduler_tables.scheduler_probe import probe
from hidiff_runtime import TorchGenerator
from hidiff_runtime import open as open_bundle
from hidiff_runtime.denoising.init_image import InitImage, MaskBlend
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.phases import Phase, PhasePlan
from hidiff_runtime.sampling import planned_schedule
from tests.export.verification.torch_bundle import TorchBackend, build, write_manifest
from tests.parity import pipelines

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' DEIS, on numpy 2

SIDE, SEED, GUIDANCE = 16, 5, 4.0
BOUND = 1e-5
"""Largest difference over the largest value of a step's latents: float32 rounding alone, measured 3.3e-6 at most."""


@dataclass(frozen=True)
class Case:
    """A picture, an optional mask and a pipeline of diffusers that takes both."""

    pipeline: str
    sampler: str
    steps: int
    strength: float
    channels: int = 4

    @property
    def recipe(self) -> Recipe:
        return recipe("sdxl" if "XL" in self.pipeline else "sd15", self.channels)

    @property
    def masked(self) -> bool:
        return "Inpaint" in self.pipeline


SD, XL, SD_INPAINT, XL_INPAINT = (
    f"StableDiffusion{kind}Pipeline" for kind in ("Img2Img", "XLImg2Img", "Inpaint", "XLInpaint")
)
CASES = {
    "sd15": Case(SD, "pndm", 10, 0.75),
    "sd15, noise in each step": Case(SD, "euler_ancestral", 8, 0.5),
    "sd15, second order": Case(SD, "heun", 7, 0.6),
    "sd15, whole run": Case(SD, "ddim", 3, 1.0),
    "sdxl": Case(XL, "dpmpp_2m", 10, 0.8),
    "sdxl, few steps": Case(XL, "unipc", 20, 0.3),
    "sd15 inpainting": Case(SD_INPAINT, "pndm", 10, 0.75),
    "sd15 inpainting from noise": Case(SD_INPAINT, "euler_ancestral", 4, 1.0),
    "sd15 inpainting, 9 channels": Case(SD_INPAINT, "pndm", 8, 0.5, channels=9),
    "sdxl inpainting": Case(XL_INPAINT, "unipc", 8, 0.7),
    "sdxl inpainting, 9 channels": Case(XL_INPAINT, "dpmpp_2m_sde", 8, 0.9999, channels=9),
}


@functools.cache
def recipe(family: str, channels: int) -> Recipe:
    task = Task.INPAINTING if channels == 9 else Task.TEXT_TO_IMAGE
    return Recipe.from_dict(
        {
            **{"family": family, "task": task.value, "source": "random:0", "unet_width": "tiny"},
            **{"width": 8 * SIDE, "height": 8 * SIDE, "steps": [2], "text": False, "vae": False},
        }
    )


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """A bundle of each recipe, with the tables of every sampler that a case of it asks for."""

    @functools.cache
    def make(recipe: Recipe) -> Path:
        folder = build(recipe, tmp_path_factory.mktemp("bundle") / "bundle", reference=False)
        manifest, tables = Manifest.read(folder), {}
        config = default_scheduler(recipe.family)[1]
        cases = [case for case in CASES.values() if case.recipe == recipe]
        steps = sorted({case.steps for case in cases})
        for name in {*manifest.samplers, *(case.sampler for case in cases)}:
            tables[name] = f"samplers/{name}.safetensors"
            probe(name, config, steps).write(folder / tables[name])
        return write_manifest(folder, dataclasses.replace(manifest, samplers=tables, steps=tuple(steps)))

    return make


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """By the denoiser's names."""
    generator = torch.Generator().manual_seed(3)
    unet = case.recipe.unet_config()
    prompts = torch.randn(2, 77, unet["cross_attention_dim"], generator=generator)
    given = {"prompt_embeds": prompts[:1], "negative_prompt_embeds": prompts[1:]}
    if case.recipe.family.is_sdxl:
        pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        embeds = torch.randn(2, pooled, generator=generator)
        given |= {"text_embeds": embeds[:1], "negative_text_embeds": embeds[1:]}
    given["image_latents"] = torch.randn(1, 4, SIDE, SIDE, generator=generator)
    if case.masked:
        given["mask"] = torch.zeros(1, 1, SIDE, SIDE)
        given["mask"][..., 3:12, 5:14] = 1
    if case.channels == 9:
        given["masked_image_latents"] = torch.randn(1, 4, SIDE, SIDE, generator=generator)
    return given


@functools.cache
@functools.cache
def diffusers_steps(case: Case, folder: Path) -> list[np.ndarray]:
    """The latents after each logical step of diffusers' pipeline under HiDiffusion."""
    given, recipe = inputs(case), case.recipe
    pipe = pipelines.build(pipelines.Case(case.pipeline, recipe.family, recipe.task))
    config = default_scheduler(recipe.family)[1]
    pipe.register_modules(unet=networks_of_store(folder, recipe).unet, scheduler=build_scheduler(case.sampler, config))
    call: dict[str, Any] = {
        **{name: given[name] for name in ("prompt_embeds", "negative_prompt_embeds")},
        **{"image": given["image_latents"], "strength": case.strength, "num_inference_steps": case.steps},
        **{"guidance_scale": GUIDANCE, "output_type": "latent"},
    }
    if recipe.family.is_sdxl:
        call["pooled_prompt_embeds"] = given["text_embeds"]
        call["negative_pooled_prompt_embeds"] = given["negative_text_embeds"]
    if case.masked:
        call |= {"height": 8 * SIDE, "width": 8 * SIDE}
        call["mask_image"] = given["mask"].repeat_interleave(8, 2).repeat_interleave(8, 3)
        call["masked_image_latents"] = given.get("masked_image_latents", torch.zeros(1, 4, SIDE, SIDE))
    with apply_hidiffusion(pipe, family=recipe.family):
        every = pipelines.trajectory(pipe, call, SEED)
    order = pipe.scheduler.order
    return [latents.numpy() for latents in (*every[order - 1 : -1 : order], every[-1])]


def bundle_steps(case: Case, folder: Path, **changes: Any) -> list[np.ndarray]:
    """The latents after each step of the denoiser; the last are the result."""
    given = {name: tensor.numpy() for name, tensor in inputs(case).items()}
    after: list[np.ndarray] = []
    arguments: dict[str, Any] = {
        **given,
        **{"steps": case.steps, "strength": case.strength, "sampler": case.sampler, "seed": SEED},
        "guidance_scale": GUIDANCE,
        **changes,
    }
    backend: Any = TorchBackend(case.recipe)
    with open_bundle(folder, backend=backend, verify="size") as bundle:
        latents = bundle.denoiser().denoise(**arguments, callback=lambda info: after.append(info.latents))
    assert np.array_equal(latents, after[-1])
    return after


def difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float(np.abs(mine - due).max() / np.abs(due).max()) for mine, due in pairs)


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_diffusers(bundles: Callable[[Recipe], Path], name: str) -> None:
    case = CASES[name]
    folder = bundles(case.recipe)
    expected = diffusers_steps(case, folder)
    found = bundle_steps(case, folder)
    assert difference(found, expected) < BOUND
    if case.masked and case.channels == 4:
        kept = (inputs(case)["mask"] == 0).expand(1, 4, -1, -1)
        assert np.array_equal(found[-1][kept], inputs(case)["image_latents"][kept])


def whole_plan(case: Case) -> Callable[..., PhasePlan]:
    """Phases counted over all steps that were asked for, as if none had been left out."""

    class Whole(PhasePlan):
        def phase_at(self, step: int) -> Phase:
            return self.rule.phase_at(step + case.steps - int(case.steps * case.strength), case.steps)

    return Whole


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd15 inpainting"])
def test_phases_are_of_the_steps_that_are_run(
    bundles: Callable[[Recipe], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case = CASES[name]
    folder = bundles(case.recipe)
    expected = diffusers_steps(case, folder)
    monkeypatch.setattr(planned_schedule, "PhasePlan", whole_plan(case))
    assert difference(bundle_steps(case, folder), expected) > 100 * BOUND


@pytest.mark.parametrize("name", ["sd15", "sdxl, few steps", "sd15 inpainting, 9 channels"])
def test_another_start_or_seed_is_noticed(bundles: Callable[[Recipe], Path], name: str) -> None:
    case = CASES[name]
    folder = bundles(case.recipe)
    expected = diffusers_steps(case, folder)
    for step in (-1, 1):
        other = bundle_steps(case, folder, strength=case.strength + step / case.steps)
        assert difference(other[-1:], expected[-1:]) > 100 * BOUND
    assert difference(bundle_steps(case, folder, seed=SEED + 1), expected) > 100 * BOUND


def test_the_blends_noise_is_the_runs(bundles: Callable[[Recipe], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["sdxl inpainting"]
    folder = bundles(case.recipe)
    expected = diffusers_steps(case, folder)

    blend = InitImage.blend

    def anew(source: InitImage, schedule: Any, noise: np.ndarray) -> MaskBlend | None:
        return blend(source, schedule, TorchGenerator(77).randn(noise.shape))

    monkeypatch.setattr(InitImage, "blend", anew)
    found = bundle_steps(case, folder)
    assert difference(found, expected) > 100 * BOUND
    assert difference(found[-1:], expected[-1:]) > BOUND


def test_no_blend_is_noticed(bundles: Callable[[Recipe], Path]) -> None:
    case = CASES["sdxl inpainting"]
    folder = bundles(case.recipe)
    assert difference(bundle_steps(case, folder, mask=None), diffusers_steps(case, folder)) > 100 * BOUND
