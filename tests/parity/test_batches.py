"""A batch whose pictures have generators of their own: each is diffusers' picture of its generator without neighbors.

In PyTorch under ``apply_hidiffusion``, by engines in the place of a pipeline's UNet, and by the runtime alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hidiff_runtime
from hidiff_export import apply_hidiffusion
from hidiff_export.compiler.compile import build
from hidiff_export.diffusers_api.bundle_unet import BundleUNet
from hidiff_export.families.family import Family
from hidiff_export.recipe import Recipe
from hidiff_export.reference.tolerances import TOLERANCES, Boundary
from hidiff_runtime import InputError
from hidiff_runtime.verification.comparison import compare
from hidiff_runtime.verification.replay import check
from tests.conftest import NoDisplay
from tests.parity.pipelines import Case, arguments, trajectory
from tests.parity.pipelines import build as build_pipeline

CASE = Case(
    "StableDiffusionPipeline",
    Family.SD15,
    scheduler="EulerAncestralDiscreteScheduler",
    steps=3,
    call={"num_images_per_prompt": 3, "guidance_scale": 4.0},
)
SEEDS = (11, 4, 7)
BOUND = TOLERANCES[Boundary.RUN, "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 128x128 that draws one picture a run or three."""
    found = tmp_path_factory.mktemp("bundle") / "bundle"
    size = {"width": 128, "height": 128, "batches": [1, 3], "text": False, "vae": False}
    recipe = Recipe.from_dict(
        {
            "family": "sd15",
            "source": "random:0",
            "unet_width": "tiny",
            "sampler": "euler_ancestral",
            "steps": [3],
            **size,
        }
    )
    build(recipe, found, NoDisplay())
    return found


def call(case: Case = CASE) -> dict[str, Any]:
    width = arguments(case)["prompt_embeds"].shape[-1]
    prompts = torch.randn(2, 1, 77, width, generator=torch.Generator().manual_seed(3))
    return {**arguments(case), "prompt_embeds": prompts[0], "negative_prompt_embeds": prompts[1]}


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def together(seeds: Sequence[int] = SEEDS) -> list[np.ndarray]:
    """The latents after each step, of PyTorch."""
    with apply_hidiffusion(pipe := build_pipeline(CASE)):
        return [after.numpy() for after in trajectory(pipe, call(), generator=generators(seeds))]


def off(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> list[int]:
    """The steps after which latents are further apart than a whole run's bound."""
    pairs = enumerate(zip(expected, found, strict=True))
    return [step for step, (one, other) in pairs if not compare("run", one, other, BOUND).ok]


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    return together()


def test_in_pytorch_each_is_as_without_neighbors(expected: list[np.ndarray]) -> None:
    alone = replace(CASE, call={**CASE.call, "num_images_per_prompt": 1})
    for row, seed in enumerate(SEEDS):
        with apply_hidiffusion(pipe := build_pipeline(alone)) as handle:
            single = [after.numpy() for after in trajectory(pipe, call(alone), seed)]
            assert handle.window_shifts is not None
            assert handle.window_shifts.shape == (5,)
        assert off(single, [after[row : row + 1] for after in expected]) == []
        other = [after[row - 1 : row or None] for after in expected]
        assert off(single, other) == [0, 1, 2]


def test_one_generator_shifts_all_alike(expected: list[np.ndarray]) -> None:
    """The control: with one generator a picture has the shifts of its batch, as ever."""
    with apply_hidiffusion(pipe := build_pipeline(CASE)) as handle:
        coupled = trajectory(pipe, call(), SEEDS[0])
        assert handle.window_shifts is not None
        assert handle.window_shifts.ndim == 1
    assert off([after[1:] for after in expected], [after[1:].numpy() for after in coupled]) == [0, 1, 2]


@pytest.mark.parametrize("batch", [1, 3])
def test_engines_in_a_pipeline(folder: Path, expected: list[np.ndarray], batch: int) -> None:
    pipe = build_pipeline(CASE)
    with hidiff_runtime.open(folder) as bundle:
        pipe.unet = BundleUNet(bundle.sized(batch=batch))
        found = [after.numpy() for after in trajectory(pipe, call(), generator=generators(SEEDS))]
    assert off(expected, found) == []


def run(bundle: hidiff_runtime.Bundle, seeds: Any) -> np.ndarray:
    batch, given = bundle.manifest.batch, call()
    embeds = {name: given[name].numpy().repeat(batch, 0) for name in ("prompt_embeds", "negative_prompt_embeds")}
    return bundle.denoiser().denoise(**embeds, steps=CASE.steps, seed=seeds, guidance_scale=4.0)


def test_the_runtime_draws_diffusers_pictures(folder: Path, expected: list[np.ndarray]) -> None:
    with hidiff_runtime.open(folder) as bundle:
        three = bundle.sized(batch=3)
        assert off(expected[-1:], [run(three, SEEDS)]) == []
        for row, seed in enumerate(SEEDS):
            assert off([expected[-1][row : row + 1]], [run(bundle, seed)]) == []
        turned = run(three, SEEDS[::-1])
        assert off(expected[-1:], [turned]) == [0]
        assert off(expected[-1:], [turned[::-1]]) == []


@pytest.mark.parametrize("seeds", [SEEDS[:2], (*SEEDS, 1)])
def test_seeds_are_as_many_as_pictures(folder: Path, seeds: tuple[int, ...]) -> None:
    with hidiff_runtime.open(folder) as bundle, pytest.raises(InputError, match="3 pictures a run"):
        run(bundle.sized(batch=3), seeds)


def test_both_batches_are_proven(folder: Path) -> None:
    """Recorded calls of the larger batch have shifts that differ from row to row."""
    report = check(folder)
    assert report.ok
    assert {verdict.bucket for verdict in report.verdicts if verdict.bucket} >= {"128x128, batch 3"}
