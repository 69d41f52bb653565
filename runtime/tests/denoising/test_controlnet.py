"""A bundle with a ControlNet of its own, which is a few lines of numpy here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_device

from hidiff_runtime import BundleError, EngineError, InputError, TorchGenerator
from hidiff_runtime import open as open_bundle
from hidiff_runtime.cli import main
from hidiff_runtime.format.manifest import GraphRecord, Manifest, TensorSpec
from hidiff_runtime.format.safetensors import SafetensorsFile, write

STEPS = 8  # residuals in steps 0 to 4; strided_pooled 0-1, strided and windowed after it
KIND = toy.Toy(control=True, sdxl=True, reference=False)
PICTURE = (1, 3, toy.HEIGHT * 8, toy.WIDTH * 8)
SEEN = (2, 3, toy.HEIGHT * 4, toy.WIDTH * 4)


def residuals(inputs: toy.Arrays, outputs: tuple[TensorSpec, ...]) -> dict[str, np.ndarray]:
    """What the toy's ControlNet gives: depends on each input, and on where in the picture each colour is."""
    rows = np.linspace(0, 1, SEEN[2], dtype=np.float32)[:, None]
    told = sum(np.tanh(inputs[name]).mean() for name in ("latents", "prompt_embeds", "text_embeds", "time_ids"))
    value = (inputs["control_image"] * rows).mean() + told + 1e-3 * inputs["timestep"][0]
    return {spec.name: np.full(spec.shape, inputs["conditioning_scale"][0] * value, np.float32) for spec in outputs}


@dataclasses.dataclass
class Session:
    backend: Backend
    record: GraphRecord

    def __enter__(self) -> Session:
        self.backend.events.append("open controlnet")
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.events.append("close controlnet")

    def run(self, inputs: toy.Arrays) -> dict[str, np.ndarray]:
        assert {name: (array.shape, array.dtype) for name, array in inputs.items()} == {
            spec.name: (spec.shape, np.dtype(spec.dtype)) for spec in self.record.inputs
        }
        self.backend.calls.append(("controlnet", dict(inputs)))
        return self.backend.spoil(residuals(inputs, self.record.outputs), len(self.backend.calls))


class Backend(toy.ToyBackend):
    def open(self, engine: Path, weights: Mapping[str, Path], record: Any) -> Any:
        if engine.parent.name != "controlnet":
            return super().open(engine, weights, record)
        assert weights["controlnet"].parent == engine.parent
        return Session(self, record)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = toy.make(tmp_path_factory.mktemp("toy") / "bundle", KIND)
    manifest = Manifest.read(folder)
    phase = manifest.phases[0]
    (folder / "controlnet").mkdir()
    for name in ("controlnet.graph", "controlnet.toy"):
        (folder / "controlnet" / name).write_text("a graph")
    write(folder / "controlnet/weights.safetensors", {"none": np.zeros(1, np.float32)})
    shared = tuple(spec for spec in phase.inputs if spec not in phase.residuals and spec.name != "window_shifts")
    record = GraphRecord(
        graph="controlnet/controlnet.graph",
        engines={"toy": "controlnet/controlnet.toy"},
        inputs=(
            *shared,
            TensorSpec("control_image", SEEN, "float32"),
            TensorSpec("conditioning_scale", (1,), "float32"),
        ),
        outputs=phase.residuals,
    )
    weights = {**manifest.weights, "controlnet": "controlnet/weights.safetensors"}
    toy.seal(folder, dataclasses.replace(manifest, controlnet=record, weights=weights))
    return folder


def picture(seed: int = 0) -> np.ndarray:
    return TorchGenerator(seed).rand(PICTURE)


def given(**changes: Any) -> dict[str, Any]:
    return {**KIND.given(), "steps": STEPS, "seed": 1, "guidance_scale": 3.0, "control_image": picture(), **changes}


def denoise(
    folder: Path, backend: toy.ToyBackend | None = None, *, resident: str = "current", **changes: Any
) -> np.ndarray:
    with open_bundle(folder, backend=backend or Backend(), verify="size", resident=resident) as bundle:
        return bundle.denoiser().denoise(**given(**changes))


def test_its_residuals_go_to_the_unet(folder: Path) -> None:
    """As when the caller computes the same ones; the picture's every other pixel is the nearest at half its size."""
    own: dict[str, np.ndarray] = {
        "control_image": np.concatenate([picture()[:, :, ::2, ::2]] * 2),
        "conditioning_scale": np.array([0.5], np.float32),
    }
    outputs = Manifest.read(folder).phases[0].residuals

    def control(request: Any) -> dict[str, np.ndarray]:
        return residuals({**request.inputs, **own}, outputs)

    expected = denoise(folder, control_image=None, control=control)
    assert np.array_equal(denoise(folder, conditioning_scale=0.5), expected)
    assert not np.allclose(denoise(folder, conditioning_scale=0.6), expected)
    assert not np.allclose(denoise(folder, conditioning_scale=0.5, control_image=picture(1)), expected)


