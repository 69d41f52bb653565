"""Whole runs of bundles that leave guidance out for a part, or reuse deep features, on the host and on a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_device

from hidiff_runtime import BundleError, ControlRequest, StepInfo
from hidiff_runtime import open as open_bundle
from hidiff_runtime.format.forecast_record import Forecast
from hidiff_runtime.format.left_out import phases_of_steps
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.format.step_graph import step_inputs, step_outputs
from hidiff_runtime.phases import StepRange
from hidiff_runtime.reused_features import Reuse
from hidiff_runtime.sampling.forecast import KEPT

STEPS, SCALE = 12, 4.0
TAIL, MIDDLE = StepRange(0, 0.6), StepRange(0.2, 0.6)
KINDS = {
    "tail": toy.Toy(reference=False, guided=TAIL),
    "interval": toy.Toy(reference=False, guided=MIDDLE),
    "reuse": toy.Toy(reference=False, reuse=Reuse(3)),
    "reuse, no guidance": toy.Toy(reference=False, reuse=Reuse(2), guidance=False),
    "both": toy.Toy(reference=False, guided=TAIL, reuse=Reuse(3)),
    "both, SDXL": toy.Toy(reference=False, guided=MIDDLE, reuse=Reuse(3), sdxl=True),
    "both, inpainting": toy.Toy(reference=False, guided=TAIL, reuse=Reuse(3), inpainting=True),
    "both, two pictures": toy.Toy(reference=False, guided=MIDDLE, reuse=Reuse(3), batch=2, own_shifts=True),
}


def run(folder: Path, backend: toy.ToyBackend, kind: toy.Toy, **changes: Any) -> np.ndarray:
    given = {**kind.given(), "steps": STEPS, "seed": 1, "sampler": "noisy", **changes}
    with open_bundle(folder, backend=backend, verify="size") as bundle:
        return bundle.denoiser().denoise(guidance_scale=SCALE if kind.guidance else None, **given)


def phases_of(kind: toy.Toy) -> list[str]:
    return [phase.name for phase in phases_of_steps(kind.rule, None, STEPS) if phase is not None]


def by_hand(kind: toy.Toy, manifest: Manifest) -> np.ndarray:
    """The same run written out plainly."""
    run = toy.reference_run(kind, manifest, toy.stored_weights(kind), steps=STEPS, seed=1)
    latents: np.ndarray = run["latents"]
    return latents


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_run_is_the_one_written_out_by_hand(tmp_path: Path, kind: toy.Toy) -> None:
    folder = toy.make(tmp_path / "bundle", kind)
    expected = by_hand(kind, Manifest.read(folder))
    for backend in (toy.ToyBackend(), toy_device.Backend()):
        found = run(folder, backend, kind)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert [name for name, _ in backend.calls] == phases_of(kind)
    usual = toy.make(tmp_path / "usual", replace(kind, guided=None, reuse=None))
    assert np.abs(run(usual, toy.ToyBackend(), kind) - expected).max() > 1e-3  # the control: it is another run


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_full_run_is_the_one_of_a_bundle_that_leaves_nothing_out(tmp_path: Path, kind: toy.Toy) -> None:
    folder, usual = (
        toy.make(tmp_path / "one", kind),
        toy.make(tmp_path / "usual", replace(kind, guided=None, reuse=None)),
    )
    due = run(usual, toy.ToyBackend(), kind)
    np.testing.assert_array_equal(run(folder, toy.ToyBackend(), kind, full_run=True), due)
    np.testing.assert_allclose(run(folder, toy_device.Backend(), kind, full_run=True), due, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(run(usual, toy.ToyBackend(), kind, full_run=True), due)


def test_features_of_another_step_give_another_run(tmp_path: Path) -> None:
    kind = KINDS["reuse"]
    folder = toy.make(tmp_path / "bundle", kind)
    kept: list[np.ndarray] = []

    def one_late(outputs: dict[str, np.ndarray], _call: int) -> dict[str, np.ndarray]:
        if "deep_features" not in outputs:
            return outputs
        kept.append(outputs["deep_features"])
        return {**outputs, "deep_features": kept[-2:][0]}

    expected = run(folder, toy.ToyBackend(), kind)
    assert np.abs(run(folder, toy.ToyBackend(spoil=one_late), kind) - expected).max() > 1e-3


def test_both_engines_of_a_phase_stay_open_until_the_next(tmp_path: Path) -> None:
    kind = KINDS["both"]
    backend = toy.ToyBackend()
    run(toy.make(tmp_path / "bundle", kind), backend, kind)
    opened = [event.removeprefix("open ") for event in backend.events if event.startswith("open")]
    assert len(opened) == len(set(opened))  # none was closed and opened again
    first_shallow = opened.index("strided_pooled-shallow")
    assert opened[first_shallow - 1] == "strided_pooled"
    assert backend.events.index("close strided_pooled") < backend.events.index("open strided")


@pytest.mark.parametrize("backend", [toy.ToyBackend, toy_device.Backend])
def test_a_control_is_told_whether_it_is_for_the_prompts_alone(tmp_path: Path, backend: type) -> None:
    kind = replace(KINDS["both"], control=True, guided=StepRange(0, 0.3))
    asked: list[ControlRequest] = []

    def control(request: ControlRequest) -> dict[str, np.ndarray]:
        asked.append(request)
        shape = (len(request.inputs["latents"]), 2, 3, 3)
        return {name: np.full(shape, 0.1, np.float32) for name in ("down_residual_00", "mid_residual")}

    run(toy.make(tmp_path / "bundle", kind), backend(), kind, control=control)
    assert [request.unguided for request in asked] == [False] * 4 + [True] * 4  # of 12 steps, to below 0.6
    assert [len(request.inputs["latents"]) for request in asked] == [2] * 4 + [1] * 4


def test_a_forecast_goes_with_both(tmp_path: Path) -> None:
    kind = replace(KINDS["reuse"], guided=StepRange(0, 0.5))
    folder = toy.make(tmp_path / "bundle", kind)
    forecast = Forecast(warm_up=2, last=0.2)
    toy.seal(folder, replace(Manifest.read(folder), forecast=forecast, step=None, unguided_step=None))
    backend = toy.ToyBackend()
    run(folder, backend, kind)
    computed = forecast.computed(STEPS)
    phases = [kind.rule.phase_at(step, STEPS) for step in range(STEPS)]
    shallow = Reuse(3).shallow(phases, computed)
    due = [replace(phase, shallow=taken) for phase, taken, one in zip(phases, shallow, computed, strict=True) if one]
    assert [name for name, _ in backend.calls] == [phase.name for phase in due]
    assert any(phase.shallow for phase in due)


def test_a_device_forecasts_before_the_first_evaluation_without_guidance(tmp_path: Path) -> None:
    """New memory holds NaN here: what no evaluation has given yet has no part in the sum."""
    kind = KINDS["tail"]
    folder = toy.make(tmp_path / "bundle", kind)
    manifest = Manifest.read(folder)
    assert manifest.step is not None
    assert manifest.unguided_step is not None
    wide = {}
    for name, step in (("step", manifest.step), ("unguided_step", manifest.unguided_step)):
        noise_pred, latents = step.input("noise_pred"), step.output("latents")
        assert noise_pred is not None
        assert latents is not None
        due = (kind.batch, noise_pred, latents, 1 + KEPT)
        wide[name] = replace(step, inputs=step_inputs(*due), outputs=step_outputs(*due, unguided=True))
    forecast = Forecast(warm_up=4, last=0.0)
    first = STEPS - sum(phase.endswith("unguided") for phase in phases_of(kind))
    assert not forecast.computed(STEPS)[first]
    toy.seal(folder, replace(manifest, forecast=forecast, **wide))
    found = run(folder, toy_device.Backend(), kind)
    np.testing.assert_allclose(found, run(folder, toy.ToyBackend(), kind), rtol=1e-4, atol=1e-5)


def test_steps_are_told_with_the_layers_that_they_computed(tmp_path: Path) -> None:
    kind, told = KINDS["both"], list[StepInfo]()
    run(toy.make(tmp_path / "bundle", kind), toy.ToyBackend(), kind, callback=told.append)
    names = [info.phase.name for info in told]
    assert names[:5] == [
        "strided_pooled",
        "strided_pooled-shallow",
        "strided_pooled-shallow",
        "strided",
        "strided-shallow",
    ]
    assert names[-1].startswith("windowed-unguided")


def test_a_manifest_that_lacks_what_follows_unguided_phases_is_refused(tmp_path: Path) -> None:
    folder = toy.make(tmp_path / "bundle", KINDS["tail"])
    toy.seal(folder, replace(Manifest.read(folder), unguided_step=None))
    with pytest.raises(BundleError, match="unguided_step must be there"):
        Manifest.read(folder)


def test_a_manifest_of_other_features_is_refused(tmp_path: Path) -> None:
    folder = toy.make(tmp_path / "bundle", KINDS["reuse"])
    manifest = Manifest.read(folder)
    full, shallow, *others = manifest.phases
    fewer = replace(full.outputs[1], shape=(2, 4, *full.outputs[1].shape[2:]))
    wrong = {
        "outputs must be noise_pred": replace(full, outputs=(full.outputs[0], fewer)),
        "outputs must be noise_pred .* then deep_features": replace(full, outputs=full.outputs[:1]),
    }
    for message, record in wrong.items():
        toy.seal(folder, replace(manifest, phases=(record, shallow, *others)))
        with pytest.raises(BundleError, match=message):
            Manifest.read(folder)
    odd = replace(fewer, shape=(1, 8, 6, 8))
    for message, features in {
        "must hold deep_features exactly where the phase is shallow": (),
        "must hold float32 deep_features for each picture": (odd,),
    }.items():
        takes = replace(shallow, inputs=(*shallow.inputs[:-1], *features))
        gives = replace(full, outputs=(full.outputs[0], *features))
        toy.seal(folder, replace(manifest, phases=(gives, takes, *others)))
        with pytest.raises(BundleError, match=message):
            Manifest.read(folder)
    toy.seal(folder, replace(manifest, phases=(full, *others)))
    with pytest.raises(BundleError, match="must have a graph for each phase"):
        Manifest.read(folder)


def test_a_guided_part_needs_guidance(tmp_path: Path) -> None:
    folder = toy.make(tmp_path / "bundle", toy.Toy(reference=False, guidance=False))
    manifest = Manifest.read(folder)
    toy.seal(folder, replace(manifest, rule=replace(manifest.rule, guidance=TAIL)))
    with pytest.raises(BundleError, match=r"rule.guidance is for a bundle with guidance"):
        Manifest.read(folder)
