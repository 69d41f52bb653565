"""The reference on tiny networks: real diffusers pipelines and schedulers, every task."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build
from hidiff_export.checkpoints.synthetic import synthesize
from hidiff_export.families.family import default_scheduler
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.recipe import Recipe
from hidiff_export.reference.diffusers_run import Networks
from hidiff_export.reference.reference import record_reference
from hidiff_runtime.verification.reference_samples import CallSample, ReferenceSamples, Stored

# test_verify.py replays what the other families and tasks record.
TASKS = {
    "sd15": {"family": "sd15", "sampler": "pndm", "steps": [2]},
    "sdxl": {"family": "sdxl", "steps": [7], "sampler": "euler_ancestral", "batch": 2, "guidance": False},
    "sdxl controlnet": {"family": "sdxl", "task": "controlnet"},
    "turbo, second order": {"family": "sdxl-turbo", "sampler": "heun", "steps": [2]},
}


def recipe_of(case: str) -> Recipe:
    common = {"source": "random:0", "unet_width": "tiny", "width": 128, "height": 128, "steps": [3]}
    return Recipe.from_dict({**common, **TASKS[case]})


@cache
def unet_of(recipe: Recipe) -> Any:
    config = recipe.unet_config()
    return build(Component.UNET, config, synthesize(Component.UNET, config, 0))


def record(recipe: Recipe, folder: Path, progress: Any = None) -> ReferenceSamples:
    index, *_ = record_reference(
        Networks(unet_of(recipe)), recipe, default_scheduler(recipe.family)[1], folder, progress
    )
    return ReferenceSamples.read(index)


def replayed(recipe: Recipe, samples: ReferenceSamples, call: CallSample, shifts: tuple[int, ...]) -> np.ndarray:
    """What the call's phase computes from its recorded inputs with ``shifts``."""
    size = (recipe.latent_height, recipe.latent_width)
    module = PhaseUNet(unet_of(recipe), recipe.unet_layout, call.phase, *size, **recipe.phase_options(call.phase))
    tensors = {name: torch.from_numpy(samples.array(source).copy()) for name, source in call.inputs.items()}
    if shifts:
        tensors["window_shifts"] = torch.tensor(shifts, dtype=torch.int32).reshape(recipe.shifts_shape(call.phase))
    with torch.inference_mode():
        output = module(**PhaseUNet.arguments(tensors)).numpy()
    return samples.candidate(call.expected, output)


def state_of(unet: torch.nn.Module) -> list[tuple[Any, ...]]:
    """Attributes and hooks of every module."""
    return [
        (type(module), tuple(vars(module)), tuple(module._forward_pre_hooks), tuple(module._forward_hooks))
        for module in unet.modules()
    ]


@pytest.mark.parametrize("case", TASKS)
def test_recorded_calls_are_what_their_phase_computes_with_their_shifts(case: str, tmp_path: Path) -> None:
    recipe = recipe_of(case)

    samples = record(recipe, tmp_path)

    assert {call.phase for call in samples.calls} == set(recipe.phase_rule().phases())
    for call in samples.calls:
        expected = samples.reference(call.expected)
        np.testing.assert_allclose(replayed(recipe, samples, call, call.window_shifts), expected, rtol=0, atol=2e-5)
    (run,) = samples.runs
    assert (run.steps, run.sampler) == (recipe.steps[0], recipe.sampler[0].value)
    assert run.guidance_scale == (5.0 if recipe.guidance else None)
    assert np.array_equal(samples.reference(run.trajectory[-1]), samples.reference(run.expected))
    assert bool(run.control) == recipe.task.has_control


def test_one_wrong_shift_or_a_wrong_phase_is_far_from_what_was_recorded(tmp_path: Path) -> None:
    recipe = recipe_of("sd15")
    samples = record(recipe, tmp_path)

    for call in samples.calls:
        expected = samples.reference(call.expected)
        wrong = ((call.window_shifts[0] + 1) % 4, *call.window_shifts[1:])
        assert np.abs(replayed(recipe, samples, call, wrong) - expected).max() > 1e-3


def test_several_shifts_and_both_sides_of_the_change_are_recorded(tmp_path: Path) -> None:
    samples = record(recipe_of("sd15"), tmp_path)

    assert [(call.phase.name, call.step, call.steps) for call in samples.calls] == [
        *(("strided", 0, 3), ("windowed", 1, 3), ("windowed", 2, 3)),
        *(("strided", 0, 3), ("windowed", 1, 3)),
    ]
    assert len({call.window_shifts for call in samples.calls}) == len(samples.calls)
    assert {shift for call in samples.calls for shift in call.window_shifts} == {0, 1, 2, 3}


def test_latents_doubled_for_guidance_are_kept_once_and_the_bounds_are_the_recipes(tmp_path: Path) -> None:
    recipe = recipe_of("sd15")

    samples = record(recipe, tmp_path)

    source = samples.calls[0].inputs["latents"]
    assert isinstance(source, Stored)
    assert source.repeat == 2
    assert (samples.call_bound.snr_db, samples.run_bound.snr_db) == (80, 60)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 500_000


def test_recording_again_gives_the_same_bytes(tmp_path: Path) -> None:
    recipe = recipe_of("sd15")

    record(recipe, tmp_path / "first")
    record(recipe, tmp_path / "again")

    for name in ("samples.json", "samples.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_progress_rises_evaluation_by_evaluation_to_the_end(tmp_path: Path) -> None:
    told: list[tuple[float, float, str]] = []

    samples = record(recipe_of("sd15"), tmp_path, lambda *now: told.append(now))

    done = [now[0] for now in told]
    assert len(told) == len(samples.calls) + 2
    assert told[-2][2] == "diffusers: schedulers"
    assert done[:-1] == sorted(set(done[:-1]))
    assert done[0] == 0
    assert done[-1] == pytest.approx(told[-1][1])
    assert told[0][2] == "diffusers: strided, step 1 of 3"


@pytest.mark.parametrize("at", [1, 4])
def test_an_interrupted_recording_leaves_the_unet_as_it_was_and_writes_nothing(tmp_path: Path, at: int) -> None:
    recipe = recipe_of("sd15")
    unet = unet_of(recipe)
    before = state_of(unet)
    told: list[float] = []

    def interrupt(done: float, _total: float, _note: str) -> None:
        told.append(done)
        if len(told) > at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(recipe, tmp_path / "reference", interrupt)

    assert state_of(unet) == before
    assert not (tmp_path / "reference").exists()