class OnDevice(toy_device.Backend):
    """The ControlNet's engine in a device's memory, as the phases'."""

    def open(self, engine: Path, weights: Mapping[str, Path], record: Any) -> Any:
        if engine.parent.name != "controlnet":
            return super().open(engine, weights, record)

        def compute(inputs: toy.Arrays) -> dict[str, np.ndarray]:
            self.calls.append(("controlnet", dict(inputs)))
            return self.spoil(residuals(inputs, record.outputs), len(self.calls))

        return toy_device.Session(self, record, "controlnet", compute)


def test_on_a_device_its_residuals_never_leave_it(folder: Path) -> None:
    device, host = OnDevice(), Backend()
    found, expected = (denoise(folder, backend, conditioning_scale=0.5) for backend in (device, host))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
    assert not np.allclose(found, denoise(folder, OnDevice(), conditioning_scale=0.6))
    assert not np.allclose(found, denoise(folder, OnDevice(), conditioning_scale=0.5, control_image=picture(1)))
    assert [name for name, _ in device.calls] == [name for name, _ in host.calls]
    first = device.memory.events.index("download")
    assert device.memory.events[first:] == ["download"] * 2
    opened = [event for event in device.events if "step" not in event and "device" not in event]
    assert opened == host.events


def test_on_a_device_its_nan_are_found_in_the_unets_output(folder: Path) -> None:
    with pytest.raises(EngineError, match=r"phase strided_pooled-control, step 2 of 8"):
        denoise(folder, OnDevice(spoil=nan))


def test_it_is_evaluated_while_residuals_are_taken_and_no_longer(folder: Path) -> None:
    backend = Backend()
    denoise(folder, backend)
    asked = [name for name, _ in backend.calls]
    assert asked[:10:2] == ["controlnet"] * 5
    assert [name.endswith("-control") for name in asked[1:10:2]] == [True] * 5
    assert asked[10:] == ["windowed"] * 3


def test_its_engine_is_open_beside_those_of_phases_with_residuals(folder: Path) -> None:
    backend = Backend()
    denoise(folder, backend)
    assert backend.events == [
        "open strided_pooled-control",
        "open controlnet",
        "close strided_pooled-control",
        "open strided-control",
        "close strided-control",
        "open windowed-control",
        "close controlnet",
        "close windowed-control",
        "open windowed",
        "close windowed",
    ]
    backend = Backend()
    denoise(folder, backend, resident="all")
    denoise(folder, backend, resident="all")
    assert backend.events.count("open controlnet") == 2 == backend.events.count("close controlnet")


@pytest.mark.parametrize("resident", ["current", "all"])
def test_it_opens_ahead_with_the_first_phase(folder: Path, resident: str) -> None:
    backend = Backend()
    with open_bundle(folder, backend=backend, resident=resident, preload=True):
        assert "open controlnet" in backend.events


