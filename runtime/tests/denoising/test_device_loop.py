"""Runs whose latents stay on a device: the same latents as the host's, sent and asked for as rarely as can be."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_device

from hidiff_runtime import BundleError, Cancelled, ControlRequest, EngineError, InputError, StepInfo, TorchGenerator
from hidiff_runtime import open as open_bundle
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.format.specs import TensorSpec
from hidiff_runtime.format.step_graph import padded_rows
from hidiff_runtime.verification.reference_samples import Drawn

KINDS = {
    "plain": toy.Toy(),
    "unguided": toy.Toy(guidance=False),
    "batch of 2": toy.Toy(batch=2),
    "sdxl": toy.Toy(sdxl=True),
    "inpainting": toy.Toy(inpainting=True),
    "unguided inpainting": toy.Toy(inpainting=True, guidance=False),
}
CONTROL = toy.Toy(control=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make(tmp_path_factory.mktemp("toy") / "bundle", toy.Toy(reference=False))


@pytest.fixture
def backend() -> toy_device.Backend:
    return toy_device.Backend()


def run(folder: Path, backend: toy.ToyBackend, kind: toy.Toy | None = None, **changes: Any) -> np.ndarray:
    kind = kind or toy.Toy()
    given = {**kind.given(), "steps": 8, "seed": 1, "sampler": "noisy", **changes}
    if kind.guidance:
        given.setdefault("guidance_scale", 3.0)
    with open_bundle(folder, backend=backend, verify="size") as bundle:
        return bundle.denoiser().denoise(**given)


def close(found: np.ndarray, due: np.ndarray) -> bool:
    return bool(np.allclose(found, due, rtol=2e-6, atol=2e-6))


@pytest.mark.parametrize("sampler", ["plain", "noisy", "second"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_run_is_the_hosts(tmp_path: Path, kind: toy.Toy, sampler: str) -> None:
    folder = toy.make(tmp_path / "bundle", dataclasses.replace(kind, reference=False))
    device, host = toy_device.Backend(), toy.ToyBackend()
    found, due = (run(folder, backend, kind, sampler=sampler) for backend in (device, host))
    assert found.dtype == np.float32
    assert close(found, due)
    assert "step" in device.memory.events
    assert [phase for phase, _ in device.calls] == [phase for phase, _ in host.calls]
    for (_, ours), (_, theirs) in zip(device.calls, host.calls, strict=True):
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            assert close(array, theirs[name]), name


@pytest.mark.parametrize("sampler", ["plain", "noisy", "second"])
def test_a_run_from_a_picture_is_the_hosts(folder: Path, backend: toy_device.Backend, sampler: str) -> None:
    given: dict[str, Any] = {
        "image_latents": TorchGenerator(8).randn((1, 4, toy.HEIGHT, toy.WIDTH)),
        "sampler": sampler,
    }
    found, due, other = (
        run(folder, where, **given, strength=strength)
        for where, strength in ((backend, 0.6), (toy.ToyBackend(), 0.6), (toy.ToyBackend(), 0.75))
    )
    assert "step" in backend.memory.events
    assert close(found, due)
    assert not close(found, other)


def test_a_blend_runs_on_the_host(folder: Path, backend: toy_device.Backend) -> None:
    image, mask = TorchGenerator(8).randn((1, 4, toy.HEIGHT, toy.WIDTH)), np.zeros((1, 1, toy.HEIGHT, toy.WIDTH))
    mask[..., :3] = 1
    given: dict[str, Any] = {"image_latents": image, "strength": 0.6, "mask": mask.astype(np.float32)}
    found, due = (run(folder, where, **given) for where in (backend, toy.ToyBackend()))
    assert close(found, due)
    assert np.array_equal(found[..., 3:], image[..., 3:])
    assert "step" not in backend.memory.events


@pytest.mark.parametrize("scale", [1.0, 0.0, 7.5])
def test_any_guidance_scale(folder: Path, scale: float) -> None:
    found, due = (run(folder, backend, guidance_scale=scale) for backend in (toy_device.Backend(), toy.ToyBackend()))
    assert close(found, due)
    assert not close(found, run(folder, toy.ToyBackend(), guidance_scale=scale + 1.5))


@pytest.mark.parametrize("kind", [toy.Toy(), toy.Toy(batch=2, sdxl=True)], ids=["one", "batch of 2"])
@pytest.mark.parametrize("scale", [0.5, 1.0, 7.5])
def test_rescaled_guidance_is_the_hosts(tmp_path: Path, kind: toy.Toy, scale: float) -> None:
    folder = toy.make(tmp_path / "bundle", dataclasses.replace(kind, reference=False))
    device = toy_device.Backend()
    given = {"guidance_scale": scale, "guidance_rescale": 0.7}
    found, due = (run(folder, backend, kind, **given) for backend in (device, toy.ToyBackend()))
    assert device.memory.events.count("step") == 8
    assert close(found, due)
    assert close(found, run(folder, toy.ToyBackend(), kind, guidance_scale=scale)) == (scale <= 1)


def test_an_older_step_graph_leaves_rescaled_guidance_to_the_host(tmp_path: Path) -> None:
    folder = toy.make(tmp_path / "bundle", toy.Toy(reference=False))
    manifest = Manifest.read(folder)
    assert manifest.step is not None
    inputs = tuple(spec for spec in manifest.step.inputs if spec.name != "guidance_rescale")
    assert len(inputs) == len(manifest.step.inputs) - 1
    toy.seal(folder, dataclasses.replace(manifest, step=dataclasses.replace(manifest.step, inputs=inputs)))
    for rescale, steps in ((0.0, 8), (0.7, 0)):
        device = toy_device.Backend()
        found, due = (run(folder, backend, guidance_rescale=rescale) for backend in (device, toy.ToyBackend()))
        assert close(found, due)
        assert device.memory.events.count("step") == steps


def test_rows_of_a_neighbouring_step_show(
    folder: Path, backend: toy_device.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every comparison above would see them; so it would the next two."""
    calls = []

    def late(rows: np.ndarray, slots: int) -> np.ndarray:
        calls.append(padded_rows(rows * (1 + 1e-3 * len(calls)), slots))
        return calls[max(len(calls) - 2, 0)]

    monkeypatch.setattr("hidiff_runtime.denoising.device_loop.padded_rows", late)
    assert not close(run(folder, backend), run(folder, toy.ToyBackend()))


