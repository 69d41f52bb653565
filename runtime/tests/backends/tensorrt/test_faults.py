"""What can be wrong with a machine or a bundle of TensorRT engines: an exit code, a way out, and no traceback."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy
from fake_cuda import FakeCuda, Properties, cudaError_t
from fake_plans import KIND, add_engines, kernels, use, write_plan
from fake_trt import FakeTrt

from hidiff_runtime import BundleError, Cancelled, EngineError, InputError, StepInfo, backends, cli
from hidiff_runtime import open as open_bundle
from hidiff_runtime.backends.tensorrt.cuda import CudaError
from hidiff_runtime.backends.tensorrt.plan_record import FORMAT, PlanRecord
from hidiff_runtime.format.manifest import Manifest, TensorSpec

MORE = TensorSpec("more", (1,), "float32")


@pytest.fixture
def sick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTrt:
    """A bundle with RTX engines in ``tmp_path``, and fakes that may leave things behind when they are made to fail."""
    made = use(monkeypatch, FakeTrt(FakeCuda(), kernels=kernels(KIND)))
    add_engines(toy.make(tmp_path / "bundle", KIND), made)
    return made


def failure(tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Exit code and what a run from the command line writes to stderr."""
    command = ["denoise", str(tmp_path / "bundle"), "--random-embeds", "0", "--steps", "4", "--guidance", "3"]
    code = cli.main([*command, "-o", str(tmp_path / "latents.safetensors"), "--backend", "tensorrt-rtx", *options])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return code, error


def rewrite(tmp_path: Path, **fields: Any) -> None:
    """Changes the first phase's plan record, as a build elsewhere would have written it."""
    path = tmp_path / "bundle/unet/strided_pooled.tensorrt-rtx.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    toy.seal(tmp_path / "bundle")


def test_the_command_line_runs_a_bundle(tmp_path: Path, sick: FakeTrt, capsys: pytest.CaptureFixture[str]) -> None:
    assert failure(tmp_path, capsys, "--option", "cuda_graph=0")[0] == 0
    assert not sick.cuda.misuses


def test_no_library(tmp_path: Path, sick: FakeTrt, capsys: pytest.CaptureFixture[str]) -> None:
    sick.rtx = False  # only TensorRT imports now
    code, error = failure(tmp_path, capsys)
    assert code == EngineError.exit_code
    assert "TensorRT-RTX is not here" in error
    assert "pip install 'hidiff-runtime[tensorrt-rtx]'" in error


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (cudaError_t.cudaErrorInsufficientDriver, "NVIDIA's driver is missing, or too old"),
        (cudaError_t.cudaErrorNoDevice, "There is no NVIDIA GPU here"),
    ],
)
def test_no_driver_or_no_gpu(
    tmp_path: Path, sick: FakeTrt, capsys: pytest.CaptureFixture[str], problem: cudaError_t, said: str
) -> None:
    sick.cuda.fails["cudaGetDeviceCount"] = [problem]
    code, error = failure(tmp_path, capsys)
    assert code == EngineError.exit_code
    assert said in error
    assert "nvidia-smi" in error
    assert ("cuda-python<13" in error) == (problem == cudaError_t.cudaErrorInsufficientDriver)


@pytest.mark.usefixtures("sick")
def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = failure(tmp_path, capsys, "--option", "device=3")
    assert code == EngineError.exit_code
    assert "There is no GPU 3 here" in error
    assert "0: NVIDIA L4 (sm89)" in error


def test_a_library_that_does_not_start(tmp_path: Path, sick: FakeTrt, capsys: pytest.CaptureFixture[str]) -> None:
    sick.starts = False
    code, error = failure(tmp_path, capsys)
    assert code == EngineError.exit_code
    assert "TensorRT-RTX does not start" in error
    assert "CUDA initialization failure" in error
    assert not sick.cuda.leaks


@pytest.mark.usefixtures("sick")
def test_a_plan_of_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(tmp_path, version="1.6.0.1")
    code, error = failure(tmp_path, capsys)
    assert code == EngineError.exit_code
    assert "built by TensorRT-RTX 1.6.0.1; here is 1.7.1.116" in error
    assert "'tensorrt-rtx-cu13==1.6.0.1'" in error
    assert "hidiff-export build RECIPE -o DIR --set targets=sm89" in error


@pytest.mark.usefixtures("sick")
def test_a_plan_for_another_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(tmp_path, targets=["sm86", "sm120"])
    code, error = failure(tmp_path, capsys)
    assert code == EngineError.exit_code
    assert "built for sm86, sm120; this GPU is sm89" in error
    assert "--set targets=sm89" in error


