"""The web UIs' words for a table's schedule, held against their definitions, on the real schedulers' tables."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hidiff_export.families.family import Family, default_scheduler
from hidiff_export.scheduler_tables.names import SAMPLERS
from hidiff_export.scheduler_tables.scheduler_probe import probe
from hidiff_runtime.pipeline.webui_names import NAMES, follows, sampler_name, schedule_name, split_name
from hidiff_runtime.sampling.scheduler_table import SamplerTable

CONFIG = {**default_scheduler(Family.SD15)[1], "timestep_spacing": "leading"}
STEPS = 20


def table(sampler: str, **changes: object) -> SamplerTable:
    return probe(sampler, {**CONFIG, **changes}, [STEPS])


def taken(found: SamplerTable) -> list[float]:
    return sorted({evaluation.timestep for evaluation in found.schedule(STEPS).evaluations}, reverse=True)


def test_every_sampler_has_a_web_uis_name() -> None:
    assert SAMPLERS.keys() <= NAMES.keys()


@pytest.mark.parametrize(
    ("spacing", "word", "formula"),
    [
        ("linspace", "Uniform", lambda k: 999 - k * 999 / (STEPS - 1)),
        ("trailing", "SGM Uniform", lambda k: 999 - k * 999 / STEPS),
        ("leading", "DDIM", lambda k: 951 - k * (1000 // STEPS)),
    ],
)
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "heun", "ddpm"])
def test_a_schedule_of_timesteps_is_named_by_what_it_is(
    sampler: str, spacing: str, word: str, formula: Callable[[int], float]
) -> None:
    found = table(sampler, timestep_spacing=spacing)
    assert np.abs(np.array(taken(found)) - [formula(step) for step in range(STEPS)]).max() < 1.5
    assert schedule_name(found, STEPS) == word
    assert follows(found, STEPS, word)
    others = {"Uniform", "SGM Uniform", "DDIM", "Karras"} - {word}
    assert not any(follows(found, STEPS, other) for other in others)


def test_linspace_is_another_schedule_for_multistep_solvers() -> None:
    found = table("dpmpp_2m", timestep_spacing="linspace")
    assert taken(found)[-1] == 50  # Euler's ends at 0
    assert schedule_name(found, STEPS) == "SGM Uniform"


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "unipc", "deis"])
def test_a_schedule_that_web_uis_do_not_have_gets_no_word(sampler: str) -> None:
    found = table(sampler, timestep_spacing="leading")
    assert taken(found)[0] == 941
    assert schedule_name(found, STEPS) is None


def test_noise_levels_are_named_by_the_configuration() -> None:
    assert schedule_name(table("dpmpp_2m_karras"), STEPS) == "Karras"
    assert schedule_name(table("euler", use_karras_sigmas=True, timestep_spacing="trailing"), STEPS) == "Karras"
    assert schedule_name(table("dpmpp_2m", use_exponential_sigmas=True), STEPS) == "Exponential"
    assert schedule_name(table("dpmpp_2m", use_lu_lambdas=True), STEPS) is None
    assert schedule_name(table("lcm"), STEPS) is None


def test_samplers_with_timesteps_of_their_own_get_a_word_where_these_are_others() -> None:
    for sampler, name in (("ddim", "DDIM"), ("pndm", "PLMS")):
        usual, other = table(sampler), table(sampler, timestep_spacing="trailing")
        assert sampler_name(usual) == name
        assert (schedule_name(usual, STEPS), schedule_name(other, STEPS)) == (None, "SGM Uniform")
        assert follows(usual, STEPS, "Automatic")
        assert follows(usual, STEPS, "Karras")  # which web UIs pass over
        assert not follows(other, STEPS, "Automatic")


def test_automatic_is_what_web_uis_take_beside_the_sampler() -> None:
    assert follows(table("dpmpp_2m_karras"), STEPS, "Automatic")
    assert not follows(table("dpmpp_2m", timestep_spacing="trailing"), STEPS, "Automatic")
    assert follows(table("dpmpp_2m_sde", use_exponential_sigmas=True), STEPS, "Automatic")
    assert follows(table("euler", timestep_spacing="linspace"), STEPS, "Automatic")
    assert not follows(table("euler"), STEPS, "Automatic")


def test_a_solver_of_another_type_has_another_name() -> None:
    assert sampler_name(table("dpmpp_2m_sde")) == "DPM++ 2M SDE"
    assert sampler_name(table("dpmpp_2m_sde", solver_type="heun")) == "DPM++ 2M SDE Heun"


@pytest.mark.parametrize(
    ("sampler", "schedule", "expected"),
    [
        ("DPM++ 2M Karras", None, ("DPM++ 2M", "Karras")),
        ("DPM++ 2M", "Karras", ("DPM++ 2M", "Karras")),
        ("dpm++ 2m sde karras", None, ("DPM++ 2M SDE", "Karras")),
        ("DPM++ 2M SDE Heun Exponential", None, ("DPM++ 2M SDE Heun", "Exponential")),
        ("k_dpmpp_2m_ka", None, ("DPM++ 2M", "Karras")),
        ("Euler A", "sgm_uniform", ("Euler a", "SGM Uniform")),
        ("Euler SGMUniform", "Automatic", ("Euler", "SGM Uniform")),
        ("Euler", "Simple", ("Euler", "SGM Uniform")),
        ("Euler", "Normal", ("Euler", "Uniform")),
        ("DDIM", "DDIM", ("DDIM", "DDIM")),
        ("PLMS", "Automatic", ("PLMS", "Automatic")),
        ("PNDM", None, ("PLMS", None)),
        ("euler_ancestral", None, ("Euler a", None)),
        ("DPM++ SDE", "AYS", ("DPM++ SDE", "AYS")),
        ("plain", None, ("plain", None)),
    ],
)
def test_samplers_are_read_in_old_and_new_spellings(
    sampler: str, schedule: str | None, expected: tuple[str, str | None]
) -> None:
    assert split_name(sampler, schedule) == expected
