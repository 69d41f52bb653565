"""Reference samples are of the bundle's graphs, or are refused before anything is made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_pictures
from toy_reference import record

from hidiff_runtime import BundleError, CheckReport, check
from hidiff_runtime.format import safetensors
from hidiff_runtime.sampling.torch_rng import TorchGenerator
from hidiff_runtime.verification.reference_samples import INDEX, TENSORS
from hidiff_runtime.verification.replay import RUN
from hidiff_runtime.verification.replay_components import PICTURE

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
NO_NETWORK = r"networks\[0\].network must be a text encoder of"
NO_PART = r"pictures\[0\] must be a part of a tile of \[48, 64\]"
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "noise as large as it likes": (
        put("calls", 0, "inputs", "latents", value={**NOISE, "shape": [2, 4, 2**20, 2**20]}),
        r"calls\[0\].inputs.latents must be float32\[2, 4, 6, 8\]",
    ),
    "a run's noise": (
        put("runs", 0, "inputs", "latents", value={**NOISE, "shape": [2**30]}),
        r"runs\[0\].inputs.latents must be float32\[1, 4, 6, 8\]",
    ),
    "the same half many times": (
        lambda data: put("runs", 0, "inputs", "prompt_embeds", "repeat", value=2**30)(data),
        r"runs\[0\].inputs.prompt_embeds must be float32",
    ),
    "a callback": (put("runs", 0, "inputs", "callback", value=NOISE), r"runs\[0\].inputs must hold .*\n.*callback"),
    "steps": (put("runs", 0, "inputs", "steps", value=NOISE), r"runs\[0\].inputs must hold .*\n.*steps"),
    "self": (put("runs", 0, "inputs", "self", value=NOISE), r"runs\[0\].inputs must hold .*\n.*self"),
    "a picture to start from": (
        put("runs", 0, "inputs", "image_latents", value=NOISE),
        r"runs\[0\].inputs .*\n.*image_latents",
    ),
    "no embeddings": (leave("runs", 0, "inputs", "prompt_embeds"), r"runs\[0\].inputs must hold .*, prompt_embeds"),
    "control that nothing takes": (
        put("runs", 0, "control", value={"mid_residual": NOISE}),
        r"control must hold nothing",
    ),
    "another sampler": (
        put("runs", 0, "sampler", value="euler"),
        r"runs\[0\].sampler must be one of plain, noisy",
    ),
    "an untabulated run": (put("runs", 0, "steps", value=99), "steps must be a tabulated number of steps"),
    "an eta": (put("runs", 0, "eta", value=0.5), "recorded run is not one that the bundle takes"),
    "no guidance": (put("runs", 0, "guidance_scale", value=None), "exactly where the bundle has guidance"),
    "a result of another shape": (
        put("runs", 0, "expected", "shape", value=[1, 4, 6, 9]),
        r"runs\[0\].expected must be of",
    ),
    "a call's input missing": (leave("calls", 1, "inputs", "timestep"), r"calls\[1\].inputs must hold .*, timestep"),
    "a call's input too many": (
        put("calls", 1, "inputs", "mask", value=NOISE),
        r"calls\[1\].inputs .*\n.*mask",
    ),
    "a shift too many": (
        put("calls", 0, "window_shifts", value=[0, 0, 0, 0]),
        r"window_shifts must be 3 shifts",
    ),
    "a shift too large": (
        put("calls", 0, "window_shifts", value=[0, 4, 0]),
        r"window_shifts\[1\] must be a whole number of 3 at most",
    ),
    "a phase that is not there": (
        put("calls", 0, "control", value=True),
        r"calls\[0\].kind must be a phase of the bundle",
    ),
    "a network that is not there": (
        put("networks", 0, "network", value="unet"),
        r"networks\[0\].network must be a text encoder of",
    ),
    "the step graph": (put("networks", 0, "network", value="step"), NO_NETWORK),
    "no output": (put("networks", 0, "expected", value={}), r"networks\[0\].expected must hold prompt_embeds"),
    "another output": (
        lambda data: put("networks", 0, "expected", "moments", value=take(data, "calls", 0, "expected"))(data),
        r"networks\[0\].expected must hold prompt_embeds",
    ),
    "a prompt of the VAE": (
        put("networks", -1, "prompt", value="a boat"),
        "prompt must be null where no text goes in",
    ),
    "a run that is not there": (put("pictures", 0, "run", value=7), r"pictures\[0\].run must be the number of a run"),
    "a corner outside": (
        put("pictures", 0, "corner", value=[45, 0]),
        NO_PART,
    ),
    "a part of no picture": (
        lambda data: put("pictures", 0, "tensor", value=take(data, "runs", 0, "expected", "tensor"))(data),
        NO_PART,
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

    monkeypatch.setattr("hidiff_runtime.verification.reference_samples.TorchGenerator", Counting)
    rewritten(folder, change)
    with pytest.raises(BundleError, match=message) as caught:
        checked(folder)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([0, 500], np.int32), r"positions must be places in \[1, 4, 6, 8\]"),
        (np.array([-1, 5], np.int32), r"positions must be places in \[1, 4, 6, 8\]"),
        (np.array([0.0, 1.0]), r"positions must be places in \[1, 4, 6, 8\]"),
        (np.array([0, 1, 2], np.int32), r"must be of an output \[1, 4, 6, 8\], stored as float32\[3\]"),
        (np.array([[0, 1]], np.int32), r"positions must be places in \[1, 4, 6, 8\]"),
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
