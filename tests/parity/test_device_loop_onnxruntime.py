"""Runs that leave their latents in ONNX Runtime's tensors, beside the same runs with the host's arrays.

The CPU's tensors are filled, bound and read by the same calls as a GPU's; what needs a GPU is marked.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy

from hidiff_runtime import BundleError, Cancelled, EngineError, PhaseKind, TorchGenerator, check
from hidiff_runtime import open as open_bundle
from hidiff_runtime.backends.device_tensors import DeviceTensors
from hidiff_runtime.backends.onnxruntime import (
    OnnxRuntimeBackend,
    OnnxRuntimeOptions,
    OnnxRuntimeSession,
    OrtMemory,
    _session_options,
)
from hidiff_runtime.denoising import device_loop
from hidiff_runtime.denoising.embedding_files import random_embeddings
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.phases import Phase, StepRange
from hidiff_runtime.reused_features import Reuse
from hidiff_runtime.verification.reference_samples import Drawn
from tests.parity.toy_onnx import make

ROUNDING = 5e-6
"""What twelve steps in float32 may differ by from those summed in float64, in parts of the largest value."""

SAMPLERS = ("ddim", "euler_ancestral", "dpmpp_2m_sde", "unipc", "pndm", "heun", "lcm")
STEPS = 12
Folders = Callable[[str], Path]

KINDS: dict[str, tuple[toy.Toy, bool]] = {
    "plain": (toy.Toy(reference=False), False),
    "unguided": (toy.Toy(reference=False, guidance=False, sdxl=True), False),
    "batch of 2": (toy.Toy(reference=False, batch=2, sdxl=True), False),
    "inpainting": (toy.Toy(reference=False, inpainting=True), False),
    "control": (toy.Toy(reference=False, control=True), False),
    "controlnet": (toy.Toy(reference=False, control=True), True),
    "guided in part": (toy.Toy(reference=False, guided=StepRange(0.2, 0.5), sdxl=True), False),
    "reused features": (toy.Toy(reference=False, reuse=Reuse(3)), False),
    "guided in part, inpainting": (
        toy.Toy(reference=False, guided=StepRange(0, 0.5), reuse=Reuse(3), inpainting=True),
        False,
    ),
    "guided in part, controlnet": (
        toy.Toy(reference=False, guided=StepRange(0, 0.4), reuse=Reuse(2), control=True),
        True,
    ),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The toy of a kind, made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            toy_kind, control = KINDS[kind]
            samplers = SAMPLERS if kind == "plain" else ()
            made[kind] = make(tmp_path_factory.mktemp("bundle") / "b", toy_kind, control=control, samplers=samplers)
        return made[kind]

    return folder


def denoise(folder: Path, kind: str, loop: str, *, device: str = "cpu", **changes: Any) -> np.ndarray:
    chosen, own = KINDS[kind]
    given: dict[str, Any] = {**chosen.given(), "steps": STEPS, "seed": 4, "sampler": "noisy", **changes}
    if chosen.guidance:
        given.setdefault("guidance_scale", 3.0)
    if own:
        picture = TorchGenerator(2).rand((1, 3, toy.HEIGHT * 8, toy.WIDTH * 8))
        given |= {"control_image": picture, "conditioning_scale": 0.7}
    elif chosen.control:
        residuals = [Drawn(9, spec.shape, 0.1) for spec in Manifest.read(folder).phases[0].residuals]
        given["control"] = lambda request: {
            name: residual.array() + request.inputs["latents"].mean()
            for name, residual in zip(("down_residual_00", "mid_residual"), residuals, strict=True)
        }
    with open_bundle(folder, loop=loop, verify="size", device=device, threads=1) as bundle:
        return bundle.denoiser().denoise(**given)


def distance(found: np.ndarray, due: np.ndarray) -> float:
    return float(np.abs(found - due).max() / np.abs(due).max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_hosts(bundles: Folders, kind: str) -> None:
    folder = bundles(kind)
    found, due = (denoise(folder, kind, loop) for loop in ("device", "host"))
    assert distance(found, due) < ROUNDING
    assert distance(denoise(folder, kind, "host", seed=5), due) > 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_with_noise_and_with_memory(bundles: Folders, sampler: str) -> None:
    eta = 0.6 if sampler == "ddim" else 0.0
    found, due = (denoise(bundles("plain"), "plain", loop, sampler=sampler, eta=eta) for loop in ("device", "host"))
    assert distance(found, due) < ROUNDING


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_runs_from_a_picture(bundles: Folders, sampler: str) -> None:
    image = TorchGenerator(8).randn((1, 4, toy.HEIGHT, toy.WIDTH))
    given: dict[str, Any] = {"sampler": sampler, "image_latents": image}
    found, due, other = (
        denoise(bundles("plain"), "plain", loop, **given, strength=strength)
        for loop, strength in (("device", 0.6), ("host", 0.6), ("host", 0.7))
    )
    assert distance(found, due) < ROUNDING
    assert distance(other, due) > 1e-3


def test_the_blend_is_the_hosts_whatever_the_loop(bundles: Folders) -> None:
    image, mask = TorchGenerator(8).randn((1, 4, toy.HEIGHT, toy.WIDTH)), TorchGenerator(9).rand((1, 1, 6, 8))
    given: dict[str, Any] = {"image_latents": image, "strength": 0.6, "mask": (mask > 0.5).astype(np.float32)}
    found, due = (denoise(bundles("plain"), "plain", loop, **given) for loop in ("device", "host"))
    assert np.array_equal(found, due)
    assert distance(denoise(bundles("plain"), "plain", "device", **{**given, "mask": None}), due) > 0.1


@pytest.mark.parametrize("loop", ["device", "host"])
def test_engines_that_open_ahead(bundles: Folders, loop: str) -> None:
    """ONNX Runtime loads one engine in a thread while another evaluates; the run is the same to the bit."""
    given: dict[str, Any] = {**toy.Toy().given(), "steps": STEPS, "seed": 4, "sampler": "noisy", "guidance_scale": 3.0}
    found = []
    for prefetch in (True, False):
        with open_bundle(bundles("plain"), loop=loop, verify="size", device="cpu", prefetch=prefetch) as bundle:
            found += [bundle.denoiser().denoise(**given) for _ in range(2)]
            assert len(bundle.open_phases) == 1
    assert all(np.array_equal(latents, found[0]) for latents in found)


def test_an_engine_that_does_not_open_ahead_is_an_error_when_its_phase_comes(bundles: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundles("plain"), tmp_path / "bundle"))
    (folder / "unet/windowed.onnxruntime.onnx").write_bytes(b"no graph")
    toy.seal(folder)
    steps: list[int] = []
    given: dict[str, Any] = {**toy.Toy().given(), "steps": STEPS, "seed": 4, "sampler": "noisy", "guidance_scale": 3.0}
    with open_bundle(folder, prefetch=True) as bundle, pytest.raises(BundleError, match="A graph cannot be read"):
        bundle.denoiser().denoise(**given, callback=lambda info: steps.append(info.step))
    assert steps == list(range(6))


@pytest.mark.parametrize("scale", [0.5, 1.0, 9.0])
def test_guidance_scales(bundles: Folders, scale: float) -> None:
    found, due = (denoise(bundles("plain"), "plain", loop, guidance_scale=scale) for loop in ("device", "host"))
    assert distance(found, due) < ROUNDING


@pytest.mark.parametrize("kind", ["plain", "batch of 2"])
def test_rescaled_guidance(bundles: Folders, kind: str) -> None:
    given: dict[str, Any] = {"guidance_scale": 7.5, "guidance_rescale": 0.7}
    found, due = (denoise(bundles(kind), kind, loop, **given) for loop in ("device", "host"))
    assert distance(found, due) < ROUNDING
    assert distance(denoise(bundles(kind), kind, "device", **{**given, "guidance_rescale": 0.0}), due) > 1e-2


def test_a_step_behind_is_seen(bundles: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    due = denoise(bundles("plain"), "plain", "host", sampler="pndm")
    kept = [np.zeros((5, 7), np.float32)]
    padded = device_loop.padded_rows

    def late(rows: np.ndarray, slots: int) -> np.ndarray:
        kept.append(padded(rows, slots))
        return kept[-2] if len(kept) > 2 else kept[-1]

    monkeypatch.setattr(device_loop, "padded_rows", late)
    assert distance(denoise(bundles("plain"), "plain", "device", sampler="pndm"), due) > 1e-3


@pytest.mark.parametrize("lost", ["window_shifts", "timestep", "noise", "control_image"])
def test_what_is_not_sent_is_seen(bundles: Folders, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    kind = "controlnet" if lost == "control_image" else "plain"
    due = denoise(bundles(kind), kind, "host")
    put, sent = DeviceTensors.put, []

    def forgetful(tensors: DeviceTensors, specs: Any, arrays: Mapping[str, Any]) -> None:
        sent.extend(name for name in arrays if name == lost)
        kept = {name: array for name, array in arrays.items() if name != lost or len(sent) == 1}
        if lost == "control_image" and lost in kept:
            kept[lost] = np.zeros_like(kept[lost])
        put(tensors, specs, kept)

    monkeypatch.setattr(DeviceTensors, "put", forgetful)
    assert distance(denoise(bundles(kind), kind, "device"), due) > 1e-4
    assert sent


def test_a_run_again_and_a_run_after_a_cancelled_one(bundles: Folders) -> None:
    given: dict[str, Any] = {**toy.Toy().given(), "steps": STEPS, "seed": 4, "sampler": "noisy", "guidance_scale": 3.0}
    with open_bundle(bundles("plain"), loop="device", verify="size", device="cpu") as bundle:
        first = bundle.denoiser().denoise(**given)
        with pytest.raises(Cancelled, match="after step 4 of 12"):
            bundle.denoiser().denoise(**{**given, "seed": 9}, callback=lambda info: info.step < 3)
        assert np.array_equal(bundle.denoiser().denoise(**given), first)


def test_a_real_unet(sd15_bundle: Path) -> None:
    results = []
    for loop in ("device", "host"):
        with open_bundle(sd15_bundle, loop=loop, verify="size", device="cpu", threads=1) as bundle:
            given, _ = random_embeddings(bundle.manifest, 0)
            results.append(bundle.denoiser().denoise(**given, steps=3, seed=1, guidance_scale=4.0))
    assert distance(*results) < ROUNDING
    report = check(sd15_bundle, loop="device", verify="size", device="cpu")
    assert report.ok, report.render()


def test_a_fault_on_the_way_is_found_at_the_end(bundles: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    execute = OnnxRuntimeSession.execute

    def spoilt(session: OnnxRuntimeSession, inputs: Any, outputs: Any) -> None:
        execute(session, inputs, outputs)
        if "noise_pred" in outputs:
            calls.append("UNet")
            if len(calls) == 5:
                outputs["noise_pred"].value.update_inplace(np.full(outputs["noise_pred"].shape, np.inf, np.float32))

    monkeypatch.setattr(OnnxRuntimeSession, "execute", spoilt)
    with pytest.raises(EngineError, match="NaN or infinite values in phase strided, step 5 of 12") as caught:
        denoise(bundles("plain"), "plain", "device")
    assert "384 of 384 values, backend onnxruntime" in str(caught.value)
    assert len(calls) == STEPS


def test_tensors_are_copied_both_ways() -> None:
    memory = OrtMemory("cpu")
    tensor = memory.empty((2, 3), "int32")
    array = np.arange(6, dtype=np.int32).reshape(3, 2).T
    memory.upload(array, tensor)
    array[:] = 0
    found = memory.download(tensor)
    assert found.tolist() == [[0, 2, 4], [1, 3, 5]]
    found[:] = 9
    assert memory.download(tensor).tolist() == [[0, 2, 4], [1, 3, 5]]
    for wrong in (np.zeros((3, 2), np.int32), np.zeros((2, 3), np.float32)):
        with pytest.raises(EngineError, match="does not fit"):
            memory.upload(wrong, tensor)


def test_an_engine_takes_its_own_tensors_alone(bundles: Folders) -> None:
    with open_bundle(bundles("plain"), verify="size", device="cpu", loop="device") as bundle:
        session = bundle.engine(Phase(PhaseKind.WINDOWED))
        tensors = bundle.tensors()
        assert tensors is not None
        record = bundle.manifest.phase(Phase(PhaseKind.WINDOWED))
        inputs, outputs = tensors.pick(record.inputs), tensors.pick(record.outputs)
        with pytest.raises(EngineError, match="other inputs"):
            session.execute({**inputs, "more": inputs["latents"]}, outputs)
        with pytest.raises(EngineError, match="other outputs"):
            session.execute(inputs, {})
        with pytest.raises(EngineError, match="One of the inputs is not the engine's"):
            session.execute({**inputs, "timestep": inputs["latents"]}, outputs)


def test_too_little_memory_says_what_to_do() -> None:
    with pytest.raises(EngineError, match="too little memory") as caught:
        OrtMemory("cpu").empty((1 << 20, 1 << 20, 1 << 5), "float32")
    assert "--resident current" in caught.value.advice


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("Failed to allocate memory for requested buffer of size 4096", True),
        ("BFCArena: Available memory of 12 is smaller than requested bytes of 4096", True),
        ("CUDA failure 2: out of memory ; GPU=0", True),
        ("CUDA failure 700: an illegal memory access was encountered", False),
    ],
)
def test_a_gpus_memory_that_is_full_is_told_from_other_faults(
    bundles: Folders, monkeypatch: pytest.MonkeyPatch, text: str, memory: bool
) -> None:
    """With the texts of ONNX Runtime's CUDA provider, which say how much was asked for."""

    class Session:
        def __init__(self, *_: object, **_options: object) -> None:
            raise RuntimeError(text)

    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    with (
        open_bundle(bundles("plain"), verify="size", device="cpu") as bundle,
        pytest.raises(EngineError, match="cannot load an engine") as caught,
    ):
        bundle.preload()
    assert text in str(caught.value.given)
    assert ("--resident current" in caught.value.advice) == memory


