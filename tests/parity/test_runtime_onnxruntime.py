"""The runtime on real ONNX Runtime engines: the toy's few lines of numpy as ONNX graphs over its weight store."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy

from hidiff_runtime import BundleError, EngineError, InputError, check
from hidiff_runtime import open as open_bundle
from hidiff_runtime.manifest import Manifest, TensorSpec
from hidiff_runtime.rng import TorchGenerator
from hidiff_runtime.safetensors import SafetensorsFile
from tests.parity.toy_onnx import make


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with an ONNX Runtime engine in each phase, and numpy's reference samples."""
    return make(tmp_path_factory.mktemp("ort") / "bundle", toy.Toy())


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


@pytest.mark.parametrize("resident", ["current", "all"])
@pytest.mark.parametrize("weights", ["packed", "shared"])
def test_engines_give_the_reference(pristine: Path, resident: str, weights: str) -> None:
    report = check(pristine, resident=resident, weights=weights)
    assert report.backend == "onnxruntime"
    assert report.ok, report.render()


def test_a_run_is_the_one_written_out_by_hand(pristine: Path) -> None:
    kind = toy.Toy()
    expected = toy.reference_run(kind, Manifest.read(pristine), toy.stored_weights(kind))
    with open_bundle(pristine, verify="size", preload=True) as bundle:
        latents = bundle.denoiser().denoise(
            **expected["inputs"], steps=8, sampler="noisy", seed=expected["seed"], guidance_scale=4.0
        )
    np.testing.assert_allclose(latents, expected["latents"], rtol=1e-5, atol=1e-5)


def test_an_engine_of_the_wrong_phase_fails(folder: Path) -> None:
    shutil.copy(folder / "unet/windowed.onnxruntime.onnx", folder / "unet/strided.onnxruntime.onnx")
    toy.seal(folder)
    report = check(folder, runs=False)
    assert [verdict.phase for verdict in report.verdicts if not verdict.ok] == ["strided"]


def test_one_perturbed_weight_fails(folder: Path) -> None:
    path = folder / "unet/weights.safetensors"
    with SafetensorsFile.open(path) as file:
        offset = file.info("mix").offset
    content = bytearray(path.read_bytes())
    content[offset + 2] ^= 0x20  # a high bit of the first weight's mantissa
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"weights\.safetensors has changed"):
        check(folder)
    toy.seal(folder)
    assert not any(verdict.ok for verdict in check(folder, runs=False).verdicts)


def test_an_engine_that_does_not_load_is_an_error(folder: Path) -> None:
    (folder / "unet/windowed.onnxruntime.onnx").write_bytes(b"no graph")
    toy.seal(folder)
    with pytest.raises(EngineError, match="cannot load"):
        check(folder)


def test_an_option_that_the_backend_lacks_is_refused(pristine: Path) -> None:
    with pytest.raises(InputError, match="no such option"):
        open_bundle(pristine, colour="blue")


@pytest.mark.parametrize("device", ["gpu", -1, True, 1.0])
def test_a_device_that_there_cannot_be_is_refused(pristine: Path, device: object) -> None:
    with pytest.raises(InputError, match="device is not one"):
        open_bundle(pristine, device=device)


def test_an_engine_of_other_sizes_is_refused_before_noise_is_drawn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest that agrees with itself on sizes that its engines do not have."""

    def larger(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=(*spec.shape[:2], 12, 16)) if spec.name in ("latents", "noise_pred") else spec

    manifest = Manifest.read(folder)
    phases = tuple(
        replace(record, inputs=tuple(map(larger, record.inputs)), outputs=tuple(map(larger, record.outputs)))
        for record in manifest.phases
    )
    toy.seal(folder, replace(manifest, latent=(4, 12, 16), width=128, height=96, phases=phases, step=None))
    monkeypatch.setattr(TorchGenerator, "randn", lambda *_: pytest.fail("noise was drawn"))
    with open_bundle(folder) as bundle:
        embeds = {name: np.zeros((1, toy.TOKENS, toy.DIM), np.float32) for name in ("", "negative_")}
        named = {f"{sign}prompt_embeds": value for sign, value in embeds.items()}
        with pytest.raises(EngineError, match="not one of the graph that the manifest names") as caught:
            bundle.denoiser().denoise(**named, steps=8, seed=0, guidance_scale=4.0)
    assert "does not take latents float32[2, 4, 12, 16]" in str(caught.value)
    assert "takes latents float32[2, 4, 6, 8]" in str(caught.value)
    assert caught.value.exit_code == 5
