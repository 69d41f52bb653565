"""The runtime on real OpenVINO engines: the toy's few lines of numpy as ONNX graphs over its weight store."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import linked
import numpy as np
import onnx
import pytest
import toy
from onnx import TensorProto, helper

from hidiff_runtime import BundleError, EngineError, InputError, check
from hidiff_runtime import open as open_bundle
from hidiff_runtime.backends.openvino import inference_device
from hidiff_runtime.backends.openvino.compile_record import CompileRecord
from hidiff_runtime.backends.openvino.inference_device import OpenVinoBackend, PrecisionWarning
from hidiff_runtime.format.manifest import GraphRecord, Manifest, TensorSpec
from tests.parity.toy_onnx import FLOAT32, make

ENGINE = "unet/strided.onnxruntime.openvino.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with an OpenVINO engine in each phase, and numpy's reference samples."""
    return make(tmp_path_factory.mktemp("ov") / "bundle", toy.Toy(), precision="float32")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor that has no arithmetic for bfloat16."""
    monkeypatch.setattr(inference_device, "_precisions", lambda _core: ("float32",))
    return


def least(report: Any) -> float:
    """The smallest signal-to-noise ratio of the engines."""
    return float(min(verdict.metrics.snr_db for verdict in report.verdicts))


@pytest.mark.parametrize("resident", ["current", "all"])
@pytest.mark.parametrize("loop", ["host", "device"])
def test_engines_give_the_reference(pristine: Path, resident: str, loop: str) -> None:
    report = check(pristine, resident=resident, loop=loop)
    assert report.backend == "openvino"
    assert report.ok, report.render()


def test_a_run_is_the_one_written_out_by_hand(pristine: Path) -> None:
    kind = toy.Toy()
    expected = toy.reference_run(kind, Manifest.read(pristine), toy.stored_weights(kind))
    with open_bundle(pristine, verify="size", preload=True) as bundle:
        latents = bundle.denoiser().denoise(
            **expected["inputs"], steps=8, sampler="noisy", seed=expected["seed"], guidance_scale=4.0
        )
    np.testing.assert_allclose(latents, expected["latents"], rtol=1e-5, atol=1e-5)


def test_a_controlnets_engine_runs_beside(tmp_path: Path) -> None:
    folder = make(tmp_path / "b", toy.Toy(reference=False, control=True), control=True, precision="float32")
    picture = np.full((1, 3, toy.HEIGHT * 8, toy.WIDTH * 8), 0.5, np.float32)
    given = {**toy.Toy(control=True).given(), "steps": 8, "seed": 4, "guidance_scale": 3.0, "sampler": "noisy"}
    with open_bundle(folder) as bundle:
        found = [bundle.denoiser().denoise(**given, control_image=picture, conditioning_scale=s) for s in (0.7, 0.1)]
    assert np.isfinite(found[0]).all()
    assert np.abs(found[0] - found[1]).max() > 1e-4


@pytest.mark.parametrize("threads", [0, 1])
def test_threads_are_as_many_as_asked_and_bound_to_no_core(pristine: Path, threads: int) -> None:
    """Bound ones are bound to the first cores in every process, so that workers would share them."""
    with open_bundle(pristine, threads=threads) as bundle:
        compiled = bundle.engine(bundle.manifest.phases[0].phase)._parts[-1].request.get_compiled_model()
        assert compiled.get_property("ENABLE_CPU_PINNING") is False
        assert compiled.get_property("NUM_STREAMS") == 1
        if threads:
            assert compiled.get_property("INFERENCE_NUM_THREADS") == threads


def test_an_engine_of_the_wrong_phase_fails(folder: Path) -> None:
    shutil.copy(folder / "unet/windowed.onnxruntime.onnx", folder / "unet/strided.onnxruntime.onnx")
    toy.seal(folder)
    report = check(folder, runs=False)
    assert [verdict.phase for verdict in report.verdicts if not verdict.ok] == ["strided"]


def test_changed_weights_are_refused_and_where_the_manifest_knows_them_drawn_with(folder: Path) -> None:
    """No engine that was compiled before them is ever used."""
    assert check(folder, runs=False).ok
    weights = folder / "unet/weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 0x40
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"weights\.safetensors has changed"):
        check(folder)
    toy.seal(folder)
    assert not check(folder, runs=False).ok


def test_a_changed_graph_is_refused_though_it_is_not_what_the_manifest_calls_the_engine(folder: Path) -> None:
    shutil.copy(folder / "unet/windowed.onnxruntime.onnx", folder / "unet/strided.onnxruntime.onnx")
    with open_bundle(folder, verify="size") as bundle:
        phases = {record.phase.name: record.phase for record in bundle.manifest.phases}
        with pytest.raises(BundleError, match=r"strided\.onnxruntime\.onnx"):
            bundle.engine(phases["strided"])


def test_precision_is_the_records_and_never_the_librarys(folder: Path) -> None:
    """Where the processor has bfloat16, it is what OpenVINO computes in by itself."""
    exact = check(folder, runs=False)
    for path in folder.glob("unet/*.openvino.json"):
        replace(CompileRecord.read(path), precision="bfloat16").write(path)
    toy.seal(folder)
    with OpenVinoBackend().device({}) as device:
        able = "bfloat16" in inference_device._precisions(device._core)
    if able:
        rounded = check(folder, runs=False)
        assert 25 < least(rounded) < 70 < least(exact)
        assert check(folder, runs=False, precision="float32").ok
        assert check(folder, precision="bfloat16", runs=False).verdicts == rounded.verdicts


def test_names_that_are_no_text_are_an_error(folder: Path) -> None:
    path = folder / "unet/strided.onnxruntime.onnx"
    content = path.read_bytes()
    assert b"node_0" in content
    path.write_bytes(content.replace(b"node_0", b"\xb8ode_0"))
    toy.seal(folder)
    with pytest.raises(EngineError, match="OpenVINO cannot load"):
        check(folder)


def test_what_stays_in_float32_does_so_in_bfloat16(folder: Path) -> None:
    """A timestep of 999 is known to 4 in bfloat16; the toy adds it to what it predicts."""
    latents = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in Manifest.read(folder).phases[0].inputs}
    latents["timestep"] = np.float32([997])
    found = {}
    for kept in ((FLOAT32,), ()):
        for path in folder.glob("unet/*.openvino.json"):
            replace(CompileRecord.read(path), precision="bfloat16", float32=kept).write(path)
        toy.seal(folder)
        with open_bundle(folder) as bundle:
            session = bundle.engine(bundle.manifest.phases[0].phase)
            executed = [part.request.get_compiled_model().get_runtime_model() for part in session._parts]
            found[kept] = [
                {str(node.get_rt_info()["runtimePrecision"].value) for node in model.get_ordered_ops()}
                for model in executed
            ]
            assert np.isfinite(session.run(latents)["noise_pred"]).all()
    assert len(found[FLOAT32,]) == 2
    assert found[FLOAT32,][0] == {"f32"}
    assert len(found[()]) == 1


@pytest.mark.usefixtures("without_bfloat16")
def test_a_processor_without_bfloat16_computes_in_float32_and_says_so(folder: Path) -> None:
    for path in folder.glob("unet/*.openvino.json"):
        replace(CompileRecord.read(path), precision="bfloat16").write(path)
    toy.seal(folder)
    with pytest.warns(PrecisionWarning, match="no arithmetic for bfloat16") as told:
        assert check(folder).ok
    assert len(told) >= 1
    with pytest.raises(EngineError, match="no arithmetic for bfloat16") as caught:
        check(folder, precision="bfloat16")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("tokens", [3, 4, 5, 8])
def test_attention_with_as_many_queries_as_heads_is_attention(tokens: int, tmp_path: Path) -> None:
    """OpenVINO's own kernel for 4 queries and 4 heads leaves 6 dB in bfloat16."""
    heads, size, width = 4, 16, 64
    names = ("query", "key", "value")
    spec = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, tokens, width]) for name in (*names, "out")]
    nodes = [
        helper.make_node("Attention", [*names], ["out"], name="Attention", q_num_heads=heads, kv_num_heads=heads),
    ]
    made = helper.make_graph(nodes, "attention", spec[:3], spec[3:])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), tmp_path / "a.onnx")
    CompileRecord("a.onnx", "bfloat16", ()).write(tmp_path / "a.openvino.json")
    given = {
        name: np.random.default_rng(seed).standard_normal((2, tokens, width)).astype(np.float32)
        for seed, name in enumerate(names)
    }
    record = GraphRecord("a.onnx", {}, tuple(map(tensor, names, [tokens] * 3)), (tensor("out", tokens),))
    with OpenVinoBackend().device({}) as device, device.open(tmp_path / "a.openvino.json", {}, record) as session:
        found = session.run(given)["out"]
    query, key, value = (
        array.astype(np.float64).reshape(2, tokens, heads, size).transpose(0, 2, 1, 3) for array in given.values()
    )
    scores = np.exp(query @ key.transpose(0, 1, 3, 2) / np.sqrt(size))
    mixed = (scores / scores.sum(-1, keepdims=True)) @ value
    exact = mixed.transpose(0, 2, 1, 3).reshape(2, tokens, width)
    assert 10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum()) > 40


