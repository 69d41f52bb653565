"""A check compares every sampler's table, and what the manifest says that nothing computes; older bundles say what is
left out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy

from hidiff_runtime import BundleError, CheckReport, check
from hidiff_runtime.format import safetensors
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.phases import PhaseRule, StepRange
from hidiff_runtime.sampling.scheduler_table import SamplerTable
from hidiff_runtime.sampling.table_rows import Rows
from hidiff_runtime.verification.manifest_facts import FACTS, facts_of
from hidiff_runtime.verification.reference_samples import INDEX, TENSORS, ReferenceSamples
from hidiff_runtime.verification.replay_components import comparisons
from hidiff_runtime.verification.replay_schedulers import SAMPLER
from hidiff_runtime.verification.sample_recorder import SampleRecorder
from hidiff_runtime.verification.scheduler_samples import SamplerAnswers, SamplerSample

TOY = toy.Toy()
NOISES = {"plain": 0.0, "noisy": 0.3, "second": 0.0}


def answers(noise: float, order: int) -> SamplerAnswers:
    """What the toy's schedulers do, written out plainly: the last output counts twice at first after a start."""
    asked = np.random.default_rng(0).uniform(-1, 1, (2 * toy.MAX_STEPS, 3, 2)).astype(np.float32)
    steps = np.arange(1, toy.MAX_STEPS + 1)
    runs, samples, laid = [], [], []
    for skipped in range(toy.MAX_STEPS):
        for index, count in enumerate(steps):
            length = count * order - (order - 1) - skipped * order
            if length < 1:
                continue
            runs.append((index, skipped, length))
            previous = np.zeros(2, np.float32)
            for number in range(length):
                sample, output, drawn = asked[number]
                twice = 2 if skipped and number < 2 else 1
                samples.append(0.9 * sample - 0.2 * output + noise * drawn + 0.05 * twice * previous)
                previous = output
            if not skipped:
                laid.append((length, np.linspace(999, 0, length), np.linspace(0.1, 1, length)))
    weights = np.concatenate([one for _, _, one in laid])[:, None]
    places = np.concatenate([np.arange(length) for length, _, _ in laid])
    noised = weights * asked[places, 0] + (1.1 - weights) * asked[places, 2]
    return SamplerAnswers(
        steps=steps.astype(np.int64),
        init_noise_sigma=np.full(len(steps), 1.5),
        runs=np.array(runs, np.int32),
        etas=np.zeros(len(runs)),
        asked=asked,
        samples=np.array(samples, np.float32),
        draws=np.full(len(samples), noise != 0),
        timesteps=np.concatenate([one for _, one, _ in laid]).astype(np.float32),
        scaled=(0.8 * asked[places, 0]).astype(np.float32),
        noised=noised.astype(np.float32),
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = toy.make(tmp_path_factory.mktemp("toy") / "bundle", TOY)
    manifest, stored = Manifest.read(folder), toy.stored_weights(TOY)
    recorder = SampleRecorder("numpy", toy.CALL_BOUND, toy.RUN_BOUND)
    for record in manifest.phases:
        inputs = {spec.name: np.ones(spec.shape, np.float32) for spec in record.inputs if spec.dtype == "float32"}
        given = {**inputs, "window_shifts": np.zeros(3, np.int32)}
        noise = toy.unet(record.phase.name, stored, given)
        toy.record_call(recorder, record.phase, inputs, [0, 0, 0], noise)
    toy.record_run(recorder, toy.reference_run(TOY, manifest, stored))
    for name, noise in NOISES.items():
        order = 2 if name == "second" else 1
        tensors = {key: recorder.keep(array) for key, array in vars(answers(noise, order)).items()}
        recorder.samplers.append(SamplerSample(name, order, None, 2, **tensors))
    recorder.facts = facts_of(manifest)
    recorder.write(folder / "reference")
    toy.seal(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def checked(folder: Path, **options: bool) -> CheckReport:
    return check(folder, backend=toy.ToyBackend(), **options)


def failed(report: CheckReport) -> list[tuple[str, str | None, str]]:
    return [(verdict.boundary, verdict.phase, verdict.fault) for verdict in report.verdicts if not verdict.ok]


@pytest.mark.parametrize("runs", [True, False])
def test_every_table_is_compared_whether_runs_are_replayed_or_not(pristine: Path, runs: bool) -> None:
    report = checked(pristine, runs=runs)
    assert report.ok, report.render()
    assert [verdict.phase for verdict in report.verdicts if verdict.boundary == SAMPLER] == list(NOISES)
    assert [verdict.ok for verdict in report.verdicts if verdict.boundary == FACTS] == [True]
    assert not report.left_out
    samples = ReferenceSamples.read(pristine / "reference" / INDEX)
    assert comparisons(samples, runs=runs) == len(report.verdicts)


def changed(folder: Path, name: str, change: Callable[[SamplerTable], dict[str, Any]]) -> Path:
    path = folder / f"samplers/{name}.safetensors"
    table = SamplerTable.read(path)
    dataclasses.replace(table, **change(table)).write(path)
    toy.seal(folder)
    return folder


def later_noise(table: SamplerTable) -> dict[str, Any]:
    distinct = table.rows.distinct.copy()
    distinct[:, 2] *= 1.001
    return {"rows": Rows(distinct, table.rows.places)}


TABLES: dict[str, tuple[str, Callable[[SamplerTable], dict[str, Any]], str]] = {
    "noise": ("noisy", later_noise, "sample of"),
    "timesteps": ("plain", lambda t: {"timesteps": t.timesteps + np.float32(1)}, "timestep of 1 steps, evaluation 1"),
    "input scale": ("second", lambda t: {"input_scale": t.input_scale * 1.001}, "scaled sample of"),
    "a picture's noise": ("plain", lambda t: {"noising": t.noising[:, ::-1].copy()}, "noised picture of"),
    "the first noise": ("plain", lambda t: {"init_noise_sigma": t.init_noise_sigma * 1.01}, "size of the first noise"),
    "drawing": ("plain", lambda t: {"draws_noise": ~t.draws_noise}, "noise drawn of 1 steps, evaluation 1"),
    "memory": (
        "second",
        lambda t: {"rows": Rows(t.rows.distinct, t.rows.places[[0, 1, 0]])},
        "sample of 3 steps from step 2, evaluation 2",
    ),
    "no memory": (
        "second",
        lambda t: {"rows": Rows(t.rows.distinct, t.rows.places[:1])},
        "evaluations that a start shows: expected 2, got 0",
    ),
}


@pytest.mark.parametrize(("name", "change", "fault"), TABLES.values(), ids=TABLES)
def test_a_table_that_the_recorded_run_does_not_use_is_found_and_told(
    folder: Path, name: str, change: Callable[[SamplerTable], dict[str, Any]], fault: str
) -> None:
    if name == "noisy":  # which the run uses
        return_codes = {SAMPLER, "latents after a step against PyTorch", "latents of a run against PyTorch"}
    else:
        return_codes = {SAMPLER}
    report = checked(changed(folder, name, change))
    assert {boundary for boundary, _, _ in failed(report)} == return_codes
    ((_, phase, told),) = [one for one in failed(report) if one[0] == SAMPLER]
    assert phase == name
    assert told.startswith(fault)
    assert report.exit_code == 1
    assert fault in report.render()


def test_a_table_of_fewer_steps_is_found(folder: Path) -> None:
    for name in NOISES:
        changed(folder, name, first_eleven)
    toy.seal(folder, dataclasses.replace(Manifest.read(folder), steps=tuple(range(1, 12))))
    told = {boundary: fault for boundary, _, fault in failed(checked(folder))}
    assert told[SAMPLER].startswith("numbers of steps: expected [1, 2, 3,")
    assert told[FACTS].startswith("phases of 13 steps: expected [")


def first_eleven(table: SamplerTable) -> dict[str, Any]:
    end = int(table.first[11])
    names = ("timesteps", "input_scale", "draws_noise", "noising")
    return {
        **{name: getattr(table, name)[:end] for name in names},
        "steps": table.steps[:11],
        "first": table.first[:12],
        "init_noise_sigma": table.init_noise_sigma[:11],
        "rows": Rows(table.rows.distinct, table.rows.places[:, :end]),
    }


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"rule": PhaseRule(StepRange(0, 0.5), StepRange(0, 0.3))},
            "phases of 7 steps: expected [['strided_pooled', 1]",
        ),
        (
            {"rule": PhaseRule(StepRange(0, 0.6), StepRange(0, 0.25))},
            "phases of 5 steps: expected [['strided_pooled', 1]",
        ),
        ({"default_sampler": "noisy"}, "default_sampler: expected plain, got noisy"),
        ({"guidance_rescale": 0.7}, "guidance_rescale: expected 0.0, got 0.7"),
        ({"force_zeros_for_empty_prompt": False}, "force_zeros_for_empty_prompt: expected True, got False"),
        ({"windowed_blocks": toy.BLOCKS[::-1]}, "windowed_blocks: expected ['down.0', 'down.1', 'up.0']"),
        ({"task": "inpainting"}, "task: expected text-to-image, got inpainting"),
        ({"precision": "float16"}, "precision: expected float32, got float16"),
    ],
)
def test_a_setting_that_no_engine_shows_is_found(folder: Path, changes: dict[str, Any], fault: str) -> None:
    toy.seal(folder, dataclasses.replace(Manifest.read(folder), **changes))
    ((told,),) = [[text] for boundary, _, text in failed(checked(folder)) if boundary == FACTS]
    assert told.startswith(fault)


