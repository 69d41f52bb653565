"""Probing: what it reads off schedulers, and which schedulers it refuses."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from hidiff_export.errors import ExportError, InputError
from hidiff_export.families.family import Family, default_scheduler
from hidiff_export.recipe.field_types import SamplerName
from hidiff_export.scheduler_tables.diffusers_schedulers import build_scheduler
from hidiff_export.scheduler_tables.linear_probe import SHAPE, StepsUnsupported, respond
from hidiff_export.scheduler_tables.names import SAMPLERS, find_sampler, samplers_for
from hidiff_export.scheduler_tables.scheduler_probe import probe
from hidiff_runtime.sampling.scheduler_table import SamplerTable

CONFIG = default_scheduler(Family.SDXL)[1]


class Fake:
    """A scheduler of a few lines: ``sample - output / 2``, a timestep a step."""

    config: dict[str, object] = {}  # noqa: RUF012 - as diffusers has it

    def __init__(self, update: Callable[..., torch.Tensor] | None = None) -> None:
        self.update = update or (lambda _self, output, sample, _generator: sample - output / 2)
        self.timesteps = torch.tensor([])

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = torch.arange(steps, 0, -1)

    def scale_model_input(self, sample: torch.Tensor, _timestep: object) -> torch.Tensor:
        return sample / 4

    def step(
        self,
        output: torch.Tensor,
        _timestep: object,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: Any = None,
    ) -> tuple[torch.Tensor]:
        assert return_dict is False
        return (self.update(self, output, sample, generator),)


def test_reads_the_coefficients_of_a_plain_scheduler() -> None:
    responses = respond(Fake(), 3)
    assert [response.timestep for response in responses] == [3, 2, 1]
    for response in responses:
        assert response.input_scale == 0.25
        assert not response.draws_noise
        assert response.rows.tolist() == [[1, -0.5, 0]]


def test_kept_tensors_become_state() -> None:
    def update(scheduler: Any, output: torch.Tensor, sample: torch.Tensor, _generator: Any) -> torch.Tensor:
        last, scheduler.last = getattr(scheduler, "last", None), output - sample
        scheduler.many = [None, output * 3]
        return sample if last is None else sample + last / 8

    first, second = respond(Fake(update), 2)
    assert first.rows.tolist() == [[1, 0, 0], [-1, 1, 0], [0, 3, 0]]
    assert second.rows.tolist() == [[1, 0, 0, 0.125, 0], [-1, 1, 0, 0, 0], [0, 3, 0, 0, 0]]


def test_noise_is_told_from_the_generator_it_moves() -> None:
    def update(_scheduler: Any, output: torch.Tensor, sample: torch.Tensor, generator: Any) -> torch.Tensor:
        return sample + output + 20 * torch.randn(sample.shape, generator=generator)

    (response,) = respond(Fake(update), 1)
    assert response.draws_noise
    np.testing.assert_allclose(response.rows, [[1, 1, 20]], rtol=1e-6)


def clipped(limit: float) -> Callable[..., torch.Tensor]:
    return lambda _self, output, sample, _generator: sample - output.clamp(-limit, limit)


def hidden_state(_scheduler: Any, output: torch.Tensor, sample: torch.Tensor, _generator: Any) -> torch.Tensor:
    kept: list[torch.Tensor] = _scheduler.config.setdefault("hidden", [torch.zeros(SHAPE)])
    kept.append(output)
    return sample + kept[-2]


NOT_LINEAR = {
    "clip at 1": clipped(1),
    "clip at 5000": clipped(5000),
    "constant": lambda _self, _output, sample, _generator: sample + 1,
    "square": lambda _self, output, sample, _generator: sample + output**2,
    "mixes elements": lambda _self, output, sample, _generator: sample + output.mean(),
    "rolls elements": lambda _self, output, sample, _generator: sample + output.roll(1, -1),
    "noise from elsewhere": lambda _self, _output, sample, _generator: sample + torch.randn(sample.shape),
    "uniform noise": lambda _self, _output, sample, generator: sample + torch.rand(SHAPE, generator=generator),
    "keeps a tensor out of sight": hidden_state,
}


@pytest.mark.parametrize("update", NOT_LINEAR.values(), ids=NOT_LINEAR.keys())
def test_a_step_that_is_not_linear_is_refused(update: Callable[..., torch.Tensor]) -> None:
    fake = Fake(update)
    fake.config = {}
    with pytest.raises(ExportError, match="not a linear combination"):
        respond(fake, 3)


def test_an_input_scale_that_is_not_linear_is_refused() -> None:
    class Offset(Fake):
        def scale_model_input(self, sample: torch.Tensor, _timestep: object) -> torch.Tensor:
            return sample + 1

    with pytest.raises(ExportError, match="not a linear combination"):
        respond(Offset(), 1)


def test_other_random_numbers_are_refused() -> None:
    def update(_scheduler: Any, _output: torch.Tensor, sample: torch.Tensor, generator: Any) -> torch.Tensor:
        return sample + torch.randn((2, *SHAPE), generator=generator)[0]

    with pytest.raises(ExportError, match="other random numbers"):
        respond(Fake(update), 1)


def test_more_kept_tensors_than_fit_are_refused() -> None:
    def update(scheduler: Any, output: torch.Tensor, sample: torch.Tensor, _generator: Any) -> torch.Tensor:
        scheduler.all = [*getattr(scheduler, "all", []), output]
        return sample

    with pytest.raises(ExportError, match="more tensors"):
        respond(Fake(update), 40)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_results_that_are_not_finite_leave_the_number_of_steps_out(bad: float) -> None:
    with pytest.raises(StepsUnsupported, match="not finite"):
        respond(Fake(lambda _self, output, sample, _generator: sample + bad * output), 1)


@pytest.mark.parametrize(
    ("sampler", "config"),
    [
        ("ddim", {"clip_sample": True}),
        ("ddim", {"clip_sample": True, "clip_sample_range": 300.0}),
        ("ddpm", {"clip_sample": True}),
        ("heun", {"clip_sample": True}),
        ("lcm", {"clip_sample": True}),
        ("ddim", {"thresholding": True}),
        ("dpmpp_2m", {"thresholding": True}),
        ("unipc", {"thresholding": True, "sample_max_value": 100.0}),
        ("deis", {"thresholding": True}),
    ],
)
def test_clipping_and_thresholding_are_refused_by_what_they_do(sampler: str, config: dict[str, object]) -> None:
    with pytest.raises(ExportError, match="not a linear combination") as caught:
        probe(sampler, {**CONFIG, **config}, [4])
    assert next(iter(config)) in str(caught.value.given)


def test_numbers_of_steps_the_scheduler_refuses_are_absent_with_the_reason() -> None:
    table = probe("lcm", CONFIG, [4, 50, 51])
    assert table.steps.tolist() == [4, 50]
    assert list(json.loads(table.origin["left_out"])) == ["51"]
    with pytest.raises(InputError, match="no table") as caught:
        table.schedule(51)
    assert "original_steps" in str(caught.value.given)
    assert caught.value.advice == "Ask for 4, 50 steps."


def test_no_number_of_steps_at_all_is_an_error() -> None:
    with pytest.raises(ExportError, match="none of these numbers of steps") as caught:
        probe("pndm", {**CONFIG, "skip_prk_steps": False}, [1, 2])
    assert "1 steps:" in str(caught.value.given)


def test_a_runge_kutta_start_is_tabulated_too() -> None:
    assert len(probe("pndm", {**CONFIG, "skip_prk_steps": False}, [10]).schedule(10)) == 12 + 10 - 3


def test_a_configuration_the_scheduler_refuses() -> None:
    with pytest.raises(ExportError, match="refuses this configuration"):
        probe("euler", {**CONFIG, "beta_schedule": "nonsense"}, [1])


def test_the_configuration_of_any_scheduler_class_serves() -> None:
    euler = EulerDiscreteScheduler.from_config(CONFIG)
    expected = build_scheduler("ddim", CONFIG)
    found = build_scheduler("ddim", {"_class_name": "EulerDiscreteScheduler", "unheard_of": 1, **dict(euler.config)})
    assert isinstance(found, DDIMScheduler)
    assert found.config.clip_sample is False
    assert torch.equal(found.alphas_cumprod, expected.alphas_cumprod)


def test_the_name_decides_over_the_configuration() -> None:
    karras = {**CONFIG, "use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}
    assert build_scheduler("dpmpp_2m", karras).config.use_karras_sigmas is False
    assert build_scheduler("dpmpp_2m", karras).config.algorithm_type == "dpmsolver++"
    assert build_scheduler("dpmpp_2m_karras", CONFIG).config.use_karras_sigmas is True
    assert build_scheduler("dpmpp_2m_sde", CONFIG).config.algorithm_type == "sde-dpmsolver++"


def test_only_state_that_is_read_is_stored() -> None:
    slots = {name: probe(name, CONFIG, [8]).rows.states for name in SAMPLERS}
    stateless = dict.fromkeys(("ddim", "ddpm", "euler", "euler_ancestral", "lcm", "tcd"), 0)
    one = dict.fromkeys(("dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "deis"), 1)
    assert slots == {**stateless, **one, "heun": 2, "pndm": 3, "unipc": 3}


def test_the_same_table_every_time_and_no_random_numbers_of_the_users(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    hashes = [probe("dpmpp_2m_sde", CONFIG, range(1, 6)).write(tmp_path / f"{index}") for index in range(2)]
    assert hashes[0] == hashes[1]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sampler", ["ddim", "unipc"])
def test_a_table_read_back_is_the_table_written(sampler: str, tmp_path: Path) -> None:
    table = probe(sampler, CONFIG, [3, 4])
    table.write(tmp_path / "table.safetensors")
    read = SamplerTable.read(tmp_path / "table.safetensors")
    assert (read.sampler, read.order, read.origin) == (sampler, 1, table.origin)
    assert json.loads(read.origin["config"])["beta_end"] == 0.012
    for eta in (0, 0.5) if sampler == "ddim" else (0,):
        for mine, theirs in zip(
            read.schedule(4, eta=eta).evaluations, table.schedule(4, eta=eta).evaluations, strict=True
        ):
            assert mine.timestep == theirs.timestep
            assert np.array_equal(mine.rows, theirs.rows)


def test_another_dependence_on_eta_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DDIMScheduler.step

    def squared(self: Any, *args: Any, eta: float = 0.0, generator: Any = None, return_dict: bool = True) -> Any:
        return honest(self, *args, eta=eta**2, generator=generator, return_dict=return_dict)

    monkeypatch.setattr(DDIMScheduler, "step", squared)
    with pytest.raises(ExportError, match="depends on eta in another way"):
        probe("ddim", CONFIG, [5])


def test_names() -> None:
    assert set(SAMPLERS) == {name.value for name in SamplerName}
    with pytest.raises(InputError, match="no sampler of that name") as caught:
        find_sampler("dpm")
    assert "unipc" in caught.value.advice


ZERO_SNR = {**CONFIG, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
EDM = {
    **{"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0},
    **{"sigma_schedule": "exponential", "prediction_type": "v_prediction", "num_train_timesteps": 1000},
}


@pytest.mark.parametrize(("config", "what"), [(ZERO_SNR, "zero terminal SNR"), (EDM, "an EDM noise schedule")])
def test_a_noise_schedule_that_a_sampler_would_pass_over_is_refused(config: dict[str, Any], what: str) -> None:
    able = samplers_for(config)
    for sampler in SAMPLERS:
        kind = getattr(diffusers, SAMPLERS[sampler].scheduler)
        if config is ZERO_SNR:
            assert (sampler in able) == ("rescale_betas_zero_snr" in inspect.signature(kind.__init__).parameters)
        if sampler in able:
            build_scheduler(sampler, config)
            continue
        with pytest.raises(ExportError, match=f"cannot draw {what}") as refused:
            build_scheduler(sampler, config)
        assert refused.value.advice == f"Use {', '.join(able)}."
    assert {"euler", "dpmpp_2m"} <= set(able)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_timesteps_of_ones_own_are_taken_or_refused_by_name(sampler: str) -> None:
    given = (999, 749, 499, 249)
    taken = {"ddpm", "euler", "dpmpp_2m", "dpmpp_2m_sde", "heun", "lcm", "tcd"}
    if sampler in taken:
        table = probe(sampler, CONFIG, [4], timesteps=given)
        told = [evaluation.timestep for evaluation in table.schedule(4).evaluations]
        assert told[0] == 999
        assert set(told) == set(given)
        with pytest.raises(InputError, match="no table for this number of steps"):
            table.schedule(5)
    else:
        with pytest.raises(ExportError, match=r"takes no timesteps of one's own|refuses this configuration"):
            probe(sampler, CONFIG, [4], timesteps=given)


def test_tcds_eta_is_settled_in_its_table() -> None:
    table = probe("tcd", CONFIG, [4], tcd_eta=0.5)
    assert table.origin["eta"] == "0.5"
    plain, same = table.schedule(4), table.schedule(4, eta=0.5)
    assert np.array_equal([one.rows for one in plain.evaluations], [one.rows for one in same.evaluations])
    with pytest.raises(InputError, match="was built with another eta") as refused:
        table.schedule(4, eta=0.3)
    assert "tcd_eta=0.3" in refused.value.advice


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_the_configuration_in_a_table_is_json_in_one_order_and_gives_the_scheduler_again(sampler: str) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    if sampler not in samplers_for(CONFIG):
        pytest.skip("it takes another noise schedule")
    origin = probe(sampler, CONFIG, [4]).origin
    config = json.loads(origin["config"], parse_constant=refuse)
    assert config["_use_default_values"] == sorted(config["_use_default_values"])
    again, first = (dict(build_scheduler(sampler, given).config) for given in (config, CONFIG))
    assert [again.pop("_use_default_values", None), first.pop("_use_default_values")][1]
    assert again == first


def test_an_infinity_that_a_scheduler_does_not_have_of_itself_is_refused() -> None:
    saved = probe("dpmpp_2m", {**CONFIG, "lambda_min_clipped": float("-inf")}, [4])
    assert "lambda_min_clipped" not in json.loads(saved.origin["config"])
    with pytest.raises(ExportError, match="no finite number") as refused:
        probe("dpmpp_2m", {**CONFIG, "sample_max_value": float("inf")}, [4])
    assert refused.value.given == "sample_max_value"