def test_a_gpu_that_tensorrt_rtx_does_not_know(
    tmp_path: Path, sick: FakeTrt, capsys: pytest.CaptureFixture[str]
) -> None:
    sick.cuda.gpus = (Properties(b"NVIDIA H100 80GB HBM3", 9, 0),)
    code, error = failure(tmp_path, capsys)
    assert code == EngineError.exit_code
    assert "on NVIDIA H100 80GB HBM3 (sm90)" in error
    assert "--set backend=tensorrt --set targets=cuda" in error


def test_a_plan_that_is_tied_to_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trt = use(monkeypatch, FakeTrt(FakeCuda(), rtx=False))
    folder = toy.make(tmp_path / "bundle", KIND)
    add_engines(folder, trt)
    path = folder / "unet/strided_pooled.tensorrt.json"
    replace(PlanRecord.read(path), device="NVIDIA L40S").write(path)
    toy.seal(folder)
    code, error = failure(tmp_path, capsys, "--backend", "tensorrt")
    assert code == EngineError.exit_code
    assert "built on NVIDIA L40S, and TensorRT ties it to that model" in error
    assert "hidiff-export build RECIPE -o DIR --set targets=cuda" in error


def test_a_record_that_says_otherwise_than_the_plan(
    tmp_path: Path, sick: FakeTrt, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "bundle/unet/strided_pooled.head"
    for old, new, said in (
        (b"1.7.1.116 sm89", b"1.6.1.116 sm89", "another version of TensorRT-RTX built it"),
        (b"1.6.1.116 sm89", b"1.7.1.116 sm86", "it was built for other GPUs"),
        (b"1.7.1.116 sm86", b"no plan at all", "it is no engine of TensorRT-RTX"),
    ):
        assert old in plan.read_bytes()
        plan.write_bytes(plan.read_bytes().replace(old, new))
        toy.seal(tmp_path / "bundle")
        code, error = failure(tmp_path, capsys)
        assert code == EngineError.exit_code
        assert said in error
    assert not sick.cuda.leaks


def test_what_tensorrt_rtx_thinks_of_the_gpu(
    tmp_path: Path, sick: FakeTrt, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    sick.is_slow = True
    assert failure(tmp_path, capsys)[0] == 0
    assert "slower than it could be on NVIDIA L4 (sm89)" in caplog.text
    sick.is_small = True
    code, error = failure(tmp_path, capsys)
    assert code == EngineError.exit_code
    assert "the GPU has too little memory for it" in error
    assert "resident='current'" in error


@pytest.mark.usefixtures("sick")
def test_a_plan_of_another_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bundle/unet"
    shutil.copy(folder / "windowed.tensorrt-rtx.json", folder / "strided_pooled.tensorrt-rtx.json")
    toy.seal(tmp_path / "bundle")
    code, error = failure(tmp_path, capsys)
    assert code == EngineError.exit_code
    assert "phase windowed instead of strided_pooled" in error


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda record: replace(record, inputs=record.inputs[1:]), "no input latents float32[2, 4, 6, 8]"),
        (lambda record: replace(record, inputs=(*record.inputs, MORE)), "another input more float32[1]"),
        (lambda record: replace(record, outputs=(*record.outputs, *record.inputs[:1])), "another output latents"),
        (
            lambda record: replace(record, inputs=(replace(record.inputs[0], shape=(2, 4, 8, 6)), *record.inputs[1:])),
            "input latents is float32[2, 4, 8, 6], the manifest says float32[2, 4, 6, 8]",
        ),
    ],
)
def test_a_graph_of_another_signature(sick: FakeTrt, tmp_path: Path, changed: Any, said: str) -> None:
    manifest = Manifest.read(tmp_path / "bundle")
    path = tmp_path / "bundle" / manifest.phases[0].engines["tensorrt-rtx"]
    record = changed(PlanRecord.read(path))
    names = {spec.name for spec in record.outputs}
    replace(record, inputs=tuple(spec for spec in record.inputs if spec.name not in names)).write(path)
    toy.seal(tmp_path / "bundle")
    with (
        pytest.raises(EngineError, match="not of the graph unet/strided_pooled") as caught,
        open_bundle(tmp_path / "bundle") as bundle,
    ):
        bundle.preload()
    assert said in str(caught.value)
    assert not sick.cuda.leaks


