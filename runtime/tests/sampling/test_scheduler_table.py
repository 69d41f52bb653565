"""Sampler tables from rows written by hand: running them, storing them, and every way to ask for the wrong thing."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hidiff_runtime.errors import BundleError, InputError
from hidiff_runtime.format import safetensors
from hidiff_runtime.sampling import scheduler_table
from hidiff_runtime.sampling.scheduler_table import EtaTerms, SamplerTable
from hidiff_runtime.sampling.table_rows import Rows

STEPS = (2, 3, 5)
FIRST = (0, 2, 5, 10)
SHAPE = (1, 4, 2, 3)


def table(**changes: Any) -> SamplerTable:
    """Rows over (sample, output, noise, state); evaluation k of all ten has rows of its own; odd ones draw noise."""
    total = FIRST[-1]
    number = np.arange(total)
    rows = np.zeros((total, 2, 4))
    rows[:, 0] = np.stack([1 - 0.05 * number, -0.1 * number - 0.1, 0.3 * (number % 2), 0.02 * number], axis=1)
    rows[:, 1] = [0.5, 1.0, 0.0, -0.25]
    fields: dict[str, Any] = {
        "sampler": "by_hand",
        "order": 1,
        "steps": np.array(STEPS),
        "first": np.array(FIRST),
        "init_noise_sigma": np.array([2.0, 3.0, 5.0]),
        "timesteps": np.linspace(999, 0, total, dtype=np.float32),
        "input_scale": 1 / (1.0 + number),
        "draws_noise": number % 2 == 1,
        "noising": np.stack([0.1 * number, 1 - 0.1 * number], axis=1),
        "rows": rows,
        "early": rows[None] * [[[0.5], [1.0]]],
    }
    fields |= changes
    fields["rows"] = Rows.of(fields["rows"], fields.pop("early"))
    return SamplerTable(**fields)


def with_eta() -> SamplerTable:
    total = FIRST[-1]
    rows = np.zeros((total, 1, 3))
    rows[:, 0] = [1.5, -0.5, 0.0]
    terms = EtaTerms(np.full((total, 2), [0.25, 0.75]), np.linspace(0, 1, total), np.linspace(0.1, 1, total))
    return table(rows=rows, early=np.zeros((0, *rows.shape)), draws_noise=np.zeros(total, dtype=bool), eta=terms)


def draws(seed: int, count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(np.float32))


def test_a_run_follows_the_rows() -> None:
    schedule = table().schedule(3)
    noise, outputs, fresh = draws(0, 1)[0], draws(1, 3), draws(2, 3)
    state = schedule.start(noise)
    sample, kept = noise.astype(np.float64) * 3.0, np.zeros(SHAPE)
    for index, number in enumerate(range(2, 5)):  # this run's evaluations among all ten
        assert (state.index, state.step, state.done) == (index, index, False)
        assert state.timestep == pytest.approx(999 * (1 - number / 9))
        assert state.draws_noise == (number % 2 == 1)
        np.testing.assert_allclose(state.model_input(), sample / (1 + number), rtol=1e-6, atol=1e-7)
        state.advance(outputs[index], fresh[index] if state.draws_noise else None)
        moved = (1 - 0.05 * number) * sample - (0.1 * number + 0.1) * outputs[index] + 0.02 * number * kept
        kept = 0.5 * sample + outputs[index] - 0.25 * kept
        sample = moved + (0.3 * fresh[index] if number % 2 else 0)
        np.testing.assert_allclose(state.latents, sample, rtol=1e-5, atol=1e-6)
    assert state.done
    assert state.latents.dtype == np.float32


def test_two_runs_of_a_schedule_are_apart_and_arrays_stay_as_they_were() -> None:
    schedule = table().schedule(2)
    noise, outputs, fresh = draws(0, 1)[0], draws(1, 2), draws(2, 1)[0]
    given = [array.copy() for array in (noise, *outputs, fresh)]
    results = []
    for _ in range(2):
        state = schedule.start(noise)
        state.advance(outputs[0])
        seen = state.latents
        before = seen.copy()
        state.advance(outputs[1], fresh)
        assert np.array_equal(seen, before)
        results.append(state.latents)
    assert np.array_equal(*results)
    for array, copy in zip((noise, *outputs, fresh), given, strict=True):
        assert np.array_equal(array, copy)


def test_an_output_buffer_used_again_does_not_reach_the_state() -> None:
    schedule = table().schedule(2)
    noise, outputs, fresh = draws(0, 1)[0], draws(1, 2), draws(2, 1)[0]
    honest, reusing = schedule.start(noise), schedule.start(noise)
    buffer = np.empty(SHAPE, dtype=np.float32)
    for output, extra in zip(outputs, (None, fresh), strict=True):
        honest.advance(output, extra)
        buffer[:] = output
        reusing.advance(buffer, extra)
        buffer[:] = np.nan
    assert np.array_equal(honest.latents, reusing.latents)


@pytest.mark.parametrize(("order", "logical", "expected"), [(1, 5, [0, 1, 2, 3, 4]), (2, 3, [0, 0, 1, 1, 2])])
def test_logical_steps(order: int, logical: int, expected: list[int]) -> None:
    schedule = table(order=order, steps=np.array([1, 2, logical])).schedule(logical)
    assert (len(schedule), schedule.steps, schedule.num_inference_steps) == (5, logical, logical)
    assert [evaluation.step for evaluation in schedule.evaluations] == expected
    assert schedule.init_noise_sigma == 5


def test_eta_shrinks_the_direction_and_adds_noise() -> None:
    still = with_eta().schedule(3)
    assert not any(evaluation.draws_noise for evaluation in still.evaluations)
    for eta in (0.5, 1.0):
        for number, evaluation in enumerate(with_eta().schedule(3, eta=eta).evaluations, start=2):
            lost = 1 - np.sqrt(1 - eta**2 * number / 9)
            expected = [1.5 - lost * 0.25, -0.5 - lost * 0.75, eta * (0.1 + 0.1 * number)]
            assert evaluation.draws_noise
            np.testing.assert_allclose(evaluation.rows, [expected], rtol=1e-12)
    assert np.array_equal(with_eta().schedule(3).evaluations[0].rows, still.evaluations[0].rows)


@pytest.mark.parametrize(
    ("strength", "skipped"), [(1.0, 0), (1, 0), (0.99, 1), (0.8, 1), (0.79, 2), (np.float32(0.5), 3), (0.2, 4)]
)
def test_a_strength_leaves_the_last_steps(strength: float, skipped: int) -> None:
    whole, schedule = table().schedule(5), table().schedule(5, strength=strength)
    assert (len(schedule), schedule.steps, schedule.num_inference_steps) == (5 - skipped, 5 - skipped, 5)
    for number, (mine, stored) in enumerate(zip(schedule.evaluations, whole.evaluations[skipped:], strict=True)):
        assert (mine.timestep, mine.input_scale, mine.noising) == (stored.timestep, stored.input_scale, stored.noising)
        assert mine.step == number
        first = skipped > 0 and number == 0
        assert np.array_equal(mine.rows, stored.rows * ([[0.5], [1]] if first else 1))
    assert np.array_equal(table().schedule(5).evaluations[-1].rows, whole.evaluations[-1].rows)


def test_a_start_skips_all_evaluations_of_a_step() -> None:
    schedule = table(order=2, steps=np.array([1, 2, 3])).schedule(3, strength=0.7)
    assert [evaluation.step for evaluation in schedule.evaluations] == [0, 0, 1]
    assert schedule.steps == 2


def test_eta_in_a_run_from_a_picture() -> None:
    whole, late = with_eta().schedule(3, eta=0.5), with_eta().schedule(3, eta=0.5, strength=0.7)
    assert [evaluation.rows.tolist() for evaluation in late.evaluations] == [
        evaluation.rows.tolist() for evaluation in whole.evaluations[1:]
    ]


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), float("inf"), True, "1", None.__class__])
def test_a_strength_out_of_range(strength: Any) -> None:
    with pytest.raises(InputError, match="strength must be a number above 0, up to 1"):
        table().schedule(5, strength=strength)


@pytest.mark.parametrize("strength", [0, 0.0, 0.19])
def test_a_strength_that_leaves_no_step(strength: float) -> None:
    with pytest.raises(InputError, match="leaves no step") as caught:
        table().schedule(5, strength=strength)
    assert caught.value.advice == "Give a strength of 0.2 or more, or ask for more steps."


@pytest.mark.parametrize("steps", [*range(1, 60), 100, 333, 999, 1000])
def test_the_least_strength_that_is_advised_works(steps: int) -> None:
    fields = {"steps": np.array([steps]), "first": np.array([0, steps]), "init_noise_sigma": np.ones(1)}
    fields |= {"timesteps": np.zeros(steps, np.float32), "input_scale": np.ones(steps), "noising": np.ones((steps, 2))}
    fields |= {"draws_noise": np.zeros(steps, np.bool_), "rows": np.zeros((steps, 1, 3)), "early": None}
    with pytest.raises(InputError) as caught:
        table(**fields).schedule(steps, strength=0)
    least = float(re.findall(r"[0-9.]+", caught.value.advice)[0])
    assert int(steps * least) == 1 or steps == 1


def test_a_picture_is_noised_by_the_weights() -> None:
    schedule = table().schedule(5, strength=0.6)  # evaluations 7 to 9 of all ten
    image, noise = draws(0, 2)
    for index, number in enumerate((7, 8, 9)):
        expected = 0.1 * number * image + (1 - 0.1 * number) * noise
        np.testing.assert_allclose(schedule.noised(image, noise, index), expected, rtol=1e-5, atol=1e-6)
    state = schedule.start_from(image, noise)
    assert np.array_equal(state.latents, schedule.noised(image, noise))
    assert (state.step, state.index) == (0, 0)
    for wrong in (image[0], image.astype(np.float64), image.tolist()):
        with pytest.raises(InputError, match="must be a float32 array"):
            schedule.noised(image, wrong)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), float("inf")])
def test_an_eta_out_of_range(eta: float) -> None:
    with pytest.raises(InputError, match="eta is out of range"):
        with_eta().schedule(3, eta=eta)


def test_an_eta_for_a_sampler_without_one() -> None:
    with pytest.raises(InputError, match="by_hand takes no eta"):
        table().schedule(3, eta=0.5)
    assert len(table().schedule(3, eta=0)) == 3


@pytest.mark.parametrize("steps", [0, -1, 4, 6, True, 2.5, "3"])
def test_a_number_of_steps_without_a_table(steps: Any) -> None:
    with pytest.raises(InputError, match="by_hand has no table") as caught:
        table().schedule(steps)
    assert caught.value.given == steps
    assert caught.value.advice == "Ask for 2 to 3, 5 steps, or build the bundle with this number."


def test_a_number_of_steps_the_scheduler_refused() -> None:
    refusing = table(origin={"left_out": json.dumps({"4": "ValueError: too many"})})
    with pytest.raises(InputError) as caught:
        refusing.schedule(4)
    assert caught.value.given == "4 (ValueError: too many)"
    assert caught.value.advice == "Ask for 2 to 3, 5 steps."


LATENTS = draws(0, 1)[0]


@pytest.mark.parametrize("latents", [LATENTS.astype(np.float64), LATENTS.astype(np.float16), LATENTS.tolist(), None])
def test_latents_of_another_type(latents: Any) -> None:
    with pytest.raises(InputError, match="initial latents must be a float32 array"):
        table().schedule(2).start(latents)


@pytest.mark.parametrize(
    ("output", "noise", "message"),
    [
        (LATENTS[:, :3], LATENTS, "model's output must be a float32 array of shape \\(1, 4, 2, 3\\)"),
        (LATENTS.astype(np.float64), LATENTS, "model's output must be"),
        (LATENTS[0], LATENTS, "model's output must be"),
        (LATENTS, LATENTS[0], "noise must be a float32 array of shape"),
        (LATENTS, LATENTS.astype(np.float64), "noise must be"),
        (LATENTS, None, "needs noise"),
    ],
)
def test_a_wrong_output_or_noise_leaves_the_run_where_it_was(output: Any, noise: Any, message: str) -> None:
    state = table().schedule(2).start(LATENTS)
    state.advance(LATENTS)
    before = state.latents.copy()
    with pytest.raises(InputError, match=message):
        state.advance(output, noise)
    assert state.index == 1
    assert np.array_equal(state.latents, before)
    state.advance(LATENTS, LATENTS)
    assert state.done


def test_noise_that_is_not_taken() -> None:
    with pytest.raises(InputError, match="takes no noise"):
        table().schedule(2).start(LATENTS).advance(LATENTS, LATENTS)


@pytest.mark.parametrize("ask", ["timestep", "step", "draws_noise", "model_input", "advance"])
def test_a_run_that_is_over(ask: str) -> None:
    state = table().schedule(2).start(LATENTS)
    state.advance(LATENTS)
    state.advance(LATENTS, LATENTS)
    calls: dict[str, Callable[[], object]] = {
        "model_input": state.model_input,
        "advance": lambda: state.advance(LATENTS),
    }
    with pytest.raises(InputError, match="run is over"):
        calls.get(ask, lambda: getattr(state, ask))()


@pytest.mark.parametrize("made", [table, with_eta], ids=["state", "eta"])
def test_written_and_read(made: Callable[[], SamplerTable], tmp_path: Path) -> None:
    written = dataclasses.replace(made(), origin={"scheduler": "ByHand"})
    path = tmp_path / "by_hand.safetensors"
    assert written.write(path) == written.write(path)
    read = SamplerTable.read(path)
    assert (read.sampler, read.order, read.origin) == ("by_hand", 1, {"scheduler": "ByHand"})
    assert (read.eta is None) == (written.eta is None)
    for steps in STEPS:
        for mine, theirs in zip(read.schedule(steps).evaluations, written.schedule(steps).evaluations, strict=True):
            scalars = [(each.timestep, each.step, each.input_scale, each.draws_noise) for each in (mine, theirs)]
            assert scalars[0] == scalars[1]
            assert np.array_equal(mine.rows, theirs.rows)
    path.unlink()  # nothing of the file is needed any more
    assert len(read.schedule(5)) == 5


BROKEN: dict[str, dict[str, Any]] = {
    "rows are not finite": {"rows": np.full((10, 2, 4), np.nan)},
    "rows of the wrong shape": {"rows": np.zeros((10, 2, 5)), "early": None},
    "rows of the wrong dtype": {"rows": np.zeros((10, 2, 4), dtype=np.float32), "early": None},
    "rows of other evaluations": {"rows": np.zeros((9, 2, 4)), "early": None},
    "more states than a scheduler keeps": {"rows": np.zeros((10, 34, 36)), "early": None},
    "too few timesteps": {"timesteps": np.zeros(9, dtype=np.float32)},
    "first does not end at the last": {"first": np.array([0, 2, 5, 9])},
    "first does not rise": {"first": np.array([0, 5, 5, 10])},
    "first does not begin at 0": {"first": np.array([1, 2, 5, 10])},
    "steps do not rise": {"steps": np.array([2, 5, 3])},
    "steps of zero": {"steps": np.array([0, 3, 5])},
    "order": {"order": 0},
    "order beyond the evaluations": {"order": 10**30},
    "fewer evaluations than steps": {"steps": np.array([2, 4, 5])},
    "steps beyond the evaluations": {"steps": np.array([2, 3, 2**62])},
    "weights of one": {"noising": np.zeros((10, 1))},
    "early noise that is not drawn": {"early": np.ones((1, 10, 2, 4))},
    "noise that is not drawn": {"draws_noise": np.zeros(10, dtype=bool)},
    "eta terms": {"eta": EtaTerms(np.zeros((9, 2)), np.zeros(10), np.zeros(10))},
}


@pytest.mark.parametrize("changes", BROKEN.values(), ids=BROKEN.keys())
def test_arrays_that_do_not_fit_together(changes: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="broken"):
        table(**changes)


def damaged(path: Path, metadata: dict[str, str] | None = None, **arrays: np.ndarray | None) -> Path:
    """The file of `table`, with other metadata or arrays; None leaves one out."""
    table().write(path)
    with safetensors.SafetensorsFile.open(path) as file:
        kept = {**file.arrays(), **arrays}
        changed = {key: value for key, value in {**file.metadata, **(metadata or {})}.items() if value}
        written = path.with_name("damaged.safetensors")
        safetensors.write(written, {name: array for name, array in kept.items() if array is not None}, changed)
    return written


@pytest.mark.parametrize(
    ("metadata", "arrays", "message"),
    [
        ({"format": "1"}, {}, "not a sampler table"),
        ({"format": ""}, {}, "not a sampler table"),
        ({"sampler": ""}, {}, "broken"),
        ({"order": "two"}, {}, "broken"),
        ({}, {"rows": None}, "broken"),
        ({}, {"rows": np.float64(1.0)}, "broken"),
        ({}, {"places": None}, "broken"),
        ({}, {"places": np.full((2, 10, 2), 1000, dtype=np.int32)}, "broken"),
        ({}, {"places": np.full((2, 10, 2), -1, dtype=np.int32)}, "broken"),
        ({}, {"places": np.zeros((2, 10, 2))}, "broken"),
        ({}, {"surplus": np.zeros(1)}, "broken"),
        ({}, {"eta_share": np.zeros(10)}, "broken"),
        ({}, {"steps": np.int64(3)}, "broken"),
        ({"left_out": "{"}, {}, "left_out is no JSON object"),
        ({"left_out": "[" * 100_000}, {}, "left_out is no JSON object"),
        ({"config": "[1]"}, {}, "config is no JSON object"),
        ({"eta": "some"}, {}, "eta is no number"),
    ],
)
def test_a_damaged_file(tmp_path: Path, metadata: dict[str, str], arrays: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        SamplerTable.read(damaged(tmp_path / "table.safetensors", metadata, **arrays))


def test_a_small_file_takes_no_more_memory_than_it_has_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at many places stay a few rows; a file beyond what any sampler needs is refused by its header."""
    path = tmp_path / "table.safetensors"
    many = damaged(path, None, places=np.repeat(table().rows.places[:1], 400, axis=0))
    read = SamplerTable.read(many)
    assert read.rows.places.nbytes + read.rows.distinct.nbytes < many.stat().st_size
    assert len(read.schedule(5, strength=0.8)) == 4
    monkeypatch.setattr(scheduler_table, "MOST_BYTES", 1000)
    with pytest.raises(BundleError) as caught:
        SamplerTable.read(many)
    assert re.search(r"\d+ bytes, expected at most 1000", str(caught.value))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        SamplerTable.read(tmp_path / "none.safetensors")