def tensor(name: str, tokens: int) -> TensorSpec:
    return TensorSpec(name, (2, tokens, 64), "float32")


def test_a_record_that_names_nodes_of_another_graph_is_refused(folder: Path) -> None:
    replace(CompileRecord.read(folder / ENGINE), float32=("time/Sin",)).write(folder / ENGINE)
    toy.seal(folder)
    with pytest.raises(BundleError, match="names nodes that the graph does not have") as caught:
        check(folder)
    assert "time/Sin" in caught.value.given


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
    assert "prompt_embeds" in caught.value.given


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [(b"\x08\x0a", EngineError, "OpenVINO cannot load"), (b"no graph", BundleError, "A graph cannot be read")],
    ids=["a model without a graph", "no model"],
)
def test_an_engine_that_does_not_load_is_an_error(
    folder: Path, content: bytes, error: type[Exception], message: str
) -> None:
    (folder / "unet/windowed.onnxruntime.onnx").write_bytes(content)
    toy.seal(folder)
    with pytest.raises(error, match=message):
        check(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": "blue"}, "OpenVINO has no such option"),
        ({"threads": -1}, "threads must be"),
        ({"threads": True}, "threads must be"),
        ({"precision": "float16"}, "precision is not one"),
        ({"precision": None}, "precision is not one"),
    ],
)
def test_an_option_that_there_is_not_is_refused(pristine: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_bundle(pristine, **options)


@pytest.mark.parametrize("layout", linked.KNOWN)
def test_engines_behind_links_give_the_reference(pristine: Path, tmp_path: Path, layout: str) -> None:
    report = check(linked.KNOWN[layout](pristine, tmp_path / "home"))
    assert report.backend == "openvino"
    assert report.ok, report.render()


def test_importing_the_library_sends_nothing_and_writes_nothing(tmp_path: Path) -> None:
    """By itself it forks a process that sends an event, and keeps a number of the client in the home folder."""
    program = (
        "import sys\nseen = []\n"
        "sys.addaudithook(lambda event, _: seen.append(event) if event in ('os.fork', 'socket.connect') else None)\n"
        "from hidiff_runtime.backends.openvino.quiet_import import openvino\n"
        "library = openvino()\nlibrary.Core()\n"
        "assert 'openvino_telemetry' not in sys.modules\nassert openvino() is library\nprint(seen)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_a_forked_process_is_told_instead_of_waiting_for_ever(pristine: Path) -> None:
    """OpenVINO's threads stay in the parent, and what it computes in the child never ends."""
    program = (
        "import os, sys\nimport hidiff_runtime\n"
        "with hidiff_runtime.open(sys.argv[1]) as bundle:\n"
        "    phase = bundle.manifest.phases[0].phase\n"
        "    session = bundle.engine(phase)\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        for ask in (lambda: session.run({}), lambda: hidiff_runtime.open(sys.argv[1]).engine(phase)):\n"
        "            try:\n                ask()\n"
        "            except hidiff_runtime.EngineError as error:\n                print(error.summary, flush=True)\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "    assert hidiff_runtime.check(bundle).ok\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(pristine)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = "OpenVINO computed before this process was forked, and its threads stayed in the parent."
    assert done.stdout.splitlines() == [told, told]


@pytest.mark.parametrize("profile", [True, False])
def test_a_profile_tells_the_operators_of_an_evaluation(pristine: Path, profile: bool) -> None:
    with open_bundle(pristine, profile=profile) as bundle:
        record = bundle.manifest.phases[0]
        inputs = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in record.inputs}
        session: Any = bundle.engine(record.phase)
        if not profile:
            with pytest.raises(EngineError, match="opened without a profile"):
                session.operator_seconds(inputs)
            return
        found = session.operator_seconds(inputs)
    assert found
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert min(found.values()) > 0


def test_where_the_library_is_missing_or_old_it_says_how_to_get_it(
    pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference_device, "LEAST", (9999, 1))
    found = OpenVinoBackend().available()
    assert not found.usable
    assert "is older than 9999.1" in found.detail
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = OpenVinoBackend().available()
    assert not found.usable
    assert "pip install 'hidiff-runtime[openvino]'" in found.advice
    with pytest.raises(EngineError, match="openvino cannot run here"):
        check(pristine)
