"""Forecast steps beside the published method's arithmetic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import toy
from spectrum import Spectrum

from hidiff_runtime import InputError
from hidiff_runtime.format.forecast_record import UNSUITABLE, Forecast
from hidiff_runtime.sampling.forecast import KEPT, forecast_schedule, weights
from hidiff_runtime.sampling.scheduler_state import Schedule
from hidiff_runtime.sampling.torch_rng import TorchGenerator

SHAPE = (1, 4, 3, 5)


def unet(latents: np.ndarray, timestep: float) -> np.ndarray:
    return (np.tanh(0.7 * latents + np.sin(timestep / 300)) + 0.2 * latents).astype(np.float32)


def by_hand(schedule: Schedule, forecast: Forecast, late: int = 0) -> np.ndarray:
    """A whole run, in which what is left out is predicted; ``late`` takes forecasts for so many numbers before."""
    generator = TorchGenerator(3)
    state, published = schedule.start(generator.randn(SHAPE)), Spectrum(len(schedule), KEPT)
    for index, computed in enumerate(forecast.computed(len(schedule))):
        if computed:
            output = unet(state.model_input(), state.timestep)
            published.update(index, output)
        else:
            output = published.predict(index - late).astype(np.float32)
        state.advance(output, generator.randn(SHAPE) if state.draws_noise else None)
    return state.latents


def by_table(schedule: Schedule, forecast: Forecast) -> tuple[np.ndarray, int]:
    """The latents of a whole run, and how often the UNet was evaluated."""
    generator, evaluations = TorchGenerator(3), 0
    state = forecast_schedule(schedule, forecast).start(generator.randn(SHAPE))
    while not state.done:
        output = unet(state.model_input(), state.timestep) if state.computed else None
        evaluations += state.computed
        state.advance(output, generator.randn(SHAPE) if state.draws_noise else None)
    return state.latents, evaluations


@pytest.mark.parametrize(("steps", "due"), [(50, 19), (30, 14), (20, 11), (6, 5), (5, 5), (1, 1)])
def test_how_many_evaluations_are_computed(steps: int, due: int) -> None:
    assert sum(Forecast().computed(steps)) == due


def test_which_evaluations_are_computed() -> None:
    assert [index for index, computed in enumerate(Forecast().computed(30)) if computed] == [
        *(0, 1, 2, 3),
        *(5, 7, 10, 13, 17, 21, 26),
        *(27, 28, 29),
    ]
    published = Forecast(warm_up=5, window=2.0, growth=0.75, last=0.0)  # as the method's own code is run
    assert sum(published.computed(50)) == 14
    assert not published.computed(50)[-2]


def test_weights_are_the_published_methods() -> None:
    numbers = [0, 1, 2, 3, 5, 8]
    outputs = np.random.default_rng(0).standard_normal((len(numbers), 7))
    published = Spectrum(20)
    for number, output in zip(numbers, outputs, strict=True):
        published.update(number, output)
    np.testing.assert_allclose(weights(numbers, 11, 20) @ outputs, published.predict(11), rtol=1e-9)


@pytest.mark.parametrize("name", ["plain", "noisy", "second"])
@pytest.mark.parametrize("strength", [None, 0.8])
def test_a_run_is_the_published_methods(name: str, strength: float | None) -> None:
    table = toy.table(name, order=2 if name == "second" else 1, noise=0.3 if name == "noisy" else 0.0)
    schedule, forecast = table.schedule(12, strength=strength), Forecast(warm_up=2, last=0.2)
    found, evaluations = by_table(schedule, forecast)
    assert evaluations == sum(forecast.computed(len(schedule))) < len(schedule)
    np.testing.assert_allclose(found, by_hand(schedule, forecast), rtol=2e-5, atol=2e-6)
    off = np.abs(found - by_hand(schedule, forecast, late=1)).max()
    assert off > 1e-3 * np.abs(found).max()  # the control: forecasts of one step before


def test_a_run_too_short_to_forecast_is_computed_whole() -> None:
    schedule = toy.table("plain").schedule(4)
    found, evaluations = by_table(schedule, Forecast())
    assert evaluations == 4
    state = schedule.start(TorchGenerator(3).randn(SHAPE))
    while not state.done:
        state.advance(unet(state.model_input(), state.timestep))
    np.testing.assert_array_equal(found, state.latents)


def test_an_output_is_given_exactly_where_it_is_computed() -> None:
    schedule = forecast_schedule(toy.table("plain").schedule(12), Forecast())
    state = schedule.start(TorchGenerator(3).randn(SHAPE))
    with pytest.raises(InputError, match="needs the UNet's output"):
        state.advance(None)
    while state.computed:
        state.advance(unet(state.model_input(), state.timestep))
    with pytest.raises(InputError, match="is forecast"):
        state.advance(unet(state.model_input(), state.timestep))


@pytest.mark.parametrize("sampler", UNSUITABLE)
def test_samplers_whose_outputs_follow_no_curve_are_refused(sampler: str) -> None:
    schedule = replace(toy.table("plain").schedule(12), sampler=sampler)
    with pytest.raises(InputError, match=f"{sampler} cannot be forecast: each of its steps"):
        forecast_schedule(schedule, Forecast())