PLAIN = picture()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_image": None}, "control_image is missing"),
        ({"control_image": PLAIN[0]}, r"control_image must be .* \[1, 3, 48, 64\]"),
        ({"control_image": PLAIN[..., ::2]}, "control_image must be"),
        ({"control_image": PLAIN.astype(np.float64)}, "control_image must be"),
        ({"control_image": (PLAIN * 255).astype(np.uint8)}, "control_image must be"),
        ({"control_image": PLAIN * 2 - 1}, "control_image must lie between 0 and 1"),
        ({"control_image": PLAIN * 255}, "control_image must lie between 0 and 1"),
        ({"control_image": PLAIN * np.float32(np.nan)}, "control_image holds NaN"),
        ({"conditioning_scale": float("inf")}, "conditioning_scale must be a finite number"),
        ({"conditioning_scale": 1e39}, "conditioning_scale must be a number from -1000 to 1000"),
        ({"conditioning_scale": "1"}, "conditioning_scale must be a finite number"),
        ({"control": lambda _: {}}, "come from one place"),
        ({"control": lambda _: {}, "control_image": None, "conditioning_scale": 0.5}, "conditioning_scale is for"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(folder: Path, changes: dict[str, Any], message: str) -> None:
    backend = Backend()
    with pytest.raises(InputError, match=message):
        denoise(folder, backend, **changes)
    assert not backend.events


@pytest.mark.parametrize(("control", "advice"), [(True, "Give control="), (False, "Leave it out")])
def test_a_picture_for_a_bundle_without_a_controlnet_is_refused(tmp_path: Path, control: bool, advice: str) -> None:
    plain = toy.make(tmp_path / "bundle", dataclasses.replace(KIND, control=control))
    with pytest.raises(InputError, match="has no ControlNet") as caught:
        denoise(plain)
    assert advice in str(caught.value)
    with open_bundle(plain, backend=Backend()) as bundle, pytest.raises(BundleError, match="has no ControlNet"):
        bundle.controlnet_engine()


def nan(outputs: dict[str, np.ndarray], call: int) -> dict[str, np.ndarray]:
    return {name: array * np.float32(np.nan) for name, array in outputs.items()} if call == 3 else outputs


def nothing(outputs: dict[str, np.ndarray], call: int) -> dict[str, np.ndarray]:
    return {} if call == 3 else outputs


@pytest.mark.parametrize(("spoil", "message"), [(nan, "NaN or infinite"), (nothing, "did not give down_residual_00")])
def test_a_controlnet_that_fails_is_named_with_the_step(folder: Path, spoil: Any, message: str) -> None:
    with pytest.raises(EngineError, match=rf"{message}.*ControlNet, step 2 of {STEPS}"):
        denoise(folder, Backend(spoil=spoil))


def altered(folder: Path, **changes: Any) -> dict[str, Any]:
    manifest = Manifest.read(folder)
    assert manifest.controlnet is not None
    record = dataclasses.replace(manifest.controlnet, **changes)
    data: dict[str, Any] = json.loads(json.dumps(dataclasses.replace(manifest, controlnet=record).to_json()))
    return data


def test_a_manifest_whose_controlnet_does_not_fit_is_refused(folder: Path) -> None:
    manifest = Manifest.read(folder)
    record = manifest.controlnet
    assert record is not None
    assert Manifest.from_json(altered(folder)) == manifest
    scale = TensorSpec("conditioning_scale", (1,), "float32")
    faults: list[tuple[dict[str, Any], str]] = [
        ({"graph": "controlnet/other.graph"}, "controlnet.graph refers to a file"),
        ({"engines": {"toy": "../engine"}}, r"controlnet\.engines\.toy"),
        ({"outputs": record.outputs[:1]}, r"controlnet\.outputs must be the residuals"),
        ({"inputs": record.inputs[:-1]}, r"conditioning_scale and control_image once each"),
        ({"inputs": (*record.inputs, scale)}, r"once each"),
        ({"inputs": (*record.inputs, TensorSpec("noise", (1,), "float32"))}, r"those of the phases, or its own"),
        (
            {"inputs": (*record.inputs[:-2], TensorSpec("control_image", (1, 3, 24, 32), "float32"), scale)},
            "batch, 3, height, width",
        ),
    ]
    for changes, message in faults:
        with pytest.raises(BundleError, match=message):
            Manifest.from_json(altered(folder, **changes))
    data = altered(folder)
    with pytest.raises(BundleError, match="name the ControlNet's store"):
        Manifest.from_json({**data, "weights": {"unet": "unet/weights.safetensors"}})
    (bucket,) = data["buckets"]
    for value, message in (
        ({**bucket["controlnet"], "kind": "x"}, r"controlnet\.kind is not a field"),
        (3, "controlnet must be an object"),
    ):
        with pytest.raises(BundleError, match=message):
            Manifest.from_json({**data, "buckets": [{**bucket, "controlnet": value}]})
    del bucket["controlnet"]
    with pytest.raises(BundleError, match="controlnet is missing"):
        Manifest.from_json(data)


def test_the_command_line_takes_a_picture(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hidiff_runtime.backends.NAMES", ("toy",))
    monkeypatch.setattr("hidiff_runtime.backends.get", lambda _name: Backend())
    write(tmp_path / "embeds.safetensors", KIND.given())
    write(tmp_path / "edges.safetensors", {"control_image": picture()})
    output = tmp_path / "latents.safetensors"

    def run(*more: str) -> int:
        options = ["--steps", str(STEPS), "--guidance", "3", "--seed", "1", "-o", str(output), *more]
        return main(["denoise", str(folder), *options])

    edges = ("--control-image", str(tmp_path / "edges.safetensors"))
    assert run("--embeds", str(tmp_path / "embeds.safetensors"), *edges, "--conditioning-scale", "0.5") == 0
    with SafetensorsFile.open(output) as file:
        assert np.array_equal(file.arrays()["latents"], denoise(folder, conditioning_scale=0.5))
    assert run("--random-embeds", "0") == 0
    assert run("--embeds", str(tmp_path / "embeds.safetensors")) == 2
    assert "control_image is missing" in capsys.readouterr().err
    assert run("--random-embeds", "0", "--control-image", str(tmp_path / "embeds.safetensors")) == 2
    assert "not a control_image" in capsys.readouterr().err
    assert main(["info", str(folder)]) == 0
    assert "control_image float32[2, 3, 24, 32]" in capsys.readouterr().out