@pytest.mark.parametrize("lost", ["window_shifts", "timestep", "noise"])
def test_what_is_uploaded_once_too_seldom_shows(
    folder: Path, backend: toy_device.Backend, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    uploads: dict[str, int] = {}
    which = 7 if lost == "timestep" else 6  # guidance has two numbers, then each step a timestep and an input scale
    put = toy_device.Memory.upload

    def upload(memory: toy_device.Memory, array: np.ndarray, into: toy_device.Tensor) -> None:
        kind = {"window_shifts": (3,), "timestep": (1,), "noise": (1, 4, toy.HEIGHT, toy.WIDTH)}[lost]
        uploads[str(array.shape)] = uploads.get(str(array.shape), 0) + 1
        if array.shape != kind or uploads[str(array.shape)] != which:
            put(memory, array, into)

    monkeypatch.setattr(toy_device.Memory, "upload", upload)
    assert not close(run(folder, backend), run(folder, toy.ToyBackend()))


def test_nothing_is_downloaded_before_the_end(folder: Path, backend: toy_device.Backend) -> None:
    run(folder, backend)
    events = backend.memory.events
    first = events.index("download")
    assert events[first:] == ["download"] * 2  # whether there were NaN, and the latents
    evaluations = [event for event in events[:first] if event != "upload"]
    assert evaluations[1::2] == ["step"] * 8
    assert evaluations[::2] == ["strided_pooled"] * 2 + ["strided"] * 2 + ["windowed"] * 4
    ahead = events.index("strided_pooled")
    for at in (index for index, event in enumerate(events) if event == "step"):
        # Between two evaluations: coefficients, input scale and noise; then timestep and shifts.
        assert events[max(at - 3, ahead + 1) : at].count("upload") == 3
    assert events[ahead:first].count("upload") == 8 * 5 - 2


def test_a_callback_sees_each_step_as_on_the_host(folder: Path, backend: toy_device.Backend) -> None:
    seen: dict[str, list[StepInfo]] = {"device": [], "host": []}
    run(folder, backend, sampler="second", callback=seen["device"].append)
    run(folder, toy.ToyBackend(), sampler="second", callback=seen["host"].append)
    assert len(seen["device"]) == 8
    for ours, theirs in zip(*seen.values(), strict=True):
        assert dataclasses.replace(ours, latents=0, seconds=0) == dataclasses.replace(theirs, latents=0, seconds=0)  # type: ignore[arg-type]
        assert close(ours.latents, theirs.latents)


def test_a_callback_may_spoil_what_it_got(folder: Path, backend: toy_device.Backend) -> None:
    found = run(folder, backend, callback=lambda info: info.latents.fill(0))
    assert close(found, run(folder, toy.ToyBackend()))


def test_a_callback_cancels_and_the_next_run_is_unharmed(folder: Path, backend: toy_device.Backend) -> None:
    due = run(folder, toy.ToyBackend())
    given: dict[str, Any] = {**toy.Toy().given(), "steps": 8, "seed": 1, "sampler": "noisy", "guidance_scale": 3.0}
    with open_bundle(folder, backend=backend) as bundle:
        with pytest.raises(Cancelled, match="after step 3 of 8"):
            bundle.denoiser().denoise(**given, callback=lambda info: info.step < 2)
        made = backend.memory.made
        assert close(bundle.denoiser().denoise(**given), due)
        assert close(bundle.denoiser().denoise(**given), due)
        assert backend.memory.made == made  # it works in the same tensors


@pytest.mark.parametrize("watched", [False, True])
def test_nan_names_the_phase_and_the_step_where_they_began(folder: Path, watched: bool) -> None:
    def spoil(outputs: dict[str, np.ndarray], call: int) -> dict[str, np.ndarray]:
        if call == 3:
            outputs["noise_pred"][0, 0, 0, :2] = [np.nan, np.inf]
        return outputs

    backend, steps = toy_device.Backend(spoil), []
    callback = (lambda info: steps.append(info.step)) if watched else None
    with pytest.raises(EngineError, match="phase strided, step 3 of 8") as caught:
        run(folder, backend, callback=callback)
    assert str(caught.value.given).startswith("2 of 384 values")
    assert str(caught.value).count("step 3") == 1
    assert steps == ([0, 1] if watched else [])
    assert len(backend.calls) == (3 if watched else 8)


def test_an_engine_that_fails_says_in_which_phase_and_step(folder: Path) -> None:
    def fail(call: int) -> None:
        if call == 5:
            raise EngineError("Out of memory.", given="4 GB", advice="Use a smaller bundle.")

    with pytest.raises(EngineError, match=r"Out of memory.*phase windowed, step 5 of 8") as caught:
        run(folder, toy_device.Backend(fail=fail))
    assert caught.value.advice == "Use a smaller bundle."


def test_a_callers_control_sees_and_gives_host_arrays(tmp_path: Path) -> None:
    folder = toy.make(tmp_path / "bundle", dataclasses.replace(CONTROL, reference=False))
    residuals = {spec.name: Drawn(9, spec.shape, 0.1).array() for spec in Manifest.read(folder).phases[0].residuals}
    seen: dict[str, list[ControlRequest]] = {"device": [], "host": []}

    def control(where: str, *, look: bool) -> Any:
        def give(request: ControlRequest) -> dict[str, np.ndarray]:
            inputs = dict(request.inputs) if look else {"timestep": request.inputs["timestep"]}
            seen[where].append(dataclasses.replace(request, inputs=inputs))
            told = np.float32(request.step + inputs["latents"].mean() if look else 0)
            return {name: array + told for name, array in residuals.items()}

        return give

    device = toy_device.Backend()
    found = run(folder, device, CONTROL, control=control("device", look=True))
    assert close(found, run(folder, toy.ToyBackend(), CONTROL, control=control("host", look=True)))
    assert [request.step for request in seen["device"]] == [0, 1, 2, 3, 4]
    for ours, theirs in zip(*seen.values(), strict=True):
        assert ours.inputs.keys() == theirs.inputs.keys()
        for name, array in ours.inputs.items():
            assert close(array, theirs.inputs[name]), name
    assert device.memory.events.count("download") == 5 + 2  # it looked at the latents, once each time
    device = toy_device.Backend()
    run(folder, device, CONTROL, control=control("device", look=False))
    assert device.memory.events.count("download") == 2


def test_residuals_of_a_wrong_shape_are_refused(tmp_path: Path) -> None:
    folder = toy.make(tmp_path / "bundle", dataclasses.replace(CONTROL, reference=False))
    with pytest.raises(InputError, match="down_residual_00 must be"):
        run(folder, toy_device.Backend(), CONTROL, control=lambda _: {"down_residual_00": np.zeros(1, np.float32)})


@pytest.mark.parametrize(
    ("on_host", "loop", "on_device"),
    [
        (False, "auto", True),
        (False, "device", True),
        (False, "host", False),
        (True, "auto", False),
        (True, "device", True),
    ],
)
def test_which_loop_runs(folder: Path, on_host: bool, loop: str, on_device: bool) -> None:
    backend = toy_device.Backend(memory=toy_device.Memory(on_host=on_host))
    with open_bundle(folder, backend=backend, loop=loop, preload=True) as bundle:
        assert (bundle.tensors() is not None) == on_device
        assert ("open step" in backend.events) == on_device


def test_the_device_loop_needs_memory_and_a_step_engine(folder: Path, tmp_path: Path) -> None:
    with (
        open_bundle(folder, backend=toy.ToyBackend(), loop="device") as bundle,
        pytest.raises(EngineError, match="keeps no arrays"),
    ):
        bundle.tensors()
    with pytest.raises(InputError, match="loop must be one of auto, host, device"):
        open_bundle(folder, backend=toy.ToyBackend(), loop="gpu")
    other = toy.make(tmp_path / "bundle", toy.Toy(reference=False))
    toy.seal(other, dataclasses.replace(Manifest.read(other), step=None))
    with pytest.raises(BundleError, match="no step engine"):
        open_bundle(other, backend=toy_device.Backend(), loop="device")
    backend = toy.ToyBackend()
    assert close(run(other, backend), run(folder, toy.ToyBackend()))


def test_a_sampler_with_more_states_than_the_step_graph_is_refused() -> None:
    assert padded_rows(np.ones((1, 3)), 1).tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]
    with pytest.raises(BundleError, match="fewer states"):
        padded_rows(np.ones((3, 5)), 1)


