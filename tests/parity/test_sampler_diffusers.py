"""Whole runs from sampler tables beside whole runs of diffusers' schedulers: same seed, same nonlinear model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from hidiff_export.families.family import Family, default_scheduler
from hidiff_export.scheduler_tables.diffusers_schedulers import build_scheduler
from hidiff_export.scheduler_tables.names import SAMPLERS, samplers_for
from hidiff_export.scheduler_tables.scheduler_probe import probe
from hidiff_runtime.sampling.scheduler_state import OUTPUT, SAMPLE, STATE
from hidiff_runtime.sampling.scheduler_table import SamplerTable
from hidiff_runtime.sampling.table_rows import Rows
from hidiff_runtime.sampling.torch_rng import TorchGenerator

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' DEIS, on numpy 2

SHAPE = (2, 4, 6, 5)
STEPS = (1, 2, 3, 5, 8, 10, 20, 30, 50, 100)
FEW_STEPS = (1, 2, 5, 20, 30)
BOUND = 1e-5
"""Largest difference over the largest value at the end of a run: float32 rounding alone, measured 3e-6 at most."""

ROUNDED_SAMPLE = 4 * 2.0**-24
"""What float32 leaves of a picture of about 1 in noise of up to four sigmas, beside sigma: half the spacing of such
numbers. It counts where a run begins at a large sigma, 120 of EDM's or 4096 with zero terminal SNR, since diffusers'
step is float32's whatever it is given."""

ITS_OWN_ROUNDING = {("heun", 2)}
"""Where float32 leaves diffusers itself no 1e-5: with linspace spacing Heun's second evaluation takes the difference of
two samples of about 14 and divides it by a sigma of 0.03. There the reference is the same scheduler run in float64."""

