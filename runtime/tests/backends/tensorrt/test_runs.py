"""Whole runs of the toy on the fake libraries: the latents of the host's loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from fake_cuda import FakeCuda
from fake_plans import KIND, add_engines, kernels, watched
from fake_trt import FakeTrt

from hidiff_runtime import EngineError
from hidiff_runtime import open as open_bundle
from hidiff_runtime.errors import HidiffError


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTrt]:
    with watched(FakeTrt(FakeCuda(), rtx=request.param == "tensorrt-rtx"), monkeypatch) as made:
        yield made


def denoise(folder: Path, backend: Any, kind: toy.Toy, **options: Any) -> list[np.ndarray]:
    """The latents of two runs on one open bundle, which differ."""
    given = {**kind.given(), "steps": 9, "sampler": "noisy"}
    if kind.guidance:
        given["guidance_scale"] = 3.0
    with open_bundle(folder, backend=backend, verify="size", **options) as bundle:
        return [bundle.denoiser().denoise(**given, seed=seed) for seed in (1, 2)]


def same(found: list[np.ndarray], due: list[np.ndarray]) -> bool:
    return all(np.allclose(ours, theirs, rtol=2e-6, atol=2e-6) for ours, theirs in zip(found, due, strict=True))


@pytest.mark.parametrize(
    "kind",
    [KIND, toy.Toy(guidance=False, sdxl=True, reference=False), toy.Toy(inpainting=True, batch=2, reference=False)],
    ids=["plain", "unguided sdxl", "inpainting"],
)
def test_a_run_on_the_device_is_the_hosts(tmp_path: Path, trt: FakeTrt, kind: toy.Toy) -> None:
    folder = toy.make(tmp_path / "bundle", kind)
    trt.kernels = kernels(kind)
    add_engines(folder, trt)
    due = denoise(folder, toy.ToyBackend(), kind)
    found = denoise(folder, None, kind, loop="device")
    assert same(found, due)
    assert not same(found, due[::-1])
    assert trt.cuda.calls.count("cudaGraphLaunch") > 5


@pytest.mark.parametrize(
    "options",
    [
        {"resident": "all", "preload": True},
        {"prefetch": True},
        {"loop": "host"},
        {"loop": "host", "resident": "all", "cuda_graph": False},
    ],
    ids=str,
)
def test_ways_of_opening_change_nothing(tmp_path: Path, trt: FakeTrt, options: dict[str, Any]) -> None:
    folder = toy.make(tmp_path / "bundle", KIND)
    trt.kernels = kernels(KIND)
    add_engines(folder, trt)
    assert same(denoise(folder, None, KIND, **options), denoise(folder, toy.ToyBackend(), KIND))


def test_weights_are_there_once_at_most_where_one_phase_stays(tmp_path: Path, trt: FakeTrt) -> None:
    folder = toy.make(tmp_path / "bundle", KIND)
    trt.kernels = kernels(KIND)
    add_engines(folder, trt, weights=10 << 20)
    trt.cuda.memory = 35 << 20  # an engine of a phase, that of the step, activations and tensors
    assert same(denoise(folder, None, KIND), denoise(folder, toy.ToyBackend(), KIND))
    with pytest.raises(EngineError, match="too little memory") as caught:
        denoise(folder, None, KIND, resident="all")
    assert "0.01 GiB for the engine needed" in str(caught.value)
    assert "resident='current'" in caught.value.advice


def test_a_run_that_is_given_up_leaves_the_next_one_whole(tmp_path: Path, trt: FakeTrt) -> None:
    folder = toy.make(tmp_path / "bundle", KIND)
    trt.kernels = kernels(KIND)
    add_engines(folder, trt)
    due = denoise(folder, toy.ToyBackend(), KIND)
    given = {**KIND.given(), "steps": 9, "sampler": "noisy", "guidance_scale": 3.0, "seed": 1}
    with open_bundle(folder, verify="size") as bundle:
        for stop in (0, 4, 8):
            with pytest.raises(HidiffError, match="cancelled"):
                bundle.denoiser().denoise(**given, callback=lambda info, stop=stop: info.step != stop)
        assert same([bundle.denoiser().denoise(**given)], due[:1])
        bundle.close()
        assert same([bundle.denoiser().denoise(**given)], due[:1])
