"""Whole pictures from the same prompt and seed: the runtime's pipeline beside diffusers' own under HiDiffusion.

Both have the same fabricated checkpoint, and each its own tokenizer, text encoders, loop and VAE. Most bundles' engines
are PyTorch modules, which takes a second; two bundles have ONNX Runtime's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import ImageOps

from hidiff_export.families.family import Family, default_scheduler
from hidiff_export.recipe import Recipe
from hidiff_export.reference.tolerances import TOLERANCES, Boundary
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.pipeline.pipeline import Pipeline
from hidiff_runtime.verification.comparison import Metrics
from tests.parity.pictures import (
    Picture,
    diffusers_pipeline,
    expected,
    generated,
    half_mask,
    module_bundle,
    opened,
    painting,
)

SD, SD_I2I, SD_INPAINT, SD_CONTROL, SD_CONTROL_I2I = (
    f"StableDiffusion{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img")
)
XL, XL_I2I, XL_INPAINT, XL_CONTROL_I2I = (
    f"StableDiffusionXL{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint", "ControlNetImg2Img")
)
BOUND = TOLERANCES[Boundary.RUN, "float32"].snr_db
ROUNDED_OTHERWISE = 0.02
"""The most 8-bit values that may differ, as a part of all; none by more than one level.

A ten-thousandth does, and a hundredth where a masked picture comes in: PyTorch's group normalization is 40 dB less
exact on channels-last tensors, which diffusers makes of Pillow's pictures.
"""

SIZE = {"width": 128, "height": 128}
# A ControlNet sees latents of 128 at the longer side, 8x128 here, which is cheap.
WIDE = {"width": 768, "height": 64}
# Runs of 5 steps have every phase of SD, and those of 7 every phase of SDXL.
SD_STEPS, XL_STEPS = 5, 7


def recipe(family: str, task: str = "text-to-image", **changed: Any) -> Recipe:
    sdxl = family.startswith("sdxl")
    return Recipe.from_dict(
        {
            "family": family,
            "task": task,
            "source": "random:0",
            "unet_width": "tiny",
            "text": True,
            "vae": True,
            "sampler": "euler" if sdxl else "pndm",
            "steps": [XL_STEPS if sdxl else SD_STEPS],
            **SIZE,
            **changed,
        }
    )


RECIPES = {
    "sd15": recipe("sd15"),
    "sd15 inpainting": recipe("sd15", "inpainting"),
    "sd15 controlnet": recipe("sd15", "controlnet", controlnet="random:1", **WIDE),
    "sd21 controlnet": recipe("sd21", "controlnet-image-to-image", controlnet="random:1", **WIDE),
    "sd21 velocity": recipe("sd21", batch=2, width=192, sampler="ddim", prediction="v_prediction"),
    "sdxl": recipe("sdxl"),
    "sdxl inpainting": recipe("sdxl", "inpainting"),
    "sdxl controlnet": recipe("sdxl", "controlnet-image-to-image", controlnet="random:1", **WIDE),
    "sdxl-turbo": recipe("sdxl-turbo", guidance=False, sampler="euler_ancestral"),
}
VELOCITY = {**default_scheduler(Family.SD21)[1], "prediction_type": "v_prediction"}

PROMPT, NEGATIVE = "A lighthouse at dusk, oil on canvas", "blurry, grey"
OTHER = "A lighthouse at dawn, oil on canvas"
PAINTING, MASK = painting(**SIZE, seed=1), half_mask(**SIZE)
WIDE_PAINTING, EDGES = painting(**WIDE, seed=2), painting(**WIDE, seed=3)
ASKED = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 5.0, "seed": 5}
SIZES = {
    "original_size": (96, 160),
    "crops": (8, 24),
    "target_size": (128, 112),
    "negative_original_size": (64, 72),
    "negative_crops": (16, 0),
    "negative_target_size": (120, 128),
}
OTHER_PROMPT, OTHER_SEED = {"prompt": OTHER}, {"seed": 6}


@dataclass(frozen=True)
class Case:
    """One way to ask for a picture, in the runtime's words.

    Args:
        recipe: by its name.
        pipeline: diffusers' class.
        asked: beside what all are asked; None leaves one of those out.
        wrong: changes that have to show in the picture.
    """

    recipe: str
    pipeline: str
    asked: Mapping[str, Any] = field(default_factory=dict)
    wrong: tuple[Mapping[str, Any], ...] = (OTHER_SEED,)

    @property
    def whole(self) -> dict[str, Any]:
        """All that is asked."""
        steps = RECIPES[self.recipe].steps[0]
        given = {**ASKED, "steps": steps, **self.asked}
        return {name: value for name, value in given.items() if value is not None}


IN_PICTURE = {"image": PAINTING, "strength": 0.6}
ONE_STEP_LESS = {"strength": 0.4}
INSIDE = {**IN_PICTURE, "mask": MASK, "strength": 0.8}
OUTSIDE = {"mask": ImageOps.invert(MASK)}
CONTROLLED = {"control_image": EDGES, "conditioning_scale": 0.8}
OTHER_EDGES, WEAKER = {"control_image": ImageOps.invert(EDGES)}, {"conditioning_scale": 0.7}
RESCALED, NOT_RESCALED = {"guidance_rescale": 0.7}, ({"guidance_rescale": None}, {"guidance_rescale": 0.6})
CASES = {
    "sd15": Case("sd15", SD, wrong=(OTHER_SEED, OTHER_PROMPT, {"negative_prompt": None}, {"guidance_scale": 5.1})),
    "sd15 clip skip": Case("sd15", SD, {"clip_skip": 1}, ({"clip_skip": 0},)),
    "sd15 guidance scale 1": Case("sd15", SD, {"guidance_scale": 1.0}, ({"guidance_scale": 1.1},)),
    "sd15 no negative prompt": Case("sd15", SD, {"negative_prompt": None}, ({"negative_prompt": NEGATIVE},)),
    "sd15 rescaled": Case("sd15", SD, RESCALED, NOT_RESCALED),
    "sdxl image-to-image, rescaled": Case("sdxl", XL_I2I, {**IN_PICTURE, **RESCALED}, NOT_RESCALED),
    "sdxl inpainting, rescaled": Case("sdxl inpainting", XL_INPAINT, {**INSIDE, **RESCALED}, NOT_RESCALED),
    "sd15 image-to-image": Case("sd15", SD_I2I, IN_PICTURE, (ONE_STEP_LESS, OTHER_SEED)),
    "sd15 mask blend": Case("sd15", SD_INPAINT, INSIDE, (OUTSIDE, {"strength": 0.6})),
    "sd15 mask blend from noise": Case("sd15", SD_INPAINT, {**INSIDE, "strength": 1.0}, (OUTSIDE,)),
    "sd15 inpainting": Case("sd15 inpainting", SD_INPAINT, INSIDE, (OUTSIDE, {"strength": 0.6})),
    "sd15 inpainting from noise": Case("sd15 inpainting", SD_INPAINT, {**INSIDE, "strength": 1.0}, (OUTSIDE,)),
    "sd15 controlnet": Case("sd15 controlnet", SD_CONTROL, CONTROLLED, (OTHER_EDGES, WEAKER)),
    "sd21 controlnet image-to-image": Case(
        "sd21 controlnet",
        SD_CONTROL_I2I,
        {**CONTROLLED, "image": WIDE_PAINTING, "strength": 0.6},
        (OTHER_EDGES, ONE_STEP_LESS),
    ),
    "sd21 velocity, two oblong pictures": Case(
        "sd21 velocity",
        SD,
        {"prompt": [PROMPT, OTHER], "negative_prompt": [NEGATIVE, ""]},
        ({"prompt": [OTHER, PROMPT]}, {"prompt": [PROMPT, PROMPT]}),
    ),
    "sdxl": Case("sdxl", XL, SIZES, (OTHER_PROMPT, *({name: (80, 80)} for name in SIZES))),
    "sdxl by default": Case("sdxl", XL, {"negative_prompt": None}, ({"negative_prompt": ""},)),
    "sdxl clip skip": Case("sdxl", XL, {"clip_skip": 1}, ({"clip_skip": 0},)),
    "sdxl image-to-image": Case("sdxl", XL_I2I, IN_PICTURE, (ONE_STEP_LESS,)),
    "sdxl mask blend": Case("sdxl", XL_INPAINT, INSIDE, (OUTSIDE, {"strength": 0.6})),
    "sdxl inpainting": Case("sdxl inpainting", XL_INPAINT, INSIDE, (OUTSIDE, {"strength": 0.6})),
    "sdxl controlnet image-to-image": Case(
        "sdxl controlnet",
        XL_CONTROL_I2I,
        {**CONTROLLED, "image": WIDE_PAINTING, "strength": 0.6},
        (OTHER_EDGES, ONE_STEP_LESS),
    ),
    "sdxl-turbo": Case("sdxl-turbo", XL, {"guidance_scale": None, "negative_prompt": None}, (OTHER_PROMPT,)),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the bundle of a recipe by its name, built when it is first asked for."""
    base, built = tmp_path_factory.mktemp("pictures"), dict[str, Path]()

    def of(name: str) -> Path:
        if name not in built:
            built[name] = module_bundle(RECIPES[name], base / name.replace(" ", "-"))
        return built[name]

    return of