def test_a_bundle_from_before_there_was_a_record_says_what_is_not_compared(folder: Path) -> None:
    index = folder / "reference" / INDEX
    data = json.loads(index.read_text(encoding="utf-8"))
    del data["samplers"], data["facts"]
    index.write_text(json.dumps(data), encoding="utf-8")
    toy.seal(folder)
    report = checked(folder)
    assert report.ok
    assert report.exit_code == 0
    assert "The sampler tables noisy, plain, second and the manifest's defaults were not compared" in report.render()
    assert "'hidiff-export verify' compares them" in report.left_out
    samples = ReferenceSamples.read(index)
    assert comparisons(samples, runs=True) == len(report.verdicts)


def test_a_sampler_without_a_record_among_others_fails(folder: Path) -> None:
    index = folder / "reference" / INDEX
    data = json.loads(index.read_text(encoding="utf-8"))
    del data["samplers"][0]
    index.write_text(json.dumps(data), encoding="utf-8")
    toy.seal(folder)
    assert failed(checked(folder)) == [(SAMPLER, "plain", "no reference sample")]


def broken(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, np.ndarray]], object]:
    """Another tensor in the place of one of the first sampler's."""

    def change(sample: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors["other"] = value(tensors[sample[name]])
        sample[name] = "other"

    return change


BROKEN = {
    "samples of another shape": (broken("samples", lambda a: a[:-1]), "draws: bool"),
    "samples of another type": (broken("samples", lambda a: a.astype(np.float64)), "samples: float64"),
    "answers that are flat": (broken("asked", lambda a: a.reshape(-1)), "asked: float32"),
    "more elements than are asked": (broken("asked", lambda a: np.tile(a, 9)), "samples: float32"),
    "no runs": (broken("runs", lambda a: a[:0]), "etas: float64"),
    "a run of another step count": (broken("runs", lambda a: a + np.int32([12, 0, 0])), "no runs, or of step counts"),
    "a run that is too long": (broken("runs", lambda a: a + np.int32([0, 0, 40])), "evaluations, expected"),
    "the whole runs last": (broken("runs", lambda a: a[::-1].copy()), "expected"),
    "runs of negative length": (broken("runs", lambda a: a * np.int32([1, 1, -1])), "evaluations, expected"),
    "runs that begin beyond the end": (
        broken("runs", lambda a: a + np.int32([0, 2, 0]) * (a[:, 1:2] > 0)),
        "go beyond",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_answers_are_refused(folder: Path, change: Any, message: str) -> None:
    index, path = folder / "reference" / INDEX, folder / "reference" / TENSORS
    data = json.loads(index.read_text(encoding="utf-8"))
    with safetensors.SafetensorsFile.open(path) as file:
        tensors = {name: np.array(array) for name, array in file.arrays().items()}
    change(data["samplers"][0], tensors)
    safetensors.write(path, tensors)
    index.write_text(json.dumps(data), encoding="utf-8")
    toy.seal(folder)
    with pytest.raises(BundleError, match="reference samples of a sampler") as caught:
        checked(folder)
    assert message in str(caught.value)
    assert caught.value.exit_code == 4
