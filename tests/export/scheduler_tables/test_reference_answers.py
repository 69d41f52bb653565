"""What schedulers answer, beside their tables: sound ones agree, and every change that alters a picture is found."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hidiff_export.families.family import Family, default_scheduler
from hidiff_export.scheduler_tables.diffusers_schedulers import build_scheduler
from hidiff_export.scheduler_tables.names import SAMPLERS, samplers_for
from hidiff_export.scheduler_tables.reference_answers import ask, shown
from hidiff_export.scheduler_tables.scheduler_probe import probe
from hidiff_runtime.errors import BundleError
from hidiff_runtime.sampling.scheduler_table import EtaTerms, SamplerTable
from hidiff_runtime.sampling.table_rows import Rows
from hidiff_runtime.sampling.torch_rng import TorchGenerator
from hidiff_runtime.verification.replay_schedulers import replay_sampler
from hidiff_runtime.verification.scheduler_samples import SamplerAnswers, SamplerSample

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' DEIS, on numpy 2

SHAPE = (1, 2, 2, 3)
STEPS = (1, 2, 4)
SEEN = 1e-4
"""A change to a run, of the largest value there, that a picture may show."""

ZERO_SNR = {
    **default_scheduler(Family.SDXL)[1],
    **{"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
}
EDM = {
    **{"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0},
    **{"sigma_schedule": "exponential", "prediction_type": "v_prediction", "num_train_timesteps": 1000},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": default_scheduler(Family.SD15)[1],
    "sd21-v": {**default_scheduler(Family.SD21)[1], "prediction_type": "v_prediction"},
    "linspace": {**default_scheduler(Family.SD15)[1], "timestep_spacing": "linspace", "steps_offset": 0},
    "zero-snr": ZERO_SNR,
    "edm": EDM,
}
CASES = [(sampler, config) for config in CONFIGS for sampler in samplers_for(CONFIGS[config])]


@functools.cache
def made(sampler: str, config: str, steps: tuple[int, ...] = STEPS) -> tuple[SamplerTable, SamplerAnswers]:
    table = probe(sampler, CONFIGS[config], steps)
    return table, ask(build_scheduler(sampler, CONFIGS[config]), steps, shown(table.rows))


def sample_of(table: SamplerTable) -> SamplerSample:
    eta = float(table.origin["eta"]) if "eta" in table.origin else None
    return SamplerSample(table.sampler, table.order, eta, table.rows.depth)


@pytest.mark.parametrize(("sampler", "config"), CASES)
def test_every_table_agrees_with_its_scheduler(sampler: str, config: str) -> None:
    table, answers = made(sampler, config, (1, 2, 3, 5, 8, 20) if config == "sd15" else (1, 2, 5))
    verdict = replay_sampler(table, sample_of(table), answers)
    assert verdict.ok, (verdict.fault, verdict.metrics)
    assert answers.steps.tolist() == table.steps.tolist()


def pictures(table: SamplerTable) -> list[np.ndarray]:
    """Every run that a table gives, with a model that is not linear: what the model is given, told, and the result."""
    found = []
    for steps in table.steps.tolist():
        for left in range(1, steps + 1):
            for eta in (0.0, 0.7) if table.eta is not None else (0.0,):
                generator = TorchGenerator(steps)
                strength = None if left == steps else (left + 0.5) / steps
                schedule = table.schedule(steps, strength=strength, eta=eta)
                first = generator.randn(SHAPE)
                state = (
                    schedule.start(first)
                    if strength is None
                    else schedule.start_from(first / 2, generator.randn(SHAPE))
                )
                kept = [schedule.noised(first, first[::-1], number) for number in range(len(schedule))]
                while not state.done:
                    given, told = state.model_input(), np.full(SHAPE, state.timestep / 100, np.float32)
                    facts = [np.full(SHAPE, fact, np.float32) for fact in (state.step, state.draws_noise)]
                    kept += [state.latents, told, *facts]
                    output = np.tanh(0.8 * given + np.sin(told)) + 0.1 * given
                    state.advance(output, generator.randn(SHAPE) if state.draws_noise else None)
                found.append(np.stack([*kept, state.latents]))
    return found


def differ(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """Whether some run is another."""
    if [run.shape for run in one] != [run.shape for run in other]:
        return True
    return any(np.abs(mine - theirs).max() > SEEN * np.abs(mine).max() for mine, theirs in zip(one, other, strict=True))


def nudged(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array with each of its entries changed alone."""
    for place in np.ndindex(array.shape):
        other = array.copy()
        if array.dtype == np.bool_:
            other[place] = ~other[place]
        elif array.dtype.kind == "i":
            other[place] += 1
        else:
            other[place] += 0.02 * other[place] if other[place] else 0.02
        yield other