def reference_pipeline(case: Case, kind: str | None = None) -> Any:
    scheduler = diffusers.DDIMScheduler.from_config(VELOCITY) if case.recipe == "sd21 velocity" else None
    return diffusers_pipeline(RECIPES[case.recipe], kind or case.pipeline, scheduler)


def snr_db(reference: Picture, found: Picture) -> float:
    return Metrics.of(reference.exact, found.exact).snr_db


def assert_alike(reference: Picture, found: Picture) -> None:
    """Within the bound of a run before rounding, and at most a level apart in a few values after it."""
    assert snr_db(reference, found) >= BOUND
    apart = np.abs(reference.rounded.astype(int) - found.rounded)
    assert apart.max() <= 1
    assert np.count_nonzero(apart) <= ROUNDED_OTHERWISE * apart.size
    # A picture of one colour, or of black and white alone, would show nothing.
    inside = (reference.exact > 0) & (reference.exact < 1)
    assert inside.mean() > 0.5
    assert reference.exact.std() > 0.05


@pytest.mark.parametrize("name", CASES)
def test_the_picture_is_diffusers_own(name: str, bundle: Callable[[str], Path]) -> None:
    case = CASES[name]
    asked = case.whole
    reference = expected(reference_pipeline(case), RECIPES[case.recipe], asked)
    with opened(bundle(case.recipe), RECIPES[case.recipe]) as pipe:
        assert_alike(reference, generated(pipe, **asked))
        for change in case.wrong:
            changed = {key: value for key, value in {**asked, **change}.items() if value is not None}
            assert snr_db(reference, generated(pipe, **changed)) < BOUND, change


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd15 controlnet"])
def test_without_hidiffusion_the_picture_is_another(name: str, bundle: Callable[[str], Path]) -> None:
    case = CASES[name]
    stock = expected(reference_pipeline(case), RECIPES[case.recipe], case.whole, hidiffusion=False)
    with opened(bundle(case.recipe), RECIPES[case.recipe]) as pipe:
        assert snr_db(stock, generated(pipe, **case.whole)) < BOUND