@pytest.mark.parametrize("device", ["cuda", 0, 1])
def test_a_gpu_that_is_not_there_is_an_error(
    bundles: Folders, monkeypatch: pytest.MonkeyPatch, device: str | int
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with (
        open_bundle(bundles("plain"), device=device, verify="size") as bundle,
        pytest.raises(EngineError, match="no cuda device here") as caught,
    ):
        bundle.preload()
    assert caught.value.exit_code == 5
    assert "device=auto" in caught.value.advice


@pytest.mark.needs("onnxruntime-cuda")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_a_run_is_the_hosts(bundles: Folders, kind: str) -> None:
    found = denoise(bundles(kind), kind, "auto", device="cuda")
    due = denoise(bundles(kind), kind, "host", device="cpu")
    assert distance(found, due) < 10 * ROUNDING  # other kernels, the same float32


@pytest.mark.needs("onnxruntime-cuda")
def test_on_a_gpu_float32_is_not_tf32(sd15_bundle: Path) -> None:
    report = check(sd15_bundle, device="cuda", verify="size")
    assert report.ok, report.render()
    with open_bundle(sd15_bundle, device="cuda") as bundle:
        tensors = bundle.tensors()
        assert tensors is not None
        assert not tensors.memory.on_host
    assert OnnxRuntimeBackend().available().usable


def test_all_cores_are_used_where_the_system_does_not_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows and macOS."""
    monkeypatch.delattr(os, "sched_getaffinity")
    assert _session_options(OnnxRuntimeOptions()).intra_op_num_threads == os.cpu_count()
    assert _session_options(OnnxRuntimeOptions(threads=3)).intra_op_num_threads == 3