def changes(table: SamplerTable) -> Iterator[tuple[str, Any]]:
    """Every change of a single entry, of each array; as a function, since some are refused when they are made."""
    for name in ("steps", "first", "init_noise_sigma", "timesteps", "input_scale", "draws_noise", "noising"):
        for other in nudged(getattr(table, name)):
            yield name, functools.partial(dataclasses.replace, table, **{name: other})
    for other in nudged(table.rows.distinct):
        yield "rows", lambda other=other: dataclasses.replace(table, rows=Rows(other, table.rows.places))
    for other in nudged(table.rows.places):
        yield "places", lambda other=other: dataclasses.replace(table, rows=Rows(table.rows.distinct, other))
    for name in ("direction", "share", "noise") if table.eta is not None else ():
        for other in nudged(getattr(table.eta, name)):
            fields = {**vars(table.eta), name: other}
            yield f"eta {name}", functools.partial(dataclasses.replace, table, eta=EtaTerms(**fields))
    yield "order", functools.partial(dataclasses.replace, table, order=table.order + 1)
    if table.rows.depth:
        fewer = Rows(table.rows.distinct, table.rows.places[:1])
        yield "depth", functools.partial(dataclasses.replace, table, rows=fewer)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_change_that_alters_a_picture_is_found(sampler: str) -> None:
    table, answers = made(sampler, "sd15")
    right, tried, mattered = pictures(table), set[str](), set[str]()
    for name, change in changes(table):
        tried.add(name)
        try:
            other = change()
        except BundleError:  # is refused when it is read
            mattered.add(name)
            continue
        if differ(right, pictures(other)):
            mattered.add(name)
            assert not replay_sampler(other, sample_of(table), answers).ok, name
    assert tried - mattered <= {"input_scale"} | ({"order"} if table.order == 1 else set()), tried - mattered


def test_tables_in_each_others_place_are_found_though_they_say_the_others_name() -> None:
    one, answers = made("dpmpp_2m", "sd15")
    other, _ = made("deis", "sd15")
    verdict = replay_sampler(dataclasses.replace(other, sampler="dpmpp_2m"), sample_of(one), answers)
    assert not verdict.ok
    assert verdict.fault == "sample of 4 steps, evaluation 2"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"order": 2}, "evaluations a step: expected 1, got 2"),
        ({"sampler": "ddpm"}, "sampler: expected ddim, got ddpm"),
        ({"origin": {"eta": "0.5"}}, "eta of the table: expected None, got 0.5"),
    ],
)
def test_what_differs_is_named(change: dict[str, Any], fault: str) -> None:
    table, answers = made("ddim", "sd15", (1, 4))
    if "order" in change:
        table = dataclasses.replace(table, steps=np.array([1, 2]))
    verdict = replay_sampler(dataclasses.replace(table, **change), sample_of(made("ddim", "sd15", (1, 4))[0]), answers)
    assert verdict.fault == fault


def test_where_a_step_differs_is_named() -> None:
    table, answers = made("ddim", "sd15")
    assert table.eta is not None
    share = table.eta.share.copy()
    share[-2] += 0.1
    other = dataclasses.replace(table, eta=dataclasses.replace(table.eta, share=share))
    verdict = replay_sampler(other, sample_of(table), answers)
    assert verdict.fault == "sample of 4 steps at eta 0.8, evaluation 3"
    table, answers = made("dpmpp_2m", "sd15")
    places = table.rows.places.copy()
    places[1, -2] = places[1, -1]
    other = dataclasses.replace(table, rows=Rows(table.rows.distinct, places))
    assert replay_sampler(other, sample_of(table), answers).fault == "sample of 4 steps from step 3, evaluation 1"


def test_step_counts_that_a_scheduler_does_not_run_with_are_left_out() -> None:
    answers = ask(build_scheduler("lcm", CONFIGS["sd15"]), [4, 51], 0)
    assert answers.steps.tolist() == [4]


def test_a_schedulers_answers_do_not_depend_on_what_was_asked_before() -> None:
    alone = ask(build_scheduler("dpmpp_2m_sde", CONFIGS["sd15"]), [4], 2)
    among = ask(build_scheduler("dpmpp_2m_sde", CONFIGS["sd15"]), [2, 4], 2)
    assert np.array_equal(alone.timesteps, among.timesteps[2:])
    assert np.array_equal(alone.samples[:4], among.samples[2:6])
    assert answers_are_float32(among)


def answers_are_float32(answers: SamplerAnswers) -> bool:
    return answers.samples.dtype == answers.scaled.dtype == answers.noised.dtype == np.float32
