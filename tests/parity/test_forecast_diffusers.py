"""Forecast steps on real samplers and pipelines of diffusers: tables, PyTorch and the published arithmetic agree."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from spectrum import Spectrum

from hidiff_export.diffusers_api.apply_hidiffusion import apply_hidiffusion
from hidiff_export.errors import InputError
from hidiff_export.families.family import Family, Task, default_scheduler
from hidiff_export.scheduler_tables.diffusers_schedulers import build_scheduler
from hidiff_export.scheduler_tables.names import SAMPLERS
from hidiff_export.scheduler_tables.scheduler_probe import probe
from hidiff_runtime.format.forecast_record import UNSUITABLE, Forecast
from hidiff_runtime.phases import PhaseRule, StepRange
from hidiff_runtime.sampling.forecast import forecast_schedule
from hidiff_runtime.sampling.torch_rng import TorchGenerator
from tests.parity import pipelines

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' DEIS, on numpy 2

SHAPE = (1, 4, 6, 5)
CONFIG = default_scheduler(Family.SD15)[1]
SUITED = [name for name in SAMPLERS if name not in UNSUITABLE]


def unet(latents: torch.Tensor, timestep: float) -> torch.Tensor:
    return torch.tanh(0.8 * latents + float(np.sin(timestep / 100))) + 0.1 * latents


def run_diffusers(sampler: str, steps: int, late: int = 0) -> np.ndarray:
    """The real scheduler's run; ``late`` forecasts what so many evaluations before would give."""
    scheduler = copy.deepcopy(build_scheduler(sampler, CONFIG))
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    accepted = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in accepted else {}
    latents = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    computed, spectrum = Forecast().computed(len(scheduler.timesteps)), Spectrum(len(scheduler.timesteps))
    for index, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        if computed[index]:
            output = unet(scaled, float(timestep))
            spectrum.update(index, output.numpy())
        else:
            output = torch.from_numpy(spectrum.predict(index - late)).float()
        latents = scheduler.step(output, timestep, latents, return_dict=False, **options)[0]
    return latents.numpy()


def run_table(sampler: str, steps: int) -> np.ndarray:
    generator = TorchGenerator(1)
    schedule = forecast_schedule(probe(sampler, CONFIG, (steps,)).schedule(steps), Forecast())
    state = schedule.start(generator.randn(SHAPE))
    while not state.done:
        output = unet(torch.from_numpy(state.model_input()), state.timestep).numpy() if state.computed else None
        state.advance(output, generator.randn(SHAPE) if state.draws_noise else None)
    return state.latents


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("sampler", SUITED)
def test_every_sampler_that_suits_runs_as_published(sampler: str, steps: int) -> None:
    found, due = run_table(sampler, steps), run_diffusers(sampler, steps)
    size = np.abs(due).max()
    assert np.abs(found - due).max() < 2e-5 * size
    assert np.abs(found - run_diffusers(sampler, steps, late=1)).max() > 1e-3 * size  # the control: one row late