CONFIGS: dict[str, dict[str, Any]] = {
    **{family.value: default_scheduler(family)[1] for family in (Family.SD15, Family.SDXL, Family.SDXL_TURBO)},
    "sd21-v": {**default_scheduler(Family.SD21)[1], "prediction_type": "v_prediction"},
    "sdxl-v": {**default_scheduler(Family.SDXL)[1], "prediction_type": "v_prediction"},
    "linspace-v": {
        **default_scheduler(Family.SD15)[1],
        **{"prediction_type": "v_prediction", "timestep_spacing": "linspace", "steps_offset": 0},
    },
    "sdxl-zero-snr": {
        **default_scheduler(Family.SDXL)[1],
        **{"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    },
    "edm": {
        **{"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0},
        **{"sigma_schedule": "exponential", "prediction_type": "v_prediction", "num_train_timesteps": 1000},
    },
}
CASES = [(sampler, config) for config in CONFIGS for sampler in samplers_for(CONFIGS[config])]
MOST = {"lcm": 50, "tcd": 50}
"""Steps that distilled models' schedulers run with at most."""


@functools.cache
def tabulate(sampler: str, config: str, steps: tuple[int, ...] = STEPS) -> SamplerTable:
    return probe(sampler, CONFIGS[config], steps)


def model(latents: torch.Tensor, timestep: float) -> torch.Tensor:
    """Depends on sample and timestep, and not linearly; in the latents' dtype."""
    return torch.tanh(0.8 * latents + float(np.sin(timestep / 100))) + 0.1 * latents


def run_diffusers(scheduler: Any, steps: int, seed: int, eta: float = 0.0, dtype: Any = torch.float32) -> np.ndarray:
    """What diffusers' pipelines do, with `model` for the UNet."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    accepted = inspect.signature(scheduler.step).parameters
    options = {key: value for key, value in (("eta", eta), ("generator", generator)) if key in accepted}
    latents = torch.randn(SHAPE, generator=generator).to(dtype) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = model(scheduler.scale_model_input(latents, timestep), float(timestep))
        latents = scheduler.step(output, timestep, latents, return_dict=False, **options)[0]
    return latents.numpy()


def run_table(table: SamplerTable, steps: int, seed: int, eta: float = 0.0) -> np.ndarray:
    generator = TorchGenerator(seed)
    state = table.schedule(steps, eta=eta).start(generator.randn(SHAPE))
    while not state.done:
        output = model(torch.from_numpy(state.model_input()), state.timestep).numpy()
        state.advance(output, generator.randn(SHAPE) if state.draws_noise else None)
    return state.latents


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("sampler", "config"), CASES)
def test_every_sampler_runs_as_its_scheduler_does(sampler: str, config: str) -> None:
    asked = STEPS if config in ("sd15", "sdxl") else FEW_STEPS
    table, scheduler = tabulate(sampler, config, asked), build_scheduler(sampler, CONFIGS[config])
    assert table.steps.tolist() == [steps for steps in asked if steps <= MOST.get(sampler, steps)]
    for steps in table.steps.tolist():
        dtype = torch.float64 if (sampler, steps) in ITS_OWN_ROUNDING else torch.float32
        expected = run_diffusers(scheduler, steps, seed=steps, dtype=dtype)
        bound = max(BOUND, float(scheduler.init_noise_sigma) * ROUNDED_SAMPLE)
        assert difference(run_table(table, steps, seed=steps), expected) < bound, (steps, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_numbers_of_steps_to_100(sampler: str) -> None:
    config = "sd15"
    asked = (*range(1, 13), *range(15, 31, 3), 40, 51, 64, 77, 99, 100)  # the common ones, and a part of the rest
    table = tabulate(sampler, config, asked)
    scheduler = build_scheduler(sampler, CONFIGS[config])
    assert table.steps.tolist() == [steps for steps in asked if steps <= MOST.get(sampler, steps)]
    for steps in sorted({*table.steps.tolist()} - {*STEPS}):
        found, expected = run_table(table, steps, seed=-steps), run_diffusers(scheduler, steps, seed=-steps)
        assert difference(found, expected) < BOUND, steps


@pytest.mark.parametrize("config", ["sd15", "sd21-v", "sdxl-turbo"])
@pytest.mark.parametrize("eta", [0.1, 0.6, 1.0])
def test_ddim_takes_any_eta(config: str, eta: float) -> None:
    table, scheduler = tabulate("ddim", config, FEW_STEPS), build_scheduler("ddim", CONFIGS[config])
    for steps in FEW_STEPS:
        found, expected = run_table(table, steps, 3, eta), run_diffusers(scheduler, steps, 3, eta)
        assert difference(found, expected) < BOUND, steps
    assert difference(run_table(table, 20, 3, eta), run_diffusers(scheduler, 20, 3, eta - 0.02)) > 100 * BOUND


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_is_laid_out_as_the_schedulers(sampler: str) -> None:
    table, scheduler = tabulate(sampler, "sdxl"), build_scheduler(sampler, CONFIGS["sdxl"])
    for steps in (1, 2, 10, 30):
        schedule = table.schedule(steps)
        scheduler.set_timesteps(steps)
        assert [evaluation.timestep for evaluation in schedule.evaluations] == scheduler.timesteps.tolist()
        assert [evaluation.step for evaluation in schedule.evaluations] == [
            index // scheduler.order for index in range(len(scheduler.timesteps))
        ]
        assert schedule.steps == -(-len(scheduler.timesteps) // scheduler.order)
        assert schedule.init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-7)


def test_evaluations_and_logical_steps() -> None:
    counts = {name: tabulate(name, "sdxl").schedule(30) for name in ("euler", "heun", "pndm")}
    assert {name: (len(schedule), schedule.steps) for name, schedule in counts.items()} == {
        "euler": (30, 30),
        "heun": (59, 30),
        "pndm": (31, 31),
    }


def test_noise_is_drawn_where_the_scheduler_draws_it() -> None:
    drawn = {
        name: [evaluation.draws_noise for evaluation in tabulate(name, "sdxl").schedule(5).evaluations]
        for name in SAMPLERS
    }
    always, never = [True] * 5, [False] * 5
    assert drawn["euler_ancestral"] == always
    assert drawn["dpmpp_2m_sde"] == always
    assert drawn["lcm"] == [True, True, True, True, False]
    assert drawn["tcd"] == [True, True, True, True, False]
    assert drawn["ddpm"] == always  # with an offset of 1 its last timestep is not 0, so it draws there too
    for name in ("ddim", "euler", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "deis"):
        assert drawn[name] == never
    offset_0 = probe("ddpm", {**CONFIGS["sdxl"], "steps_offset": 0}, [5]).schedule(5)
    assert [evaluation.draws_noise for evaluation in offset_0.evaluations] == [True, True, True, True, False]
    noisy = tabulate("ddim", "sdxl").schedule(5, eta=0.3)
    assert all(evaluation.draws_noise for evaluation in noisy.evaluations)


def changed(table: SamplerTable, change: Any) -> SamplerTable:
    every = np.arange(len(table.timesteps))
    rows = table.rows.at(every, np.full(len(every), table.rows.depth))
    change(rows, int(table.first[table.steps.tolist().index(10)]))
    return dataclasses.replace(table, rows=Rows.of(rows))


def nudge(rows: np.ndarray, first: int) -> None:
    rows[first + 4, 0, OUTPUT] += 1e-2 * abs(rows[first + 4, 0, SAMPLE])


def swap(rows: np.ndarray, first: int) -> None:
    rows[[first + 4, first + 5]] = rows[[first + 5, first + 4]]


def forget(rows: np.ndarray, first: int) -> None:
    rows[first + 4, :, STATE:] = 0


@pytest.mark.parametrize(
    ("sampler", "change"),
    [(name, change) for name in SAMPLERS for change in (nudge,)]
    + [(name, swap) for name in ("ddim", "heun", "pndm")]
    + [(name, forget) for name in ("dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "unipc", "deis", "pndm")],
)
def test_a_changed_table_is_noticed(sampler: str, change: Any) -> None:
    table, scheduler = tabulate(sampler, "sdxl"), build_scheduler(sampler, CONFIGS["sdxl"])
    expected = run_diffusers(scheduler, 10, 1)
    assert difference(run_table(table, 10, 1), expected) < BOUND
    assert difference(run_table(changed(table, change), 10, 1), expected) > 3 * BOUND


def test_another_seed_or_configuration_is_noticed() -> None:
    scheduler = build_scheduler("euler_ancestral", CONFIGS["sdxl"])
    expected = run_diffusers(scheduler, 10, 1)
    assert difference(run_table(tabulate("euler_ancestral", "sdxl"), 10, 2), expected) > 0.01
    assert difference(run_table(probe("euler_ancestral", CONFIGS["sdxl-turbo"], [10]), 10, 1), expected) > 0.01


def test_karras_sigmas_that_share_a_timestep_begin_at_the_first() -> None:
    """Diffusers steps past the end there, unless it is told where the run begins, as its image pipelines do."""
    own = diffusers.DPMSolverMultistepScheduler.from_config(CONFIGS["sdxl-zero-snr"], use_karras_sigmas=True)
    own.set_timesteps(30)
    assert own.timesteps[0] == own.timesteps[1]
    with pytest.raises(IndexError):
        run_diffusers(own, 30, 1)
    own.set_timesteps = functools.partial(_told_its_first, own)
    expected = run_diffusers(own, 30, 1)
    assert difference(run_table(tabulate("dpmpp_2m_karras", "sdxl-zero-snr", FEW_STEPS), 30, 1), expected) < BOUND


def _told_its_first(scheduler: Any, steps: int) -> None:
    type(scheduler).set_timesteps(scheduler, steps)
    scheduler.set_begin_index(0)


OWN_TIMESTEPS = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13)
"""Align Your Steps' for SDXL (arXiv 2404.14507), as people give them to diffusers' pipelines."""


@pytest.mark.parametrize("sampler", ["ddpm", "euler", "dpmpp_2m", "dpmpp_2m_sde", "heun", "lcm", "tcd"])
def test_timesteps_of_ones_own_run_as_diffusers_runs_them(sampler: str) -> None:
    table = probe(sampler, CONFIGS["sdxl"], [len(OWN_TIMESTEPS)], timesteps=OWN_TIMESTEPS)
    scheduler = build_scheduler(sampler, CONFIGS["sdxl"])
    scheduler.set_timesteps = functools.partial(_given_timesteps, scheduler)
    expected = run_diffusers(scheduler, len(OWN_TIMESTEPS), 1)
    assert difference(run_table(table, len(OWN_TIMESTEPS), 1), expected) < BOUND
    spaced = probe(sampler, CONFIGS["sdxl"], [len(OWN_TIMESTEPS)])
    assert difference(run_table(spaced, len(OWN_TIMESTEPS), 1), expected) > 0.01


def _given_timesteps(scheduler: Any, _steps: int) -> None:
    type(scheduler).set_timesteps(scheduler, timesteps=list(OWN_TIMESTEPS))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_runs_with_the_eta_of_its_table(eta: float) -> None:
    scheduler = diffusers.TCDScheduler.from_config(CONFIGS["sdxl"])
    for steps in (1, 2, 4, 8):
        table = probe("tcd", CONFIGS["sdxl"], [steps], tcd_eta=eta)
        expected = run_diffusers(scheduler, steps, 1, eta)
        assert difference(run_table(table, steps, 1), expected) < BOUND, steps
    assert difference(run_table(table, 8, 1), run_diffusers(scheduler, 8, 1, abs(eta - 0.2))) > 0.01


def test_edms_scheduler_is_diffusers_own_class_for_it() -> None:
    for sampler, kind in (
        ("euler", diffusers.EDMEulerScheduler),
        ("dpmpp_2m", diffusers.EDMDPMSolverMultistepScheduler),
    ):
        assert type(build_scheduler(sampler, CONFIGS["edm"])) is kind
        expected = run_diffusers(kind.from_config(CONFIGS["edm"]), 8, 1)
        assert difference(run_table(tabulate(sampler, "edm", (*FEW_STEPS, 8)), 8, 1), expected) < BOUND
