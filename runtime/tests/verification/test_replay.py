from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy

from hidiff_runtime import BundleError, CheckReport, EngineError, Verdict, check
from hidiff_runtime.format import safetensors
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.format.record_codec import encode
from hidiff_runtime.verification.reference_samples import INDEX, TENSORS, Drawn, ReferenceSamples, Stored, write_index
from hidiff_runtime.verification.sample_recorder import SampleRecorder

pytestmark = pytest.mark.alone

KINDS = {
    "plain": toy.Toy(),
    "unguided": toy.Toy(guidance=False),
    "sdxl": toy.Toy(sdxl=True, batch=2),
    "inpainting": toy.Toy(inpainting=True),
    "control": toy.Toy(control=True),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def failed(report: CheckReport) -> list[tuple[str, str | None]]:
    return [(verdict.boundary, verdict.phase) for verdict in report.verdicts if not verdict.ok]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_sound_engines_pass(tmp_path: Path, kind: toy.Toy) -> None:
    report = check(toy.make(tmp_path / "bundle", kind), backend=toy.ToyBackend())
    assert report.ok, report.render()
    assert report.exit_code == 0
    phases = {record.phase.name for record in Manifest.read(tmp_path / "bundle").phases}
    assert {verdict.phase for verdict in report.verdicts if "engine" in verdict.boundary} == phases
    assert sum("step" in verdict.boundary for verdict in report.verdicts) == 8
    assert "within bounds" in report.render()


def test_an_engine_of_the_wrong_phase_fails(folder: Path) -> None:
    (folder / "unet/strided.toy").write_text((folder / "unet/windowed.toy").read_text())
    toy.seal(folder)
    report = check(folder, backend=toy.ToyBackend(), runs=False)
    assert failed(report) == [("engine against PyTorch", "strided")]
    assert report.exit_code == 1
    assert "1 of 3 FAILED" in report.render()
    assert not check(folder, backend=toy.ToyBackend()).verdicts[-1].ok


def test_one_wrong_shift_fails(folder: Path) -> None:
    index = folder / "reference" / INDEX
    data = json.loads(index.read_text())
    for call in data["calls"]:
        call["window_shifts"][1] = (call["window_shifts"][1] + 1) % 4
    index.write_text(json.dumps(data))
    toy.seal(folder)
    assert len(failed(check(folder, backend=toy.ToyBackend(), runs=False))) == 3


def test_an_engine_that_takes_shifts_in_another_order_fails(folder: Path) -> None:
    class Reversed(toy.ToySession):
        def run(self, inputs: toy.Arrays) -> dict[str, np.ndarray]:
            return super().run({**inputs, "window_shifts": inputs["window_shifts"][::-1]})

    class Backend(toy.ToyBackend):
        def open(self, *arguments: Any) -> toy.ToySession:
            session = super().open(*arguments)
            return Reversed(session.backend, session.phase, session.weights, session.record)

    assert not check(folder, backend=Backend()).ok


def test_one_perturbed_weight_fails(folder: Path) -> None:
    path = folder / "unet/weights.safetensors"
    with safetensors.SafetensorsFile.open(path) as file:
        weights = {name: np.array(array) for name, array in file.arrays().items()}
    weights["mix"][1, 2] *= np.float32(1.001)
    safetensors.write(path, weights)
    toy.seal(folder)
    assert len(failed(check(folder, backend=toy.ToyBackend(), runs=False))) == 3


def test_another_seed_fails_the_run(folder: Path) -> None:
    index = folder / "reference" / INDEX
    data = json.loads(index.read_text())
    data["runs"][0]["seed"] += 1
    index.write_text(json.dumps(data))
    toy.seal(folder)
    report = check(folder, backend=toy.ToyBackend())
    assert {boundary for boundary, _ in failed(report)} == {
        "latents after a step against PyTorch",
        "latents of a run against PyTorch",
    }


def spoil_with(change: Any) -> toy.ToyBackend:
    return toy.ToyBackend(lambda outputs, _call: change(outputs))


@pytest.mark.parametrize(
    ("backend", "fault"),
    [
        (spoil_with(lambda outputs: {"noise_pred": outputs["noise_pred"] * np.nan}), "NaN"),
        (spoil_with(lambda outputs: {"noise_pred": outputs["noise_pred"][:1]}), "got [1, 4, 6, 8]"),
        (spoil_with(lambda _outputs: {}), "missing output"),
    ],
    ids=["nan", "shape", "missing"],
)
def test_what_cannot_be_compared_fails(folder: Path, backend: toy.ToyBackend, fault: str) -> None:
    report = check(folder, backend=backend, runs=False)
    assert not any(verdict.ok for verdict in report.verdicts)
    assert all(fault in verdict.fault for verdict in report.verdicts)


def test_an_engine_that_fails_is_a_failed_verdict(folder: Path) -> None:
    def refuse(_outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise EngineError("out of memory")

    report = check(folder, backend=spoil_with(refuse))
    assert [verdict.fault for verdict in report.verdicts[:3]] == ["out of memory"] * 3
    assert report.verdicts[3].fault == "out of memory (phase strided_pooled, step 1 of 8)"


def test_a_phase_without_a_sample_fails(folder: Path) -> None:
    index = folder / "reference" / INDEX
    data = json.loads(index.read_text())
    del data["calls"][1]
    index.write_text(json.dumps(data))
    toy.seal(folder)
    report = check(folder, backend=toy.ToyBackend(), runs=False)
    assert [verdict.fault for verdict in report.verdicts if not verdict.ok] == ["no reference sample"]


def test_a_bundle_without_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no reference samples"):
        check(toy.make(tmp_path / "bundle", toy.Toy(reference=False)), backend=toy.ToyBackend())


def test_a_report_survives_json_and_progress_is_told(folder: Path) -> None:
    seen: list[Verdict] = []
    report = check(folder, backend=toy.ToyBackend(), progress=seen.append)
    assert tuple(seen) == report.verdicts
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert tuple(Verdict.from_dict(verdict) for verdict in data["verdicts"]) == report.verdicts
    assert not CheckReport("toy", "numpy", ()).ok


def test_samples_survive_the_disk_and_keep_each_tensor_once(tmp_path: Path) -> None:
    half = np.arange(24, dtype=np.float32).reshape(1, 4, 2, 3)
    recorder = SampleRecorder("numpy", toy.CALL_BOUND, toy.RUN_BOUND, limit=16)
    for step in range(3):
        inputs = {
            "latents": np.concatenate([half, half]),
            "prompt_embeds": half.astype(np.float16),
            "noise": Drawn(3, (2, 8)),
        }
        output = np.concatenate([half, half + 1])
        toy.record_call(recorder, toy.Toy().rule.phases()[0], inputs, [0, 1, 2], output, step)
    half += 100  # what was recorded is a copy
    index, tensors = recorder.write(tmp_path)
    with safetensors.SafetensorsFile.open(tensors) as file:
        assert len(file.names()) == 4  # latents, prompt, output, positions
    samples = ReferenceSamples.read(index)
    call = samples.calls[2]
    assert call.inputs["latents"] == Stored("tensor_000", 2)
    latents = samples.array(call.inputs["latents"])
    assert latents.shape == (2, 4, 2, 3)
    assert latents.dtype == samples.array(call.inputs["prompt_embeds"]).dtype == np.float32
    assert latents[1, 0, 0].tolist() == [0, 1, 2]
    assert samples.array(call.inputs["noise"]).shape == (2, 8)
    assert samples.reference(call.expected).shape == (16,)
    whole = np.concatenate([latents[:1], latents[:1] + 1])
    assert np.array_equal(samples.candidate(call.expected, whole), samples.reference(call.expected))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda data: data["calls"][0].update(kind="tiled"), r"calls\[0\].kind"),
        (lambda data: data["calls"][0]["inputs"]["latents"].update(repeat=0), r"calls\[0\].inputs.latents.repeat"),
        (lambda data: data["runs"][0].update(steps="8"), r"runs\[0\].steps"),
        (lambda data: data["runs"][0]["expected"].update(tensor="nowhere"), "lacks"),
        (lambda data: data["call_bound"].pop("reason"), "call_bound.reason"),
        (lambda data: data.update(more=1), "more is not a field"),
    ],
)
def test_broken_samples_are_refused_by_field(folder: Path, change: Any, named: str) -> None:
    index = folder / "reference" / INDEX
    data = json.loads(index.read_text())
    change(data)
    index.write_text(json.dumps(data))
    with pytest.raises(BundleError, match=named):
        ReferenceSamples.read(index)


