"""The runtime on real ONNX Runtime engines: the toy's few lines of numpy as ONNX graphs over its weight store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import toy
import toy_reference
import toy_sizes

from hidiff_runtime import BundleError, EngineError, InputError, check
from hidiff_runtime import open as open_bundle
from hidiff_runtime.backends.onnxruntime import OnnxRuntimeOptions, _session_options
from hidiff_runtime.backends.onnxruntime_profile import seconds_by_operator
from hidiff_runtime.backends.protocol import ProfiledSession
from hidiff_runtime.format.manifest import MANIFEST, Manifest, PhaseRecord, TensorSpec
from hidiff_runtime.format.safetensors import SafetensorsFile
from hidiff_runtime.sampling.torch_rng import TorchGenerator
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


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [(b"\x08\x0a", EngineError, "cannot load"), (b"no graph", BundleError, "A graph cannot be read")],
    ids=["a model without a graph", "no model"],
)
def test_an_engine_that_does_not_load_is_an_error(
    folder: Path, content: bytes, error: type[Exception], message: str
) -> None:
    (folder / "unet/windowed.onnxruntime.onnx").write_bytes(content)
    toy.seal(folder)
    with pytest.raises(error, match=message):
        check(folder)


def test_an_option_that_the_backend_lacks_is_refused(pristine: Path) -> None:
    with pytest.raises(InputError, match="no such option"):
        open_bundle(pristine, colour="blue")


@pytest.mark.parametrize("optimize", [True, False])
def test_engines_give_the_reference_as_they_stand_too(pristine: Path, optimize: bool) -> None:
    report = check(pristine, device="cpu", optimize=optimize)
    assert report.ok, report.render()
    level = _session_options(OnnxRuntimeOptions(optimize=optimize)).graph_optimization_level
    assert (level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL) is not optimize


@pytest.mark.parametrize("optimize", [1, "false", None])
def test_whether_to_optimize_is_true_or_false(pristine: Path, optimize: object) -> None:
    with pytest.raises(InputError, match="optimize must be true or false"):
        open_bundle(pristine, optimize=optimize)


def test_a_profile_tells_the_operators_of_one_evaluation(pristine: Path, tmp_path: Path) -> None:
    with open_bundle(pristine, device="cpu", profile=True) as bundle:
        record = bundle.manifest.phases[0]
        session = bundle.engine(record.phase)
        assert isinstance(session, ProfiledSession)
        session.run(zeros(record))
        found = session.operator_seconds(zeros(record))
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert all(seconds >= 0 for seconds in found.values())
    nodes = {node.op_type for node in onnx.load(pristine / record.engines["onnxruntime"]).graph.node}
    assert found.keys() & nodes
    assert list(tmp_path.iterdir()) == []  # it is written elsewhere, and gone again


def test_a_profile_counts_the_last_evaluation_alone(tmp_path: Path) -> None:
    def node(name: str, began: int, took: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": began, "dur": took, "args": {"op_name": name}}

    def run(began: int) -> dict[str, Any]:
        return {"cat": "Session", "name": "model_run", "ts": began, "dur": 50}

    fence = {"cat": "Node", "name": "x_fence_before", "ts": 130, "dur": 9, "args": {"op_name": "Conv"}}
    events = [node("Conv", 10, 5), run(0), node("Conv", 110, 3), node("Add", 120, 4), node("Conv", 125, 2), fence]
    (tmp_path / "profile.json").write_text(json.dumps([*events, run(100)]))
    found = seconds_by_operator(tmp_path / "profile.json")
    assert list(found.items()) == [("Conv", 5e-6), ("Add", 4e-6)]


@pytest.mark.parametrize("given", [False, "yes"])
def test_without_a_profile_there_are_no_operators(pristine: Path, given: Any) -> None:
    if given:
        with pytest.raises(InputError, match="profile must be true or false"):
            open_bundle(pristine, profile=given)
        return
    with open_bundle(pristine, device="cpu") as bundle:
        session: Any = bundle.engine(bundle.manifest.phases[0].phase)
        with pytest.raises(EngineError, match="opened without a profile"):
            session.operator_seconds(zeros(bundle.manifest.phases[0]))


def zeros(record: PhaseRecord) -> dict[str, Any]:
    """Inputs of a phase."""
    return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in record.inputs}


def test_a_bundle_says_whether_its_engines_run_on_the_cpu(pristine: Path) -> None:
    with open_bundle(pristine, device="cpu") as bundle:
        assert bundle.on_host


@pytest.mark.parametrize("device", ["gpu", -1, True, 1.0])
def test_a_device_that_there_cannot_be_is_refused(pristine: Path, device: object) -> None:
    with pytest.raises(InputError, match="device is not one"):
        open_bundle(pristine, device=device)


WEIGHTS = b"weights.safetensors"


@pytest.mark.parametrize(
    ("location", "message"),
    [
        (b"../manifest.json/..", "A graph looks for its weights outside the bundle: the path must not have"),
        (b"/etc/hostname/././.", "A graph looks for its weights outside the bundle: the path must be relative"),
        (b"strided.graph/././.", "strided.graph"),
        (b"nothing.safetensors", "The bundle needs unet/nothing.safetensors, which is no file of the bundle"),
    ],
    ids=["above", "absolute", "another file of the bundle", "not listed"],
)
def test_weights_in_a_file_that_no_hash_vouches_for_are_refused(folder: Path, location: bytes, message: str) -> None:
    engine = folder / "unet/strided_pooled.onnxruntime.onnx"
    content = engine.read_bytes()
    assert len(location) == len(WEIGHTS)
    assert WEIGHTS in content
    engine.write_bytes(content.replace(WEIGHTS, location))
    shutil.copy(folder / "unet/weights.safetensors", folder / "unet/nothing.safetensors")
    toy.seal(folder, replace(Manifest.read(folder), files={}))
    unlist(folder, "unet/nothing.safetensors")
    with open_bundle(folder) as bundle, pytest.raises((BundleError, EngineError), match=message) as caught:
        bundle.engine(bundle.manifest.phases[0].phase)
    assert caught.value.exit_code == (5 if location.startswith(b"strided") else 4)


def unlist(folder: Path, name: str) -> None:
    """Leaves a file in the folder and takes it out of the manifest."""
    manifest = Manifest.read(folder)
    files = {path: record for path, record in manifest.files.items() if path != name}
    content = replace(manifest, files=files).to_json()
    (folder / MANIFEST).write_text(json.dumps(content))


def test_an_engine_that_takes_something_else_than_the_manifest_says_is_refused(folder: Path) -> None:
    manifest = Manifest.read(folder)
    phases = []
    for phase in manifest.phases:
        wider = [
            replace(spec, shape=(*spec.shape[:2], spec.shape[2] + 1)) if spec.name == "prompt_embeds" else spec
            for spec in phase.inputs
        ]
        phases.append(replace(phase, inputs=tuple(wider)))
    toy.seal(folder, replace(manifest, phases=tuple(phases), reference=None))
    with open_bundle(folder) as bundle, pytest.raises(BundleError, match="engine is not of the graph unet/") as caught:
        bundle.engine(manifest.phases[0].phase)
    assert caught.value.exit_code == 4


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
        with pytest.raises(BundleError, match=r"\[2, 4, 6, 8\], the manifest says float32\[2, 4, 12, 16\]"):
            bundle.denoiser().denoise(**named, steps=8, seed=0, guidance_scale=4.0)


def test_graphs_of_another_size_than_the_buckets_are_refused_by_name(folder: Path) -> None:
    """The second size's graphs are the first one's, under names and hashes of their own."""
    toy_sizes.add_turned(folder)
    toy_reference.record_others(folder, toy.Toy())
    said = "input latents is float32[2, 4, 6, 8], the manifest says float32[2, 4, 8, 6]"
    with open_bundle(folder, verify="size") as bundle:
        first, second = bundle.buckets
        phase = first.manifest.phases[0].phase
        first.engine(phase)
        with pytest.raises(BundleError, match=r"not of the graph unet/strided_pooled-turned\.graph that") as caught:
            second.engine(phase)
        assert said in caught.value.given
        assert "output noise_pred is float32[2, 4, 6, 8], the manifest says float32[2, 4, 8, 6]" in caught.value.given
        assert "strided_pooled.onnxruntime-turned.onnx" in caught.value.given
        assert caught.value.exit_code == 4
        assert check(bundle, sizes=[(64, 48)]).ok
    with pytest.raises(BundleError, match="not of the graph") as caught:
        check(folder)
    assert said in caught.value.given


@pytest.mark.parametrize(("weights", "held"), [("shared", 3), ("packed", 1)])
def test_a_weight_store_that_all_engines_map_counts_once_for_a_memory_limit(
    pristine: Path, weights: str, held: int
) -> None:
    manifest = Manifest.read(pristine)
    engines = [record.engines["onnxruntime"] for record in manifest.phases]
    limit = sum(manifest.files[name].size for name in (*engines, manifest.weights["unet"]))
    store = manifest.files[manifest.weights["unet"]].size
    assert store > max(manifest.files[name].size for name in engines)
    for allowed, staying in ((limit, held), (limit - 1, held - 1 or 1)):
        with open_bundle(pristine, weights=weights, device="cpu", memory_limit=allowed) as bundle:
            for phase in manifest.phases:
                bundle.engine(phase.phase)
            assert len(bundle.open_phases) == staying


def test_a_session_leaves_nothing_behind(pristine: Path, tmp_path: Path) -> None:
    """By itself the library keeps a device's number and a database of events in the home folder."""
    program = (
        "import os, sys, hidiff_runtime\n"
        "assert hidiff_runtime.check(sys.argv[1], runs=False).ok\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
    )
    kept = {
        name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    }
    here = {**kept, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-B", "-c", program, str(pristine)], env=here, check=True)
    assert not list(tmp_path.iterdir())
