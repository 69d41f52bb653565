"""A repository with a model for each engine: what is written, what it costs, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from hidiff_export.cli import main
from hidiff_export.deploy import per_phase
from hidiff_export.deploy.per_phase import PerPhase, write_per_phase
from hidiff_export.errors import BundleError, InputError
from hidiff_export.triton.model_config import InstancePlacement
from hidiff_export.triton.repository import RepositoryPlan
from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord
from hidiff_runtime.format.manifest import MANIFEST, FileDigest, GraphRecord, Manifest

ENGINES = {"hidiff_strided", "hidiff_windowed", "hidiff_text_encoder", "hidiff_vae_decoder", "hidiff_vae_encoder"}
GPUS = RepositoryPlan(places=InstancePlacement((0, 1)))


@pytest.fixture(scope="module")
def found(sd15_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> PerPhase:
    return write_per_phase(sd15_bundle, tmp_path_factory.mktemp("per-phase") / "models", GPUS)


def config(repository: Path, model: str) -> ModelConfig:
    """As Triton reads it; an unknown field or a wrong value raises."""
    return text_format.Parse((repository / model / "config.pbtxt").read_text(encoding="utf-8"), ModelConfig())


def with_plans(bundle: Path, into: Path, backend: str, phases: tuple[str, ...] = ()) -> Path:
    """A copy of a bundle that has, instead of its engines, plans of no content.

    Args:
        phases: of one plan for all of them; left out, each has its own.
    """
    shutil.copytree(bundle, into)
    manifest = Manifest.read(into)

    def planned(record: GraphRecord) -> GraphRecord:
        path = Path(record.graph).with_suffix(f".{backend}.json")
        if phases:
            path = Path(f"unet/merged.{backend}.json")
        content = f"plan of {path}".encode()
        (into / path).with_suffix(".plan").write_bytes(content)
        parts = ((into / path).with_suffix(".plan").name,)
        selectors = tuple(f"is_{phase}" for phase in phases[1:])
        specs = record.inputs, record.outputs
        PlanRecord(backend, "10.13.0.35", ("sm90",), None, parts, phases, selectors, *specs).write(into / path)
        return replace(record, engines={backend: path.as_posix()})

    assert manifest.vae is not None
    manifest = replace(
        manifest,
        phases=tuple(planned(record) for record in manifest.phases),
        text_encoders=tuple(planned(record) for record in manifest.text_encoders),
        vae=replace(manifest.vae, decoder=planned(manifest.vae.decoder), encoder=planned(manifest.vae.encoder)),
        step=None,
    )
    paths = [path for path in into.rglob("*") if path.is_file() and path.name != MANIFEST]
    files = {path.relative_to(into).as_posix(): FileDigest.of(path) for path in paths}
    (into / MANIFEST).write_text(json.dumps(replace(manifest, files=files).to_json()))
    return into


def test_every_engine_is_a_model_of_its_own(found: PerPhase, sd15_bundle: Path) -> None:
    folder = found.written.folder
    assert set(found.engines) == ENGINES
    assert {path.name for path in folder.iterdir()} == ENGINES | {"hidiff", "hidiff_stream", "hidiff_start"}
    for phase in ("strided", "windowed"):
        assert (folder / f"hidiff_{phase}/1/model.onnx").samefile(sd15_bundle / f"unet/{phase}.onnxruntime.onnx")
        assert (folder / f"hidiff_{phase}/1/weights.safetensors").samefile(sd15_bundle / "unet/weights.safetensors")


def test_triton_reads_static_shapes_without_batches_and_without_delay(found: PerPhase, sd15_bundle: Path) -> None:
    manifest = Manifest.read(sd15_bundle)
    for record in manifest.phases:
        read = config(found.written.folder, f"hidiff_{record.phase.name}")
        assert (read.platform, read.max_batch_size) == ("onnxruntime_onnx", 0)
        assert not read.HasField("dynamic_batching")
        for specs, tensors in ((record.inputs, read.input), (record.outputs, read.output)):
            assert [(spec.name, spec.shape) for spec in specs] == [(one.name, tuple(one.dims)) for one in tensors]
        shifts = next(tensor for tensor in read.input if tensor.name == "window_shifts")
        assert read.input[0].data_type != shifts.data_type


def test_each_gpu_has_an_instance_with_the_runtime_s_own_options(found: PerPhase) -> None:
    read = config(found.written.folder, "hidiff_windowed")
    assert (list(read.instance_group[0].gpus), read.instance_group[0].kind) == ([0, 1], ModelInstanceGroup.KIND_GPU)
    (cuda,) = read.optimization.execution_accelerators.gpu_execution_accelerator
    assert (cuda.name, cuda.parameters["use_tf32"]) == ("cuda", "0")


def test_the_pipeline_is_on_the_cpu_as_often_as_there_are_gpus(found: PerPhase) -> None:
    read = config(found.written.folder, "hidiff_stream")
    assert (read.instance_group[0].kind, read.instance_group[0].count) == (ModelInstanceGroup.KIND_CPU, 2)
    assert read.parameters["engines"].string_value == "onnxruntime"
    assert read.model_warmup


def test_the_start_model_loads_the_pipeline_and_then_its_front(found: PerPhase) -> None:
    read = config(found.written.folder, "hidiff_start")
    assert read.parameters["loads"].string_value == "hidiff_stream,hidiff"
    assert read.model_warmup[0].inputs["ping"].zero_data
    options = found.options("secret")
    assert "--load-model=hidiff_start" in options
    assert not {"--load-model=hidiff", "--load-model=hidiff_stream"} & set(options)
    assert {option for option in options if "restricted" in option} == {
        "--http-restricted-api=model-repository:hidiff=secret",
        "--grpc-restricted-protocol=model-repository:hidiff=secret",
    }


def test_the_pipeline_s_bundle_is_thin(found: PerPhase, sd15_bundle: Path) -> None:
    folder = found.written.folder / "hidiff_stream/1/bundle"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {MANIFEST, *Manifest.read(sd15_bundle).thin_files()}
    assert not any(name.endswith((".onnx", "weights.safetensors")) for name in names)
    assert Manifest.read(folder).digest == found.written.bundle


def test_says_how_much_memory_the_copies_of_the_weights_take(found: PerPhase, sd15_bundle: Path) -> None:
    stores = Manifest.read(sd15_bundle).weights
    unet = (sd15_bundle / stores["unet"]).stat().st_size
    assert 0.99 * unet < found.engines["hidiff_strided"].weights < unet
    assert found.weights == sum((sd15_bundle / path).stat().st_size for path in stores.values())
    assert 1.8 * found.weights < found.copies < 2 * found.weights
    assert found.written.linked
    assert found.written.bytes < unet


def test_the_command_tells_what_the_copies_cost_and_how_to_start(sd15_bundle: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["triton", str(sd15_bundle), "-o", str(tmp_path / "m"), "--layout", "per-phase"])
    assert done.exit_code == 0, done.output
    assert "a copy for each model" in done.output
    assert "linked, so they take no room" in done.output
    assert "--load-model=hidiff_start" in done.output


def test_plans_are_for_the_tensorrt_that_built_them(sd15_bundle: Path, tmp_path: Path) -> None:
    found = write_per_phase(with_plans(sd15_bundle, tmp_path / "bundle", "tensorrt"), tmp_path / "models", GPUS)
    assert found.needs == ("TensorRT 10.13.0.35 on sm90",)
    read = config(found.written.folder, "hidiff_strided")
    assert read.platform == "tensorrt_plan"
    assert not read.optimization.execution_accelerators.gpu_execution_accelerator
    assert (found.written.folder / "hidiff_strided/1/model.plan").read_text() == "plan of unet/strided.tensorrt.json"


def test_triton_has_no_platform_for_tensorrt_rtx(sd15_bundle: Path, tmp_path: Path) -> None:
    bundle = with_plans(sd15_bundle, tmp_path / "bundle", "tensorrt-rtx")
    with pytest.raises(InputError, match="no platform") as caught:
        write_per_phase(bundle, tmp_path / "models", RepositoryPlan())
    assert "--layout pipeline" in caught.value.advice
    assert not (tmp_path / "models").exists()


def test_a_merged_plan_is_refused(sd15_bundle: Path, tmp_path: Path) -> None:
    bundle = with_plans(sd15_bundle, tmp_path / "bundle", "tensorrt", ("strided", "windowed"))
    with pytest.raises(InputError, match="One plan holds all phases"):
        write_per_phase(bundle, tmp_path / "models", RepositoryPlan())
    assert not (tmp_path / "models").exists()


def test_a_broken_engine_is_refused_here_since_the_server_has_no_hash_of_it(sd15_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(sd15_bundle, tmp_path / "bundle")
    engine = tmp_path / "bundle/unet/strided.onnxruntime.onnx"
    engine.write_bytes(engine.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="broken"):
        write_per_phase(tmp_path / "bundle", tmp_path / "models", RepositoryPlan())


def test_an_engine_that_changes_while_the_repository_is_written_is_found_at_the_end(
    sd15_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = with_plans(sd15_bundle, tmp_path / "own", "tensorrt")
    plan = next(own.rglob("*.plan"))
    take = per_phase.take_bundle

    def change_and_take(*rest: Any, **options: Any) -> bool:
        plan.write_bytes(plan.read_bytes()[::-1])
        return take(*rest, **options)

    monkeypatch.setattr(per_phase, "take_bundle", change_and_take)
    with pytest.raises(BundleError, match=f"{plan.name} has changed"):
        write_per_phase(own, tmp_path / "models", RepositoryPlan())
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (RepositoryPlan(bundle="/mnt/bundle"), "cannot stay elsewhere"),
        (RepositoryPlan(options={"threads": 2}), "options of a backend mean nothing"),
        (RepositoryPlan(options={"backend": "tensorrt"}), "no engines of this backend"),
    ],
    ids=["bundle elsewhere", "option", "backend"],
)
def test_what_only_the_other_layout_can_do_is_refused(
    sd15_bundle: Path, tmp_path: Path, plan: RepositoryPlan, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_per_phase(sd15_bundle, tmp_path / "models", plan)
