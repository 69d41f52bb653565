"""Reference samples are of the bundle's graphs, or are refused before anything is made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_pictures
from toy_reference import record

from hidiff_runtime import BundleError, CheckReport, check, safetensors
from hidiff_runtime.manifest import MANIFEST, Manifest
from hidiff_runtime.proof.networks import PICTURE
from hidiff_runtime.proof.replay import RUN
from hidiff_runtime.proof.samples import INDEX, TENSORS
from hidiff_runtime.rng import TorchGenerator

KIND = toy.Toy(sdxl=True)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = toy_pictures.make(tmp_path_factory.mktemp("pictures") / "bundle", KIND)
    record(folder, KIND)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    index = folder / "reference" / INDEX
    data = json.loads(index.read_text(encoding="utf-8"))
    change(data)
    index.write_text(json.dumps(data), encoding="utf-8")
    toy.seal(folder)
    return folder


def checked(folder: Path) -> CheckReport:
    return check(folder, backend=toy_pictures.Backend())


def take(data: dict[str, Any], *way: Any) -> Any:
    for part in way:
        data = data[part]
    return data


def put(*way: Any, value: Any) -> Callable[[dict[str, Any]], object]:
    *before, last = way
    return lambda data: take(data, *before).update({last: value})


def leave(*way: Any) -> Callable[[dict[str, Any]], object]:
    *before, last = way
    return lambda data: take(data, *before).pop(last)


NOISE = {"seed": 1, "shape": [2, 4, 6, 8], "scale": 1.0, "uniform": False}
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "noise as large as it likes": (
        put("calls", 0, "inputs", "latents", value={**NOISE, "shape": [2, 4, 2**20, 2**20]}),
        r"calls\[0\].inputs.latents must be of shape \[2, 4, 6, 8\]",
    ),
    "a run's noise": (
        put("runs", 0, "inputs", "latents", value={**NOISE, "shape": [2**40]}),
        r"runs\[0\].inputs.latents must be of shape \[1, 4, 6, 8\]",
    ),
    "the same half many times": (
        lambda data: put("runs", 0, "inputs", "prompt_embeds", "repeat", value=2**60)(data),
        r"runs\[0\].inputs.prompt_embeds must be of shape",
    ),
    "a callback": (put("runs", 0, "inputs", "callback", value=NOISE), r"runs\[0\].inputs must be of .*prompt_embeds"),
    "steps": (put("runs", 0, "inputs", "steps", value=NOISE), r"runs\[0\].inputs must be of"),
    "self": (put("runs", 0, "inputs", "self", value=NOISE), r"runs\[0\].inputs must be of"),
    "a picture to start from": (put("runs", 0, "inputs", "image_latents", value=NOISE), r"runs\[0\].inputs must be of"),
    "no embeddings": (leave("runs", 0, "inputs", "prompt_embeds"), r"runs\[0\].inputs must hold prompt_embeds"),
    "control that nothing takes": (
        put("runs", 0, "control", value={"mid_residual": NOISE}),
        r"control.inputs must be of none",
    ),
    "another sampler": (
        put("runs", 0, "sampler", value="euler"),
        r"runs\[0\].sampler must be one of \['noisy', 'plain'",
    ),
    "an untabulated run": (put("runs", 0, "steps", value=99), "recorded run is not one that the bundle takes"),
    "an eta": (put("runs", 0, "eta", value=0.5), "recorded run is not one that the bundle takes"),
    "no guidance": (put("runs", 0, "guidance_scale", value=None), "recorded run is not one that the bundle takes"),
    "a result of another shape": (
        put("runs", 0, "expected", "shape", value=[1, 4, 6, 9]),
        r"runs\[0\].expected must be of",
    ),
    "a call's input missing": (leave("calls", 1, "inputs", "timestep"), r"calls\[1\].inputs must hold timestep"),
    "a call's input too many": (put("calls", 1, "inputs", "mask", value=NOISE), r"calls\[1\].inputs must be of"),
    "a shift too many": (
        put("calls", 0, "window_shifts", value=[0, 0, 0, 0]),
        r"window_shifts must be 3 numbers from 0 to 3",
    ),
    "a shift too large": (
        put("calls", 0, "window_shifts", value=[0, 4, 0]),
        r"window_shifts must be 3 numbers from 0 to 3",
    ),
    "a phase that is not there": (
        put("calls", 0, "control", value=True),
        r"calls\[0\] is of a phase that the bundle has no",
    ),
    "a network that is not there": (put("networks", 0, "network", value="unet"), r"networks\[0\] is of a network that"),
    "the step graph": (put("networks", 0, "network", value="step"), r"networks\[0\] is of a network that"),
    "no output": (put("networks", 0, "expected", value={}), r"networks\[0\].expected must have an output"),
    "another output": (
        lambda data: put("networks", 0, "expected", "moments", value=take(data, "calls", 0, "expected"))(data),
        r"networks\[0\].expected must be outputs of the network",
    ),
    "a prompt of the VAE": (
        put("networks", -1, "prompt", value="a boat"),
        "has a prompt, which only a text encoder takes",
    ),
    "a run that is not there": (put("pictures", 0, "run", value=7), r"pictures\[0\].run must be one of the 1 runs"),
    "a corner outside": (put("pictures", 0, "corner", value=[45, 0]), r"pictures\[0\] must lie within a tile of 64x48"),
    "a part of no picture": (
        lambda data: put("pictures", 0, "tensor", value=take(data, "runs", 0, "expected", "tensor"))(data),
        r"pictures\[0\].tensor must be 1 pictures of three channels",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_sample_of_other_graphs_is_named_and_nothing_is_drawn_for_it(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 0

    class Counting(TorchGenerator):
        def randn(self, shape: Any) -> Any:
            nonlocal largest
            largest = max(largest, int(np.prod(shape, dtype=np.float64)))
            assert largest < 10_000
            return super().randn(shape)

    monkeypatch.setattr("hidiff_runtime.proof.sample_kinds.TorchGenerator", Counting)
    rewritten(folder, change)
    with pytest.raises(BundleError, match=message) as caught:
        checked(folder)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([0, 500], np.int32), r"must have positions from 0 to 191"),
        (np.array([-1, 5], np.int32), r"must have positions from 0 to 191"),
        (np.array([0.0, 1.0]), r"must have as many positions as values"),
        (np.array([0, 1, 2], np.int32), r"must have as many positions as values"),
        (np.array([[0, 1]], np.int32), r"must have as many positions as values"),
    ],
)
def test_positions_lie_within_an_output(folder: Path, values: np.ndarray, message: str) -> None:
    path = folder / "reference" / TENSORS
    with safetensors.SafetensorsFile.open(path) as file:
        arrays = {name: np.array(array) for name, array in file.arrays().items()}
    safetensors.write(path, {**arrays, "some": np.zeros(2, np.float32), "places": values})
    rewritten(folder, lambda data: data["runs"][0]["expected"].update(tensor="some", positions="places"))
    with pytest.raises(BundleError, match=message):
        checked(folder)


def test_what_the_networks_imply_has_to_be_there(folder: Path) -> None:
    rewritten(folder, lambda data: data.update(pictures=[]))
    assert [(v.boundary, v.fault) for v in checked(folder).verdicts if not v.ok] == [(PICTURE, "no reference sample")]
    rewritten(folder, lambda data: data.update(runs=[]))
    assert [(v.boundary, v.fault) for v in checked(folder).verdicts if not v.ok] == [(RUN, "no reference sample")]
    assert checked(folder).exit_code == 1


def test_samples_that_the_manifest_does_not_list_are_refused(folder: Path) -> None:
    manifest = Manifest.read(folder)
    files = {path: kept for path, kept in manifest.files.items() if not path.endswith(TENSORS)}
    (folder / MANIFEST).write_text(json.dumps(replace(manifest, files=files).to_json()), encoding="utf-8")
    with pytest.raises(BundleError, match=r"reference/samples.safetensors, which is no file of the bundle"):
        checked(folder)
