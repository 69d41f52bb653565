"""Runs that start from a picture, from sampler tables and from diffusers' schedulers: same seed, same nonlinear model.

What the pipelines around the schedulers do (``get_timesteps``, ``add_noise``, the mask's blend) is written out here as
diffusers 0.42.1 has it; `tests/parity/test_denoiser_pictures.py` runs the pipelines themselves.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from typing import Any

import numpy as np
import pytest
import torch

from hidiff_export.families.family import Family, default_scheduler
from hidiff_export.scheduler_tables.diffusers_schedulers import build_scheduler
from hidiff_export.scheduler_tables.linear_probe import respond_from
from hidiff_export.scheduler_tables.names import SAMPLERS
from hidiff_export.scheduler_tables.partial_runs import drop_unread
from hidiff_export.scheduler_tables.scheduler_probe import probe
from hidiff_runtime.sampling.scheduler_table import SamplerTable
from hidiff_runtime.sampling.table_rows import Rows
from hidiff_runtime.sampling.torch_rng import TorchGenerator
from tests.parity.test_sampler_diffusers import ITS_OWN_ROUNDING, SHAPE, difference, model

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' DEIS, on numpy 2

STEPS = (1, 2, 5, 8, 20)
STRENGTHS = (1.0, 0.999, 0.5, 0.1)
BOUND = 5e-6
"""Largest difference over the largest value at the end of a run: float32 rounding alone, measured 3e-6 at most."""

OF_ONE_STEP = {*ITS_OWN_ROUNDING, ("deis", 1)}
"""Where the reference is the scheduler in float64: DEIS' single step divides by a small sigma, and how far diffusers is
rounded then depends on the processor (3e-6 on one, 5.1e-6 on another)."""

CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": default_scheduler(Family.SD15)[1],
    "sd21-v": {**default_scheduler(Family.SD21)[1], "prediction_type": "v_prediction"},
}
REMEMBERING = {"dpmpp_2m": 1, "dpmpp_2m_karras": 1, "dpmpp_2m_sde": 1, "deis": 1, "unipc": 2, "pndm": 5}
"""Samplers that begin anew in the middle, and for how many evaluations that shows; the others remember nothing."""


@functools.cache
def tabulate(sampler: str, config: str) -> SamplerTable:
    return probe(sampler, CONFIGS[config], STEPS)


@functools.cache
def picture() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(99)) * 0.9


@functools.cache
def mask() -> torch.Tensor:
    return (torch.rand(SHAPE[0], 1, *SHAPE[2:], generator=torch.Generator().manual_seed(98)) > 0.4).float()


def run_diffusers(
    scheduler: Any,
    steps: int,
    strength: float,
    seed: int,
    *,
    blend: bool = False,
    eta: float = 0.0,
    dtype: Any = torch.float32,
) -> np.ndarray:
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    start = max(steps - min(int(steps * strength), steps), 0)
    timesteps = scheduler.timesteps[start * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    generator = torch.Generator().manual_seed(seed)
    accepted = inspect.signature(scheduler.step).parameters
    options = {key: value for key, value in (("eta", eta), ("generator", generator)) if key in accepted}
    image, noise = picture().to(dtype), torch.randn(SHAPE, generator=generator).to(dtype)
    latents = scheduler.add_noise(image, noise, timesteps[:1].repeat(SHAPE[0]))
    for number, timestep in enumerate(timesteps, start=1):
        output = model(scheduler.scale_model_input(latents, timestep), float(timestep))
        latents = scheduler.step(output, timestep, latents, return_dict=False, **options)[0]
        if blend:
            kept = image
            if number < len(timesteps):
                kept = scheduler.add_noise(image, noise, torch.tensor([timesteps[number]]))
            latents = (1 - mask()) * kept + mask() * latents
    return latents.numpy()


def run_table(
    table: SamplerTable, steps: int, strength: float, seed: int, *, blend: bool = False, eta: float = 0.0
) -> np.ndarray:
    generator, image = TorchGenerator(seed), picture().numpy()
    schedule, noise = table.schedule(steps, strength=strength, eta=eta), generator.randn(SHAPE)
    state = schedule.start_from(image, noise)
    while not state.done:
        output = model(torch.from_numpy(state.model_input()), state.timestep).numpy()
        state.advance(output, generator.randn(SHAPE) if state.draws_noise else None)
        if blend:
            kept = image if state.done else schedule.noised(image, noise, state.index)
            state.latents = (1 - mask().numpy()) * kept + mask().numpy() * state.latents
    return state.latents


def runs(table: SamplerTable) -> list[tuple[int, float]]:
    return [(steps, strength) for steps in table.steps.tolist() for strength in STRENGTHS if int(steps * strength)]


@pytest.mark.parametrize(
    ("sampler", "config"), [*((name, "sd15") for name in SAMPLERS), ("pndm", "sd21-v"), ("dpmpp_2m", "sd21-v")]
)
def test_every_sampler_starts_from_a_picture_as_its_scheduler_does(sampler: str, config: str) -> None:
    table, scheduler = tabulate(sampler, config), build_scheduler(sampler, CONFIGS[config])
    for steps, strength in runs(table):
        dtype = torch.float64 if (sampler, steps) in OF_ONE_STEP else torch.float32
        expected = run_diffusers(scheduler, steps, strength, seed=steps, dtype=dtype)
        assert difference(run_table(table, steps, strength, seed=steps), expected) < BOUND, (steps, strength)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_keeps_the_picture_outside_the_mask(sampler: str) -> None:
    table, scheduler = tabulate(sampler, "sd15"), build_scheduler(sampler, CONFIGS["sd15"])
    for steps, strength in ((20, 0.5), (8, 1.0), (5, 0.3)):
        found = run_table(table, steps, strength, 1, blend=True)
        expected = run_diffusers(scheduler, steps, strength, 1, blend=True)
        assert difference(found, expected) < BOUND, (steps, strength)
    assert np.array_equal(found * (1 - mask().numpy()), (picture() * (1 - mask())).numpy())


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_takes_any_eta_from_a_picture(eta: float) -> None:
    table, scheduler = tabulate("ddim", "sd15"), build_scheduler("ddim", CONFIGS["sd15"])
    for steps, strength in ((20, 0.5), (8, 0.9)):
        expected = run_diffusers(scheduler, steps, strength, 3, eta=eta)
        assert difference(run_table(table, steps, strength, 3, eta=eta), expected) < BOUND
        assert difference(run_table(table, steps, strength, 3, eta=eta - 0.02), expected) > 100 * BOUND


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_evaluation_differs_beyond_the_early_ones(sampler: str) -> None:
    """Every start of a run followed to its end, beside the rows that the table gives for it."""
    table, scheduler = tabulate(sampler, "sd15"), build_scheduler(sampler, CONFIGS["sd15"])
    assert table.rows.depth == REMEMBERING.get(sampler, 0)
    order = scheduler.order
    starts = range(order, 20 * order, order)
    for left, run in zip(range(19, 0, -1), respond_from(copy.deepcopy(scheduler), 20, starts, 100), strict=True):
        schedule = table.schedule(20, strength=(left + 0.5) / 20)
        for measured, given in zip(drop_unread(run), schedule.evaluations, strict=True):
            assert (measured.timestep, measured.draws_noise) == (given.timestep, given.draws_noise)
            rows = np.zeros_like(given.rows)
            rows[: measured.rows.shape[0], : measured.rows.shape[1]] = measured.rows
            np.testing.assert_allclose(given.rows, rows, rtol=0, atol=1e-6 * np.abs(rows).max())


@pytest.mark.parametrize("sampler", REMEMBERING)
def test_the_early_rows_are_needed(sampler: str) -> None:
    table, scheduler = tabulate(sampler, "sd15"), build_scheduler(sampler, CONFIGS["sd15"])
    careless = dataclasses.replace(table, rows=Rows(table.rows.distinct, table.rows.places[:1]))
    expected = run_diffusers(scheduler, 20, 0.5, 1)
    assert difference(run_table(table, 20, 0.5, 1), expected) < BOUND
    assert difference(run_table(careless, 20, 0.5, 1), expected) > 100 * BOUND


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_start_one_step_off_and_other_noise_are_noticed(sampler: str) -> None:
    table, scheduler = tabulate(sampler, "sd15"), build_scheduler(sampler, CONFIGS["sd15"])
    expected = run_diffusers(scheduler, 20, 0.5, 1)
    for steps, strength, seed in ((20, 0.55, 1), (20, 0.45, 1), (20, 0.5, 2)):
        assert difference(run_table(table, steps, strength, seed), expected) > 1000 * BOUND