def test_a_controlnet_at_scale_0_is_none(bundle: Callable[[str], Path]) -> None:
    case = CASES["sd15 controlnet"]
    plain = {name: value for name, value in case.whole.items() if name not in CONTROLLED}
    reference = expected(reference_pipeline(case, SD), RECIPES[case.recipe], plain)
    with opened(bundle(case.recipe), RECIPES[case.recipe]) as pipe:
        assert_alike(reference, generated(pipe, **{**case.whole, "conditioning_scale": 0.0}))
        assert snr_db(reference, generated(pipe, **{**case.whole, "conditioning_scale": 0.1})) < BOUND


def test_real_engines_make_it_too(sd15_bundle: Path) -> None:
    case, own = CASES["sd15"], Recipe.from_dict(Manifest.read(sd15_bundle).recipe)
    asked = {**case.whole, "steps": own.steps[0]}
    scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(default_scheduler(Family.SD15)[1])
    reference = expected(diffusers_pipeline(own, case.pipeline, scheduler), own, asked)
    with Pipeline.open(sd15_bundle) as pipe:
        assert_alike(reference, generated(pipe, **asked))
        assert snr_db(reference, generated(pipe, **{**asked, **OTHER_PROMPT})) < BOUND


@pytest.mark.slow
def test_real_engines_of_sdxl_make_it_too(tmp_path: Path) -> None:
    """One phase is enough: which runs when is the same whatever the engines are."""
    one_phase = {"thresholds": {"strided": 1.0, "pooled": 1.0}}
    case, short = CASES["sdxl"], recipe("sdxl", hidiffusion=one_phase, steps=[3])
    asked = {**case.whole, "steps": 3}
    reference = expected(diffusers_pipeline(short, case.pipeline), short, asked)
    with Pipeline.open(module_bundle(short, tmp_path / "bundle", exported=True)) as pipe:
        assert_alike(reference, generated(pipe, **asked))
        assert snr_db(reference, generated(pipe, **{**asked, **OTHER_PROMPT})) < BOUND