def test_an_engine_that_takes_other_tensors_than_its_record_says(tmp_path: Path, sick: FakeTrt) -> None:
    manifest = Manifest.read(tmp_path / "bundle")
    record = PlanRecord.read(tmp_path / "bundle" / manifest.phases[0].engines["tensorrt-rtx"])
    shorter = replace(record, inputs=record.inputs[1:])
    write_plan(tmp_path / "bundle/unet", "strided_pooled", shorter, "strided_pooled")
    replace(record, parts=("strided_pooled.head", "strided_pooled.tail")).write(
        tmp_path / "bundle/unet/strided_pooled.tensorrt-rtx.json"
    )
    toy.seal(tmp_path / "bundle")
    with (
        pytest.raises(EngineError, match="not what its record says") as caught,
        open_bundle(tmp_path / "bundle") as bundle,
    ):
        bundle.preload()
    assert "no input latents float32[2, 4, 6, 8]" in str(caught.value)
    assert not sick.cuda.leaks


def test_a_plan_that_changed_after_it_was_built(
    tmp_path: Path, sick: FakeTrt, capsys: pytest.CaptureFixture[str]
) -> None:
    tail = tmp_path / "bundle/unet/strided_pooled.tail"
    content = bytearray(tail.read_bytes())
    content[-1] ^= 1
    tail.write_bytes(content)
    for verify in ("hash", "size"):
        code, error = failure(tmp_path, capsys, "--verify", verify)
        assert code == BundleError.exit_code
        assert "unet/strided_pooled.tail has changed" in error
    assert "strided_pooled" not in sick.finished


def test_a_record_that_is_none_or_newer(tmp_path: Path, sick: FakeTrt, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(tmp_path, format=FORMAT + 1)
    code, error = failure(tmp_path, capsys)
    assert code == BundleError.exit_code
    assert "pip install --upgrade hidiff-runtime" in error
    (tmp_path / "bundle/unet/strided_pooled.tensorrt-rtx.json").write_text("a plan")
    toy.seal(tmp_path / "bundle")
    code, error = failure(tmp_path, capsys)
    assert code == BundleError.exit_code
    assert "strided_pooled.tensorrt-rtx.json is not whole JSON" in error
    assert "strided_pooled" not in sick.finished


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"weights": 90 << 20}, "0.09 GiB for the engine needed, 0.03 GiB free"),
        ({"scratch": 80 << 20}, "0.08 GiB for activations needed, 0.03 GiB free"),
        ({"surprise": 80 << 20}, "for the engine needed, 0.03 GiB free"),
    ],
    ids=["weights", "activations", "more than was known"],
)
def test_too_little_memory(
    tmp_path: Path, sick: FakeTrt, capsys: pytest.CaptureFixture[str], plan: dict[str, int], said: str
) -> None:
    folder = tmp_path / "bundle"
    record = PlanRecord.read(folder / "unet/strided_pooled.tensorrt-rtx.json")
    write_plan(folder / "unet", "strided_pooled", record, "strided_pooled", **plan)
    toy.seal(folder)
    sick.cuda.memory = 32 << 20
    code, error = failure(tmp_path, capsys)
    assert code == EngineError.exit_code
    assert "too little memory on the GPU" in error
    assert said in error
    assert "resident='current'" in error
    assert not sick.cuda.leaks


@pytest.mark.parametrize("integrated", [False, True])
def test_caches_make_room_where_the_gpu_has_the_hosts_memory(
    tmp_path: Path, sick: FakeTrt, capsys: pytest.CaptureFixture[str], integrated: bool
) -> None:
    sick.cuda.gpus = (Properties(b"NVIDIA GB10", 8, 9, integrated),)
    folder = tmp_path / "bundle"
    record = PlanRecord.read(folder / "unet/strided_pooled.tensorrt-rtx.json")
    write_plan(folder / "unet", "strided_pooled", record, "strided_pooled", weights=90 << 20, scratch=80 << 20)
    toy.seal(folder)
    sick.cuda.caches = sick.cuda.memory - (64 << 20)  # as after comparing the hashes of large files
    code, error = failure(tmp_path, capsys)
    assert code == (0 if integrated else EngineError.exit_code)
    assert ("0.09 GiB for the engine needed, 0.06 GiB free" in error) != integrated


