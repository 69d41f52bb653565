"""Logical steps are read off the scheduler, whatever became of the run before."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch

from hidiff_export.diffusers_api.method_patches import MethodPatches
from hidiff_export.diffusers_api.run_tracker import RunTracker
from hidiff_export.errors import InputError


class Pipe:
    """What a RunWatch looks at, as diffusers' pipelines have it."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def prepare_latents(self, shape: tuple[int, ...], generator: Any = None) -> None:
        """Takes the generator, as diffusers' does."""

    def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> None:
        """Takes the generator, as diffusers' does."""


def evaluate(pipe: Pipe, times: int = 1) -> None:
    latents = torch.ones(1, 4, 2, 2)
    for timestep in pipe.scheduler.timesteps[:times]:
        pipe.scheduler.step(0 * latents, timestep, latents)


@pytest.fixture
def ddim() -> Any:
    return diffusers.DDIMScheduler()


@pytest.mark.parametrize(
    ("name", "steps", "logical"),
    [
        ("DDIMScheduler", 4, [0, 1, 2, 3]),
        ("HeunDiscreteScheduler", 3, [0, 0, 1, 1, 2]),
        ("KDPM2DiscreteScheduler", 3, [0, 0, 1, 1, 2]),
        ("DPMSolverMultistepScheduler", 3, [0, 1, 2]),
    ],
)
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # diffusers' KDPM2 hands a tensor to numpy
def test_steps_are_logical_ones(name: str, steps: int, logical: list[int]) -> None:
    pipe = Pipe(getattr(diffusers, name)())
    watch = RunTracker(pipe, MethodPatches())
    pipe.scheduler.set_timesteps(steps)
    seen = []
    latents = torch.ones(1, 4, 2, 2)
    for timestep in pipe.scheduler.timesteps:
        seen.append(watch.position())
        pipe.scheduler.step(0 * latents, timestep, latents)
    assert seen == [(step, steps) for step in logical]


def test_pndm_counts_its_extra_evaluation_as_a_step() -> None:
    pipe = Pipe(diffusers.PNDMScheduler(skip_prk_steps=True))
    watch = RunTracker(pipe, MethodPatches())
    pipe.scheduler.set_timesteps(4)
    evaluate(pipe, 2)
    assert watch.position() == (2, 5)


def test_new_timesteps_begin_a_new_run(ddim: Any) -> None:
    watch = RunTracker(pipe := Pipe(ddim), MethodPatches())
    ddim.set_timesteps(10)
    evaluate(pipe, 3)
    ddim.set_timesteps(4)
    assert watch.position() == (0, 4)


def test_the_pipelines_own_count_holds_for_its_own_run_alone(ddim: Any) -> None:
    pipe = Pipe(ddim)
    watch = RunTracker(pipe, MethodPatches())
    ddim.set_timesteps(10)
    pipe._num_timesteps = 6  # type: ignore[attr-defined]  # as image-to-image at strength 0.6 does
    assert watch.position() == (0, 6)
    ddim.set_timesteps(10)
    assert watch.position() == (0, 10)
    assert pipe._num_timesteps == 6  # type: ignore[attr-defined]
    watch.close()
    assert type(pipe._num_timesteps) is int  # type: ignore[attr-defined]


def test_a_scheduler_put_in_later_is_followed_from_then_on(ddim: Any) -> None:
    pipe, overrides = Pipe(ddim), MethodPatches()
    watch = RunTracker(pipe, overrides)
    ddim.set_timesteps(10)
    evaluate(pipe, 3)
    other = pipe.scheduler = diffusers.EulerDiscreteScheduler()
    other.set_timesteps(5)
    assert watch.position() == (0, 5)
    evaluate(pipe, 2)
    assert watch.position() == (2, 5)
    pipe.scheduler = ddim
    ddim.set_timesteps(3)
    assert watch.position() == (0, 3)
    overrides.undo()
    assert not {"step", "set_timesteps"} & (vars(ddim).keys() | vars(other).keys())


def test_a_copy_of_the_scheduler_does_not_count(ddim: Any) -> None:
    watch = RunTracker(pipe := Pipe(ddim), MethodPatches())
    ddim.set_timesteps(10)
    evaluate(pipe, 3)
    spare = copy.deepcopy(ddim)
    spare.set_timesteps(5)
    evaluate(Pipe(spare), 2)
    assert watch.position() == (3, 10)
    assert len(ddim.timesteps) == 10


def test_the_generators_are_those_of_the_run(ddim: Any) -> None:
    pipe = Pipe(ddim)
    watch = RunTracker(pipe, MethodPatches())
    first, second = torch.Generator(), torch.Generator()
    ddim.set_timesteps(10)
    pipe.prepare_latents((1,), generator=first)
    pipe.prepare_extra_step_kwargs(first, 0.0)
    assert watch.generators == (first,)
    ddim.set_timesteps(10)
    assert watch.generators == ()
    pipe.prepare_extra_step_kwargs([second, first], 0.0)
    assert watch.generators == (second, first)


def test_outside_a_run_there_is_no_step(ddim: Any) -> None:
    watch = RunTracker(Pipe(ddim), MethodPatches())
    with pytest.raises(InputError, match="outside a run"):
        watch.position()
