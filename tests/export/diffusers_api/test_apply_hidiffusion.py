"""HiDiffusion on a live pipeline follows its runs, whatever happens to them, and draws from their generators."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from hidiff_export import apply_hidiffusion
from hidiff_export.diffusers_api import apply_hidiffusion as patch
from hidiff_export.errors import InputError
from hidiff_export.families.family import Family, Task
from hidiff_export.families.hidiffusion_rules import Layout, phase_rule
from hidiff_runtime.phases import PhaseKind, PhasePlan, PhaseRule, StepRange
from tests.export.diffusers_api.live import CONTROLNET, SD15, cancel, equal, hidiffused
from tests.parity.pipelines import (
    PLAYGROUND_NAME,
    SDXL_NAME,
    TURBO_NAME,
    Case,
    arguments,
    build,
    scheduler_of,
    trajectory,
)

RULE = phase_rule(Family.SD15, Task.TEXT_TO_IMAGE, 64, 64)


def kinds_of(hidiff: patch.HiDiffusion, pipe: Any, call: Mapping[str, Any]) -> list[PhaseKind]:
    """The phase of each UNet call of one run."""
    kinds: list[PhaseKind] = []
    handle = pipe.unet.register_forward_hook(lambda *_: kinds.append(hidiff.phase.kind))  # type: ignore[union-attr]
    trajectory(pipe, call)
    handle.remove()
    return kinds


# Following the run


def test_phases_follow_the_plan() -> None:
    with apply_hidiffusion(pipe := build(SD15)) as hidiff:
        kinds = kinds_of(hidiff, pipe, arguments(SD15))
    assert kinds == [PhasePlan(RULE, 5).phase_at(step).kind for step in range(5)]
    assert kinds == [PhaseKind.STRIDED] * 2 + [PhaseKind.WINDOWED] * 3


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_cancelled_run_leaves_the_next_one_unharmed(step: int) -> None:
    with apply_hidiffusion(pipe := build(SD15)):
        cancel(pipe, arguments(SD15), step)
        assert equal(trajectory(pipe, arguments(SD15)), hidiffused(SD15))


def test_an_interrupted_run_leaves_the_next_one_unharmed() -> None:
    def interrupt(pipe: Any, _step: int, _timestep: Any, _given: Any) -> dict[str, Any]:
        pipe._interrupt = True
        return {}

    with apply_hidiffusion(pipe := build(SD15)):
        pipe(**arguments(SD15), callback_on_step_end=interrupt)
        assert equal(trajectory(pipe, arguments(SD15)), hidiffused(SD15))


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # diffusers' KDPM2 hands a tensor to numpy
@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_second_order_samplers_change_phase_between_steps(scheduler: str) -> None:
    case = replace(SD15, scheduler=scheduler)
    with apply_hidiffusion(pipe := build(case)) as hidiff:
        kinds = kinds_of(hidiff, pipe, arguments(case))
    assert kinds == [PhaseKind.STRIDED] * 4 + [PhaseKind.WINDOWED] * 5


def test_the_count_is_of_steps_not_of_unet_calls() -> None:
    kinds = []
    with apply_hidiffusion(pipe := build(SD15)) as hidiff:
        call, latents = arguments(SD15), torch.ones(1, 4, 8, 8)
        pipe.scheduler.set_timesteps(5)
        for timestep in pipe.scheduler.timesteps:
            for prompt in ("prompt_embeds", "negative_prompt_embeds"):
                noise = pipe.unet(sample=latents, timestep=timestep, encoder_hidden_states=call[prompt]).sample
                kinds.append(hidiff.phase.kind)  # type: ignore[union-attr]
            latents = pipe.scheduler.step(noise, timestep, latents).prev_sample
    assert kinds == [PhaseKind.STRIDED] * 4 + [PhaseKind.WINDOWED] * 6


def test_a_scheduler_put_in_between_runs_is_followed() -> None:
    euler = replace(SD15, scheduler="EulerDiscreteScheduler")
    with apply_hidiffusion(pipe := build(SD15)):
        cancel(pipe, arguments(SD15), 2)
        pipe.scheduler = scheduler_of(Family.SD15, "EulerDiscreteScheduler")
        assert equal(trajectory(pipe, arguments(euler)), hidiffused(euler))


@pytest.mark.parametrize("sizes", [(8, 12), (12, 8), (8, 10)])
def test_a_second_size_is_as_in_a_fresh_pipeline(sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hidiff_export.families.hidiffusion_rules._EXTREME_LATENT", {False: 12, True: 12})
    with apply_hidiffusion(pipe := build(SD15)) as hidiff:
        for size in sizes:
            case = replace(SD15, height=size, width=size)
            call = arguments(case)
            assert equal(trajectory(pipe, call), hidiffused(case))
            assert (PhaseKind.STRIDED_POOLED in kinds_of(hidiff, pipe, call)) == (size == 12)


def test_a_second_size_in_the_same_phase() -> None:
    with apply_hidiffusion(pipe := build(SD15), raunet=False):
        for size in (8, 12):
            case = replace(SD15, height=size, width=size, steps=2)
            assert equal(trajectory(pipe, arguments(case)), hidiffused(case, raunet=False))


def test_image_to_image_counts_the_steps_it_runs() -> None:
    case = replace(SD15, pipeline="StableDiffusionImg2ImgPipeline", steps=10, call={"strength": 0.5})
    with apply_hidiffusion(pipe := build(case)) as hidiff:
        assert kinds_of(hidiff, pipe, arguments(case)) == [PhaseKind.STRIDED] * 2 + [PhaseKind.WINDOWED] * 3


def test_a_rule_of_ones_own_is_kept() -> None:
    rule = PhaseRule(strided=StepRange(0.2, 0.6), pooled=StepRange(0.4, 0.8))
    with apply_hidiffusion(pipe := build(SD15), rule=rule) as hidiff:
        kinds = kinds_of(hidiff, pipe, arguments(SD15))
    assert kinds == [
        PhaseKind.WINDOWED,
        PhaseKind.STRIDED,
        PhaseKind.STRIDED_POOLED,
        PhaseKind.POOLED,
        PhaseKind.WINDOWED,
    ]


# Random numbers


def test_the_runs_generator_decides_everything() -> None:
    def run(seed: int, elsewhere: int, **options: Any) -> list[torch.Tensor]:
        with apply_hidiffusion(pipe := build(SD15), **options):
            return trajectory(pipe, arguments(SD15), elsewhere, torch.Generator().manual_seed(seed))

    assert equal(run(1, 2), run(1, 3))
    assert not torch.equal(run(1, 2)[0], run(2, 2)[0])
    published = run(1, 2, compat="published")
    assert not equal(published, run(1, 2))
    assert not equal(published, run(1, 3, compat="published"))


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    with apply_hidiffusion(pipe := build(SD15)):
        torch.set_rng_state(before)
        pipe(**arguments(SD15), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_of_several_generators_the_first_draws_the_shifts() -> None:
    call = {**arguments(SD15), "num_images_per_prompt": 2}

    def run(*seeds: int) -> list[torch.Tensor]:
        with apply_hidiffusion(pipe := build(SD15)):
            return trajectory(pipe, call, generator=[torch.Generator().manual_seed(seed) for seed in seeds])

    first, second = run(1, 2), run(1, 3)
    for left, right in zip(first, second, strict=True):
        torch.testing.assert_close(left[0], right[0], rtol=0, atol=1e-4)  # a batch of two sums in another order
    assert not torch.allclose(run(2, 2)[-1], first[-1], atol=0.1)


def test_the_random_stream_is_latents_then_shifts_then_the_samplers_noise() -> None:
    case = replace(SD15, scheduler="EulerAncestralDiscreteScheduler", steps=3)
    seen: list[list[int]] = []
    starts: list[torch.Tensor] = []

    def see(_unet: Any, args: Any) -> None:
        starts.append(args[0][:1])
        seen.append(hidiff.window_shifts.tolist())  # type: ignore[union-attr]

    with apply_hidiffusion(pipe := build(case)) as hidiff:
        pipe.unet.register_forward_pre_hook(see)
        latents = trajectory(pipe, arguments(case), seed=3)
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(1, 4, 8, 8, generator=generator)
    expected = []
    for _ in range(3):
        uniforms = torch.rand(5, generator=generator)
        expected.append([int(4 * r) for r in uniforms.tolist()])
        torch.randn(1, 4, 8, 8, generator=generator)
    assert seen == expected
    sigma = pipe.scheduler.sigmas[0]
    torch.testing.assert_close(starts[0], start * pipe.scheduler.init_noise_sigma / (sigma**2 + 1) ** 0.5)
    assert len(latents) == 3


# What it is applied to


@pytest.mark.parametrize(
    ("case", "family", "task"),
    [
        (SD15, Family.SD15, Task.TEXT_TO_IMAGE),
        (replace(SD15, family=Family.SD21, name=""), Family.SD21, Task.TEXT_TO_IMAGE),
        (replace(SD15, family=Family.SDXL, name=SDXL_NAME), Family.SDXL, Task.TEXT_TO_IMAGE),
        (replace(SD15, family=Family.SDXL, name=TURBO_NAME), Family.SDXL_TURBO, Task.TEXT_TO_IMAGE),
        (replace(SD15, family=Family.SDXL, name=PLAYGROUND_NAME), Family.PLAYGROUND, Task.TEXT_TO_IMAGE),
        (replace(SD15, task=Task.INPAINTING), Family.SD15, Task.INPAINTING),
        (replace(CONTROLNET), Family.SD15, Task.CONTROLNET),
        (
            replace(CONTROLNET, pipeline="StableDiffusionControlNetImg2ImgPipeline"),
            Family.SD15,
            Task.CONTROLNET_IMAGE_TO_IMAGE,
        ),
    ],
)
def test_family_and_task_are_read_from_the_pipeline(case: Case, family: Family, task: Task) -> None:
    pipeline = case.pipeline.replace("Diffusion", "DiffusionXL", 1) if case.family.is_sdxl else case.pipeline
    with apply_hidiffusion(build(replace(case, pipeline=pipeline))) as hidiff:
        assert (hidiff.family, hidiff.task) == (family, task)


def test_family_and_task_can_be_named() -> None:
    case = Case("StableDiffusionXLPipeline", Family.SDXL, height=8, width=8)
    with apply_hidiffusion(pipe := build(case), family=Family.SDXL_TURBO) as hidiff:
        assert kinds_of(hidiff, pipe, arguments(case)) == [PhaseKind.POOLED] * 2 + [PhaseKind.WINDOWED] * 3
    with apply_hidiffusion(pipe, task=Task.INPAINTING) as hidiff:
        assert hidiff.task is Task.INPAINTING


def test_a_nameless_pipeline_is_served() -> None:
    pipe = build(SD15)
    del pipe._internal_dict  # diffusers keeps the name among the pipeline's configuration
    pipe._internal_dict = {}
    with apply_hidiffusion(pipe) as hidiff:
        assert hidiff.family is Family.SD15


@pytest.mark.parametrize("thing", [object(), torch.nn.Linear(1, 1)])
def test_only_pipelines_are_served(thing: Any) -> None:
    with pytest.raises(InputError, match="pipeline with a UNet"):
        apply_hidiffusion(thing)


def test_an_unknown_unet_is_refused() -> None:
    pipe = build(SD15)
    with pytest.raises(InputError, match="not the blocks of sdxl"):
        apply_hidiffusion(pipe, family=Family.SDXL)
    assert not pipe.unet._forward_pre_hooks


def test_a_shorter_transformer_is_refused() -> None:
    pipe = build(Case("StableDiffusionXLPipeline", Family.SDXL))
    del pipe.unet.down_blocks[1].attentions[0].transformer_blocks[1]
    with pytest.raises(InputError, match="not the blocks of sdxl"):
        apply_hidiffusion(pipe)


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="compat"):
        apply_hidiffusion(build(SD15), compat="old")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="residuals"):
        apply_hidiffusion(build(CONTROLNET), rule=RULE)


@pytest.mark.parametrize("applied_first", [False, True])
@pytest.mark.parametrize("way", ["wrapped", "in place", "blocks"])
def test_a_compiled_unet_is_refused(way: str, applied_first: bool) -> None:
    def compile_unet(pipe: Any) -> None:
        if way == "wrapped":
            pipe.unet = torch.compile(pipe.unet, backend="eager")
        elif way == "in place":
            pipe.unet.compile(backend="eager")
        else:
            pipe.unet.compile_repeated_blocks(backend="eager")

    pipe = build(SD15)
    with pytest.raises(InputError, match=r"torch\.compile"):  # noqa: PT012
        if applied_first:
            apply_hidiffusion(pipe)
            compile_unet(pipe)
            trajectory(pipe, arguments(SD15))
        compile_unet(pipe)
        apply_hidiffusion(pipe)


def test_a_unet_call_outside_a_run_is_refused() -> None:
    with apply_hidiffusion(pipe := build(SD15)), pytest.raises(InputError, match="outside a run"):
        pipe.unet(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 5, 32))


def test_windows_alone_and_raunet_alone() -> None:
    plain, both = trajectory(build(SD15), arguments(SD15)), hidiffused(SD15)
    windows, raunet = hidiffused(SD15, raunet=False), hidiffused(SD15, windows=False)
    assert equal(hidiffused(SD15, raunet=False, windows=False), plain)
    last = [plain[-1], both[-1], windows[-1], raunet[-1]]
    assert all(not torch.allclose(a, b, atol=1e-2) for i, a in enumerate(last) for b in last[:i])
    assert Layout.of(Family.SD15).without_windows().windowed_blocks == ()


def test_the_package_imports_without_torch() -> None:
    code = "import sys, hidiff_export; assert 'torch' not in sys.modules; hidiff_export.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "has no attribute 'nothing'" in done.stderr