def test_closing_gives_the_tensors_back_before_the_device(folder: Path, backend: toy_device.Backend) -> None:
    bundle = open_bundle(folder, backend=backend)
    tensors = bundle.tensors()
    assert tensors is not None
    kept = weakref.ref(tensors.get(TensorSpec("a", (2,), "float32")))
    assert tensors.get(TensorSpec("a", (2,), "float32")) is kept()
    del tensors
    bundle.step_engine()
    bundle.close()
    assert kept() is None
    assert backend.events == ["enter device", "open step", "close step", "leave device"]


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("inputs", lambda specs: specs[1:]),
        ("inputs", lambda specs: (*specs, TensorSpec("more", (1,), "float32"))),
        ("inputs", lambda specs: tuple(spec for spec in specs if spec.name != "state")),
        ("outputs", lambda specs: (TensorSpec("next_sample", (1, 4, 1, 1), "float32"), *specs[1:])),
        ("outputs", lambda specs: (*specs[:-1], TensorSpec("next_unsound", (3,), "float32"))),
    ],
)
def test_a_manifest_with_another_step_graph_is_refused(part: str, change: Any, tmp_path: Path) -> None:
    folder = toy.make(tmp_path / "bundle", toy.Toy(reference=False))
    manifest = Manifest.read(folder)
    assert manifest.step is not None
    step = dataclasses.replace(manifest.step, **{part: change(getattr(manifest.step, part))})
    toy.seal(folder, dataclasses.replace(manifest, step=step))
    with pytest.raises(BundleError, match=f"step.{part} must"):
        Manifest.read(folder)
