"""Whole runs of a bundle that forecasts steps, on the host and on a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_device
from spectrum import Spectrum

from hidiff_runtime import BundleError, InputError, StepInfo, TorchGenerator
from hidiff_runtime import open as open_bundle
from hidiff_runtime.format.forecast_record import Forecast
from hidiff_runtime.format.manifest import GraphRecord, Manifest
from hidiff_runtime.format.step_graph import step_inputs, step_outputs
from hidiff_runtime.sampling.forecast import KEPT
from hidiff_runtime.sampling.torch_rng import draw_window_shifts

FORECAST = Forecast(warm_up=2, last=0.2)
STEPS = 12
COMPUTED = FORECAST.computed(STEPS)


def make(folder: Path, forecast: Forecast | None = FORECAST, slots: int = 1 + KEPT, **kind: Any) -> Path:
    """A toy bundle with a step graph for the outputs that are kept."""
    one = toy.Toy(reference=False, **kind)
    toy.make(folder, one)
    phase = one.record(one.rule.phases()[0])
    due = (one.batch, phase.outputs[0], phase.inputs[0], slots)
    step = GraphRecord("step/step.graph", {"toy": "step/step.toy"}, step_inputs(*due), step_outputs(*due))
    toy.seal(folder, replace(Manifest.read(folder), forecast=forecast, step=step))
    return folder


def run(folder: Path, backend: toy.ToyBackend, kind: toy.Toy | None = None, **changes: Any) -> np.ndarray:
    given = {**(kind or toy.Toy()).given(), "steps": STEPS, "seed": 1, "guidance_scale": 3.0, **changes}
    with open_bundle(folder, backend=backend, verify="size") as bundle:
        return bundle.denoiser().denoise(**given)


@pytest.mark.parametrize("sampler", ["plain", "noisy", "second"])
def test_what_is_left_out_is_not_computed(tmp_path: Path, sampler: str) -> None:
    host, device = toy.ToyBackend(), toy_device.Backend()
    folder = make(tmp_path / "bundle")
    found = run(folder, host, sampler=sampler)
    order = 2 if sampler == "second" else 1
    np.testing.assert_allclose(run(folder, device, sampler=sampler), found, rtol=5e-6, atol=5e-6)
    assert len(host.calls) == len(device.calls) == sum(FORECAST.computed(STEPS * order - (order - 1)))


def test_a_run_is_the_one_written_out_by_hand(tmp_path: Path) -> None:
    """The published arithmetic between evaluations of the toy's UNet; its shifts are drawn for every step."""
    folder, kind = make(tmp_path / "bundle"), toy.Toy()
    found = run(folder, toy.ToyBackend(), sampler="noisy")
    generator, published, stored = TorchGenerator(1), Spectrum(STEPS), toy.stored_weights(kind)
    given, manifest = kind.given(), Manifest.read(folder)
    embeds = np.concatenate([given["negative_prompt_embeds"], given["prompt_embeds"]])
    state = toy.table("noisy", noise=0.3).schedule(STEPS).start(generator.randn((1, *manifest.latent)))
    for index, computed in enumerate(COMPUTED):
        shifts = toy_shifts(generator)
        if computed:
            latents = np.concatenate([state.model_input()] * 2)
            inputs = {
                "latents": latents,
                "timestep": np.float32([state.timestep]),
                "prompt_embeds": embeds,
                "window_shifts": shifts,
            }
            negative, positive = np.split(toy.unet(manifest.rule.phase_at(index, STEPS).name, stored, inputs), 2)
            output = (negative + 3.0 * (positive - negative)).astype(np.float32)
            published.update(index, output)
        else:
            output = published.predict(index).astype(np.float32)
        state.advance(output, generator.randn(output.shape))
    np.testing.assert_allclose(found, state.latents, rtol=1e-4, atol=1e-5)


def toy_shifts(generator: TorchGenerator) -> np.ndarray:
    return draw_window_shifts(generator, len(toy.BLOCKS))


def test_a_full_run_is_the_one_of_a_bundle_without(tmp_path: Path) -> None:
    found = run(make(tmp_path / "one"), toy.ToyBackend(), full_run=True)
    np.testing.assert_array_equal(found, run(make(tmp_path / "other", None), toy.ToyBackend()))
    np.testing.assert_array_equal(found, run(tmp_path / "other", toy.ToyBackend(), full_run=True))
    assert np.abs(found - run(tmp_path / "one", toy.ToyBackend())).max() > 1e-4  # the control: the flag does something


def test_steps_that_are_left_out_are_told_too(tmp_path: Path) -> None:
    told: list[StepInfo] = []
    run(make(tmp_path / "bundle"), toy.ToyBackend(), callback=told.append)
    assert [info.step for info in told] == list(range(STEPS))


def test_shifts_are_those_of_a_full_run(tmp_path: Path) -> None:
    folder, backend, whole = make(tmp_path / "bundle"), toy.ToyBackend(), toy.ToyBackend()
    run(folder, backend)
    run(folder, whole, full_run=True)
    assert len(whole.calls) == STEPS
    due = [inputs["window_shifts"] for (_, inputs), computed in zip(whole.calls, COMPUTED, strict=True) if computed]
    np.testing.assert_array_equal([inputs["window_shifts"] for _, inputs in backend.calls], due)


def test_a_control_is_asked_where_the_unet_is(tmp_path: Path) -> None:
    kind = toy.Toy(control=True)
    folder, asked = make(tmp_path / "bundle", control=True), []
    residuals = {
        "down_residual_00": np.ones((2, 2, 3, 3), np.float32),
        "mid_residual": np.ones((2, 2, 3, 3), np.float32),
    }

    def control(request: Any) -> dict[str, np.ndarray]:
        asked.append(request.step)
        return residuals

    run(folder, toy.ToyBackend(), kind, control=control)
    assert asked == [step for step in range(STEPS) if COMPUTED[step] and step < 0.6 * STEPS]


def test_a_step_graph_with_too_few_states_is_an_error(tmp_path: Path) -> None:
    folder = make(tmp_path / "bundle", slots=1)
    with pytest.raises(BundleError, match="fewer states"):
        run(folder, toy_device.Backend())


def test_a_sampler_that_does_not_suit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    folder, backend = make(tmp_path / "bundle"), toy.ToyBackend()
    toy.table("lcm", noise=0.3).write(folder / "samplers/lcm.safetensors")
    manifest = Manifest.read(folder)
    toy.seal(folder, replace(manifest, samplers={**manifest.samplers, "lcm": "samplers/lcm.safetensors"}))
    with pytest.raises(InputError, match="lcm cannot be forecast"):
        run(folder, backend, sampler="lcm")
    assert backend.events == []
    run(folder, backend, sampler="lcm", full_run=True)


@pytest.mark.parametrize("forecast", [Forecast(window=0.5), Forecast(growth=-1.0), Forecast(last=1.5)])
def test_a_manifest_that_cannot_be_followed_is_refused(tmp_path: Path, forecast: Forecast) -> None:
    folder = make(tmp_path / "bundle", forecast)
    with pytest.raises(BundleError, match="forecast must have a warm-up of 2 or more, a window"):
        Manifest.read(folder)
