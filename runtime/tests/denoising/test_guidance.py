"""Guidance that is rescaled: its arithmetic, whose default it is, and where there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy

from hidiff_runtime import Bundle, InputError, TorchGenerator
from hidiff_runtime import open as open_bundle
from hidiff_runtime.denoising.conditioning import MOST_SCALE, guided
from hidiff_runtime.format.manifest import Manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    folder = toy.make(tmp_path / "toy", toy.Toy(reference=False))
    with open_bundle(folder, backend=toy.ToyBackend(), verify="size") as opened:
        yield opened


def run(bundle: Bundle, **changes: Any) -> np.ndarray:
    arguments = {**toy.Toy().given(), "steps": 4, "seed": 1, "guidance_scale": 3.0, **changes}
    return bundle.denoiser().denoise(**arguments)


def test_guidance_is_rescaled_picture_by_picture(bundle: Bundle) -> None:
    noise = TorchGenerator(4).randn((4, 4, 6, 8)) * np.array([1, 2, 3, 4], np.float32)[:, None, None, None]
    plain, whole, part = (guided(noise, 3.0, rescale) for rescale in (0.0, 1.0, 0.25))
    assert np.array_equal(plain, guided(noise, 3.0))
    for picture, positive in zip(whole, noise[2:], strict=True):
        assert picture.std() == pytest.approx(positive.std(), rel=1e-5)
    assert plain[0].std() / noise[2].std() != pytest.approx(plain[1].std() / noise[3].std(), rel=0.01)
    assert np.allclose(part, 0.25 * whole + 0.75 * plain, rtol=1e-6)
    assert np.array_equal(guided(noise, 1.0, 0.7), noise[2:])
    assert not np.array_equal(run(bundle, guidance_rescale=0.7), run(bundle))
    assert np.array_equal(run(bundle, guidance_rescale=0), run(bundle))


@pytest.mark.parametrize("scale", [1e39, -1e39, 1000.1, 10**30, np.float64(1e300)])
def test_scales_that_float32_sums_cannot_take_are_refused(bundle: Bundle, scale: Any) -> None:
    with pytest.raises(InputError, match="guidance_scale must be a number from -1000 to 1000") as caught:
        run(bundle, guidance_scale=scale)
    assert f"{float(scale):g}" in str(caught.value)


@pytest.mark.parametrize("scale", [MOST_SCALE, -MOST_SCALE, np.float32(MOST_SCALE), 1000])
def test_the_largest_scales_give_pictures(bundle: Bundle, scale: Any) -> None:
    assert np.isfinite(run(bundle, guidance_scale=scale)).all()


def test_a_bundles_own_rescale_is_that_of_runs_that_do_not_say(tmp_path: Path) -> None:
    folder = toy.make(tmp_path / "bundle", toy.Toy(reference=False))
    toy.seal(folder, dataclasses.replace(Manifest.read(folder), guidance_rescale=0.7))
    with open_bundle(folder, backend=toy.ToyBackend()) as bundle:
        assert np.array_equal(run(bundle), run(bundle, guidance_rescale=0.7))
        assert not np.array_equal(run(bundle), run(bundle, guidance_rescale=0.0))


def test_without_guidance_nothing_is_rescaled(tmp_path: Path) -> None:
    kind = toy.Toy(guidance=False, reference=False)
    with open_bundle(toy.make(tmp_path / "bundle", kind), backend=toy.ToyBackend()) as bundle:
        denoise = bundle.denoiser().denoise
        with pytest.raises(InputError, match="built without guidance: there is nothing to rescale") as caught:
            denoise(**kind.given(), steps=1, seed=0, guidance_rescale=0.7)
        assert "guidance: true" in caught.value.advice
        off = denoise(**kind.given(), steps=1, seed=0, guidance_rescale=0.0)
        assert np.array_equal(off, denoise(**kind.given(), steps=1, seed=0))