def test_the_samples_have_the_fields_that_they_always_had_in_their_order(folder: Path) -> None:
    data = json.loads((folder / "reference" / INDEX).read_text())
    assert [key for key in data if key not in ("samplers", "facts")] == [
        *("origin", "call_bound", "run_bound", "calls", "runs", "networks", "pictures"),
    ]
    assert list(data["call_bound"]) == ["snr_db", "rtol", "atol", "psnr_db", "ssim", "reason"]
    assert list(data["calls"][0]) == ["kind", "control", "step", "steps", "window_shifts", "inputs", "expected"]
    assert list(data["runs"][0]) == [
        *("steps", "sampler", "seed", "guidance_scale", "guidance_rescale", "eta"),
        *("inputs", "control", "expected", "trajectory"),
    ]
    drawn = Drawn(1, (2,))
    assert list(encode(drawn)) == ["seed", "shape", "scale", "uniform"]


def test_missing_sample_files_are_refused(folder: Path) -> None:
    (folder / "reference" / TENSORS).unlink()
    with pytest.raises(BundleError):
        ReferenceSamples.read(folder / "reference" / INDEX)
    (folder / "reference" / INDEX).unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        ReferenceSamples.read(folder / "reference" / INDEX)


def test_bounds_may_be_elementwise(folder: Path) -> None:
    samples = ReferenceSamples.read(folder / "reference" / INDEX)
    strict = dataclasses.replace(samples.call_bound, snr_db=0.0, rtol=1e-9, atol=1e-9)
    write_index(folder / "reference", dataclasses.replace(samples, call_bound=strict))
    toy.seal(folder)
    nudged = spoil_with(lambda outputs: {"noise_pred": outputs["noise_pred"] * np.float32(1 + 1e-6)})
    assert len(failed(check(folder, backend=nudged, runs=False))) == 3
