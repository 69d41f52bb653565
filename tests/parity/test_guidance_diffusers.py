"""A part of a run without guidance, in real pipelines: beside diffusers' own way to stop guiding, a callback."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hidiff_export.diffusers_api.apply_hidiffusion import apply_hidiffusion
from hidiff_export.errors import InputError
from hidiff_export.families.family import Family, Task
from hidiff_runtime.format.forecast_record import Forecast
from hidiff_runtime.phases import PhasePlan, PhaseRule, StepRange
from tests.parity import pipelines

STEPS, UNTIL, GUIDED = 7, 0.5, 4

CASES = {
    "sd15": pipelines.Case("StableDiffusionPipeline", Family.SD15, name=pipelines.SD15_NAME, steps=STEPS),
    "sd15, rescaled": pipelines.Case(
        "StableDiffusionPipeline", Family.SD15, steps=STEPS, call={"guidance_rescale": 0.7}
    ),
    "sdxl": pipelines.Case("StableDiffusionXLPipeline", Family.SDXL, steps=STEPS),
    "from a picture": pipelines.Case(
        "StableDiffusionImg2ImgPipeline", Family.SD15, scheduler="DDIMScheduler", steps=STEPS, call={"strength": 1.0}
    ),
    "inpainting": pipelines.Case(
        "StableDiffusionInpaintPipeline", Family.SD15, Task.INPAINTING, scheduler="DDIMScheduler", steps=STEPS
    ),
    "two evaluations a step": pipelines.Case(
        "StableDiffusionPipeline", Family.SD15, scheduler="HeunDiscreteScheduler", steps=STEPS
    ),
}
_DOUBLED = {"prompt_embeds", "add_text_embeds", "add_time_ids", "mask", "masked_image_latents", "image"}


def batches_of(network: torch.nn.Module) -> list[int]:
    """The batches that a network is evaluated with from now on."""
    found: list[int] = []
    network.conv_in.register_forward_hook(lambda _module, args, _output: found.append(len(args[0])))
    return found


def stopping(guided: int) -> dict[str, Any]:
    """Arguments by which a pipeline itself stops to guide after so many calls of its callback."""

    def stop(pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index != guided - 1:
            return {}
        pipe._guidance_scale = 0.0
        return {name: tensor.chunk(2)[-1] for name, tensor in tensors.items() if name in _DOUBLED}

    return {"callback_on_step_end": stop}


def stopped(case: pipelines.Case, guided: int, **options: Any) -> torch.Tensor:
    """What the pipeline gives under HiDiffusion that guides every call, where it stops to guide by itself."""
    pipe = pipelines.build(case)
    names = [name for name in pipe._callback_tensor_inputs if name in _DOUBLED]
    call = {**pipelines.arguments(case), **stopping(guided), "callback_on_step_end_tensor_inputs": names}
    with apply_hidiffusion(pipe, **options):
        latents: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(3)).images
    return latents


def ours(case: pipelines.Case, **options: Any) -> tuple[torch.Tensor, list[int]]:
    pipe = pipelines.build(case)
    batches = batches_of(pipe.unet)
    with apply_hidiffusion(pipe, **options):
        latents = pipe(**pipelines.arguments(case), generator=torch.Generator().manual_seed(3)).images
    assert "forward" not in vars(pipe.unet)  # nothing is left behind
    return latents, batches


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_last_steps_are_those_of_a_pipeline_that_stops_to_guide(case: pipelines.Case) -> None:
    found, batches = ours(case, guidance_until=UNTIL)
    # Of Heun's 13 evaluations the callback sees each; its steps are 7, as phases count them.
    calls = 2 * GUIDED if "Heun" in str(case.scheduler) else GUIDED
    assert batches == [2] * calls + [1] * (len(batches) - calls)
    due = stopped(case, calls)
    size = due.abs().max()
    assert (found - due).abs().max() < 1e-4 * size
    assert (found - stopped(case, calls - 1)).abs().max() > 1e-3 * size  # the control: a step sooner
    assert (found - ours(case)[0]).abs().max() > 1e-3 * size  # and guided all through


def test_guidance_may_begin_late() -> None:
    """Outside the range the prompts alone decide, as with a guidance scale of 1."""
    case = pipelines.Case("StableDiffusionPipeline", Family.SD15, scheduler="DDIMScheduler", steps=STEPS)
    rule = PhaseRule(StepRange(0, 0.4))
    pipe, plain = pipelines.build(case), pipelines.build(case)
    batches = batches_of(pipe.unet)
    with apply_hidiffusion(pipe, rule=rule, guidance_until=StepRange(0.3, 0.8)):
        found = pipelines.trajectory(pipe, pipelines.arguments(case))
    assert batches == [1] * 3 + [2] * 3 + [1]
    with apply_hidiffusion(plain, rule=rule):
        due = pipelines.trajectory(plain, {**pipelines.arguments(case), "guidance_scale": 1.0})
    for one, other in zip(found[:3], due[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (found[3] - due[3]).abs().max() > 1e-3


@pytest.mark.slow
def test_a_controlnet_is_asked_for_the_prompts_alone() -> None:
    case = pipelines.Case(
        "StableDiffusionControlNetPipeline", Family.SD15, Task.CONTROLNET, scheduler="DDIMScheduler", steps=3
    )
    rule = PhaseRule(StepRange(0, 0.5), control=1.0)
    pipe = pipelines.build(case)
    batches = batches_of(pipe.controlnet)
    with apply_hidiffusion(pipe, rule=rule, guidance_until=0.6):
        found = pipe(**pipelines.arguments(case), generator=torch.Generator().manual_seed(3)).images
    assert batches == [2, 2, 1]
    due = stopped(case, 2, rule=rule)
    assert (found - due).abs().max() < 1e-4 * due.abs().max()


def test_a_forecast_is_of_guided_noise_on_both_sides_of_the_end() -> None:
    """What a bundle forecasts too: each kept output as it is stepped with."""
    case = pipelines.Case("StableDiffusionPipeline", Family.SD15, scheduler="DDIMScheduler", steps=12)
    forecast = Forecast(warm_up=2, last=0.0)
    found, batches = ours(case, forecast=forecast, guidance_until=0.5)
    computed = forecast.computed(12)
    assert batches == [2 if step < 6 else 1 for step in range(12) if computed[step]]
    assert (found - ours(case, guidance_until=0.5)[0]).abs().max() < 0.2 * found.abs().max()


def test_a_pipeline_that_does_not_guide_is_left_alone() -> None:
    scale = {"guidance_scale": 1.0}
    case = pipelines.Case("StableDiffusionPipeline", Family.SD15, scheduler="DDIMScheduler", steps=4, call=scale)
    found, batches = ours(case, guidance_until=0.5)
    assert batches == [1] * 4
    torch.testing.assert_close(found, ours(case)[0], rtol=0, atol=0)


@pytest.mark.parametrize("until", [0.0, 1.5, StepRange(0.6, 0.5), StepRange(-0.1, 0.5)])
def test_a_part_that_is_none_is_refused(until: float | StepRange) -> None:
    pipe = pipelines.build(CASES["sd15"])
    with pytest.raises(InputError, match="guidance_until must be a part of the run"):
        apply_hidiffusion(pipe, guidance_until=until)
    apply_hidiffusion(pipe).remove()


def test_the_phase_says_that_nothing_is_guided() -> None:
    pipe = pipelines.build(CASES["sd15"])
    rule = PhaseRule(StepRange(0, 0.4), guidance=StepRange(0, UNTIL))
    names: list[str] = []
    with apply_hidiffusion(pipe, rule=rule) as handle:
        pipe.unet.conv_in.register_forward_hook(lambda *_: names.append(handle.phase.name))
        pipe(**pipelines.arguments(CASES["sd15"]))
    plan = PhasePlan(rule, pipe.num_timesteps)
    assert names == [plan.phase_at(step).name for step in range(pipe.num_timesteps)]
    assert names[-1] == "windowed-unguided"