CASES = {
    "sd15": pipelines.Case("StableDiffusionPipeline", Family.SD15, name=pipelines.SD15_NAME, steps=12),
    "sdxl": pipelines.Case("StableDiffusionXLPipeline", Family.SDXL, steps=12),
    "two evaluations a step": pipelines.Case(
        "StableDiffusionPipeline", Family.SD15, name=pipelines.SD15_NAME, scheduler="HeunDiscreteScheduler", steps=8
    ),
    "from a picture": pipelines.Case(
        "StableDiffusionImg2ImgPipeline", Family.SD15, name=pipelines.SD15_NAME, steps=15, call={"strength": 0.8}
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_pipeline_in_pytorch_runs_as_published(case: pipelines.Case) -> None:
    given = pipelines.arguments(case)
    pipe, evaluations = pipelines.build(case), []
    pipe.unet.conv_in.register_forward_hook(lambda *_: evaluations.append(1))
    with apply_hidiffusion(pipe, forecast=True):
        found = pipelines.trajectory(pipe, given)
        again = pipelines.trajectory(pipe, given)  # a run knows nothing of the one before
    total = pipe.num_timesteps
    assert len(evaluations) == 2 * sum(Forecast().computed(total)) < 2 * total
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    due = published_run(pipelines.build(case), given, Forecast().computed(total))
    torch.testing.assert_close(found[-1], due[-1], rtol=1e-4, atol=1e-4)
    assert len(found) == len(due)


def published_run(pipe: Any, given: dict[str, Any], computed: Sequence[bool], **options: Any) -> list[torch.Tensor]:
    """The same pipeline under HiDiffusion, whose UNet is answered for by `Spectrum` where it is left out."""
    spectrum, count = Spectrum(len(computed)), itertools.count()
    forward = pipe.unet.forward

    def answered(*args: Any, **kwargs: Any) -> Any:
        index = next(count)
        if not computed[index]:
            return (torch.from_numpy(spectrum.predict(index)).float(),)
        output = forward(*args, **kwargs)
        spectrum.update(index, output[0].numpy())
        return output

    with apply_hidiffusion(pipe, **options):
        pipe.unet.forward = functools.wraps(forward)(answered)
        return pipelines.trajectory(pipe, given)


@pytest.mark.slow
def test_a_controlnet_is_left_out_with_the_unet() -> None:
    case = pipelines.Case(
        "StableDiffusionControlNetPipeline", Family.SD15, Task.CONTROLNET, scheduler="DDIMScheduler", steps=4
    )
    forecast, given, evaluations = Forecast(warm_up=2, last=0.0), pipelines.arguments(case), []
    pipe = pipelines.build(case)
    for network in (pipe.unet, pipe.controlnet):
        network.conv_in.register_forward_hook(lambda *_: evaluations.append(1))
    with apply_hidiffusion(pipe, forecast=forecast, rule=PhaseRule(StepRange(0, 0.5), control=1.0)):
        found = pipelines.trajectory(pipe, given)
    computed = forecast.computed(4)
    assert computed == (True, True, False, True)
    assert len(evaluations) == 2 * 3
    due = published_run(pipelines.build(case), given, computed, rule=PhaseRule(StepRange(0, 0.5), control=1.0))
    torch.testing.assert_close(found[-1], due[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", ["LCMScheduler", "TCDScheduler"])
def test_a_scheduler_whose_outputs_follow_no_curve_is_refused(scheduler: str) -> None:
    case = pipelines.Case("StableDiffusionPipeline", Family.SD15, scheduler=scheduler, steps=8)
    pipe = pipelines.build(case)
    with apply_hidiffusion(pipe, forecast=Forecast()), pytest.raises(InputError, match="cannot be forecast"):
        pipelines.trajectory(pipe, pipelines.arguments(case))
    pipelines.trajectory(pipe, pipelines.arguments(case))  # without, it runs


def test_a_run_is_another_without_forecast() -> None:
    """The control: forecasts are not what the UNet gives."""
    case = CASES["sd15"]
    found = []
    for forecast in (False, True):
        pipe = pipelines.build(case)
        with apply_hidiffusion(pipe, forecast=forecast):
            found.append(pipelines.trajectory(pipe, pipelines.arguments(case))[-1])
    assert (found[0] - found[1]).abs().max() > 1e-3 * found[0].abs().max()


@pytest.mark.parametrize("forecast", [Forecast(warm_up=1), Forecast(window=0.5), Forecast(last=2.0)])
def test_a_forecast_that_cannot_be_followed_is_refused(forecast: Forecast) -> None:
    pipe = pipelines.build(CASES["sd15"])
    with pytest.raises(InputError, match="must have a warm-up of 2 or more"):
        apply_hidiffusion(pipe, forecast=forecast)
    apply_hidiffusion(pipe).remove()  # nothing was left behind