def test_an_engine_that_reads_the_hosts_memory(tmp_path: Path, sick: FakeTrt) -> None:
    folder = tmp_path / "bundle"
    record = PlanRecord.read(folder / "unet/strided_pooled.tensorrt-rtx.json")
    write_plan(folder / "unet", "strided_pooled", record, "strided_pooled", on_host=("timestep",))
    toy.seal(folder)
    with pytest.raises(EngineError, match="wants timestep in the host's memory"), open_bundle(folder) as bundle:
        bundle.preload()
    assert not sick.cuda.leaks


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"no_context": True}, "the kernels do not compile"),
        ({"fails": True}, "Error Code 1: Cask (convolution)"),
    ],
)
def test_what_the_library_says_is_told(
    tmp_path: Path, sick: FakeTrt, capsys: pytest.CaptureFixture[str], plan: dict[str, bool], said: str
) -> None:
    folder = tmp_path / "bundle"
    record = PlanRecord.read(folder / "unet/strided_pooled.tensorrt-rtx.json")
    write_plan(folder / "unet", "strided_pooled", record, "strided_pooled", **plan)
    toy.seal(folder)
    code, error = failure(tmp_path, capsys)
    assert code == EngineError.exit_code
    assert said in error
    assert not sick.cuda.leaks


def test_memory_that_is_gone_when_an_engine_first_runs(sick: FakeTrt, tmp_path: Path) -> None:
    with open_bundle(tmp_path / "bundle") as bundle:
        bundle.preload()
        sick.cuda.memory = sick.cuda.used + 8192  # another program came
        given = {**KIND.given(), "steps": 4, "seed": 0, "guidance_scale": 3.0}
        with pytest.raises(EngineError, match="too little memory"):
            bundle.denoiser().denoise(**given)
        sick.cuda.memory *= 1000
        bundle.denoiser().denoise(**given)
    assert not sick.cuda.leaks
    assert not sick.cuda.misuses


def test_a_plan_that_tensorrt_does_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trt = use(monkeypatch, FakeTrt(FakeCuda(), rtx=False))
    folder = toy.make(tmp_path / "bundle", KIND)
    add_engines(folder, trt)
    head = folder / "unet/strided_pooled.head"
    head.write_bytes(head.read_bytes().replace(b"{", b"[", 1))
    toy.seal(folder)
    code, error = failure(tmp_path, capsys, "--backend", "tensorrt")
    assert code == EngineError.exit_code
    assert "TensorRT cannot load an engine" in error
    assert "Serialization assertion magicTag failed" in error
    assert not trt.cuda.leaks


def test_what_fails_on_leaving_is_told_unless_something_was_told_before(sick: FakeTrt) -> None:
    failing = [cudaError_t.cudaErrorIllegalAddress] * 9
    sick.cuda.fails["cudaStreamSynchronize"] = list(failing)
    with pytest.raises(CudaError, match="CUDA failed"), backends.get("tensorrt-rtx").device({}):
        pass
    assert not sick.cuda.leaks
    sick.cuda.fails["cudaStreamSynchronize"] = list(failing)
    with pytest.raises(ValueError, match="before"), backends.get("tensorrt-rtx").device({}):
        raise ValueError("before")
    assert not sick.cuda.leaks


def test_an_error_on_the_gpu(tmp_path: Path, sick: FakeTrt, capsys: pytest.CaptureFixture[str]) -> None:
    sick.cuda.fails["cudaMemcpyAsync"] = [cudaError_t.cudaSuccess] * 12 + [cudaError_t.cudaErrorIllegalAddress] * 99
    sick.cuda.fails["cudaStreamSynchronize"] = [cudaError_t.cudaErrorIllegalAddress] * 99
    code, error = failure(tmp_path, capsys)
    assert code == EngineError.exit_code
    assert "cudaErrorIllegalAddress" in error
    assert "Start the process again" in error


def test_all_is_given_back_after_an_error_on_the_gpu_and_told_once(tmp_path: Path, sick: FakeTrt) -> None:
    def cancel(_info: StepInfo) -> bool:
        sick.cuda.fails["cudaStreamSynchronize"] = [cudaError_t.cudaErrorIllegalAddress] * 99
        return False

    given = {**KIND.given(), "steps": 4, "seed": 0, "guidance_scale": 3.0}
    with pytest.raises(Cancelled), open_bundle(tmp_path / "bundle") as bundle:
        bundle.denoiser().denoise(**given, callback=cancel)
    assert not sick.cuda.leaks
    bundle = open_bundle(tmp_path / "bundle", preload=True)
    with pytest.raises(CudaError, match="cudaErrorIllegalAddress"):
        bundle.close()
    assert not sick.cuda.leaks
    bundle.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": -1}, "device must be"),
        ({"device": "cuda"}, "device must be"),
        ({"cuda_graph": "maybe"}, "cuda_graph must be"),
        ({"cache": 3}, "cache must be"),
        ({"threads": 3}, "no such option"),
    ],
)
def test_an_option_that_it_cannot_have(tmp_path: Path, sick: FakeTrt, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        open_bundle(tmp_path / "bundle", **options)
    assert not sick.finished
