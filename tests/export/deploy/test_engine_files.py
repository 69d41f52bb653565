"""An engine's files in a folder of their own: complete, without taking room, and refused where that cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from hidiff_export.deploy.engine_files import take_onnx, take_plan
from hidiff_export.errors import BundleError, InputError
from hidiff_export.triton.repository_files import take_file
from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord
from hidiff_runtime.format.manifest import TensorSpec

WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4)
X, Y = TensorSpec("x", (2, 3), "float32"), TensorSpec("y", (2, 4), "float32")


def graph(path: Path, location: str = "weights.bin") -> Path:
    """``y = x @ w + x @ w``, with ``w`` at byte 16 of another file, named by two initialisers; writes both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / location).write_bytes(bytes(16) + WEIGHTS.tobytes() + bytes(1000))

    def weight(name: str) -> onnx.TensorProto:
        made = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=WEIGHTS.shape)
        made.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", 16), ("length", WEIGHTS.nbytes)):
            made.external_data.add(key=key, value=str(value))
        return made

    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["a"]),
        onnx.helper.make_node("MatMul", ["x", "v"], ["b"]),
        onnx.helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    inputs, outputs = (
        [onnx.helper.make_tensor_value_info(spec.name, onnx.TensorProto.FLOAT, spec.shape)] for spec in (X, Y)
    )
    made = onnx.helper.make_graph(nodes, "g", inputs, outputs, [weight("w"), weight("v")])
    onnx.save(onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def plan(folder: Path, parts: dict[str, bytes], phases: tuple[str, ...] = ("strided",)) -> Path:
    """A plan's record and its parts."""
    for name, content in parts.items():
        (folder / name).write_bytes(content)
    selectors = tuple(f"is_{phase}" for phase in phases[1:])
    record = PlanRecord("tensorrt", "10.13.0.35", ("sm90",), None, tuple(parts), phases, selectors, (X,), (Y,))
    record.write(folder / "strided.tensorrt.json")
    return folder / "strided.tensorrt.json"


@pytest.fixture
def version(tmp_path: Path) -> Path:
    folder = tmp_path / "model/1"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("link", [True, False])
def test_a_graph_computes_the_same_from_a_folder_of_its_own(tmp_path: Path, version: Path, link: bool) -> None:
    engine = graph(tmp_path / "bundle/strided.onnx")
    take_onnx(engine, version, link=link)
    x = np.ones(X.shape, np.float32)
    (y,) = onnxruntime.InferenceSession(version / "model.onnx").run(None, {"x": x})
    assert np.array_equal(y, 2 * (x @ WEIGHTS))
    assert (version / "weights.bin").samefile(engine.with_name("weights.bin")) == link


def test_weights_are_counted_once_however_often_they_are_named(tmp_path: Path, version: Path) -> None:
    assert take_onnx(graph(tmp_path / "bundle/strided.onnx"), version, link=True).weights == WEIGHTS.nbytes


def test_weights_in_a_folder_stay_in_that_folder(tmp_path: Path, version: Path) -> None:
    (tmp_path / "bundle/deep").mkdir(parents=True)
    take_onnx(graph(tmp_path / "bundle/strided.onnx", "deep/weights.bin"), version, link=True)
    onnxruntime.InferenceSession(version / "model.onnx")


def test_weights_outside_the_graph_s_folder_are_refused(tmp_path: Path, version: Path) -> None:
    engine = graph(tmp_path / "bundle/unet/strided.onnx", "../weights.bin")
    with pytest.raises(BundleError, match="lie elsewhere"):
        take_onnx(engine, version, link=True)


def test_files_that_no_manifest_vouches_for_are_not_taken(tmp_path: Path, version: Path) -> None:
    """Beside a graph or a plan's record there may lie a link to anything on this machine."""
    secret = tmp_path / "secret"
    secret.write_bytes(WEIGHTS.tobytes())
    engine = graph(tmp_path / "bundle/strided.onnx")
    weights = engine.with_name("weights.bin")
    weights.unlink()
    weights.symlink_to(secret)
    with pytest.raises(BundleError, match="names a file that is not the bundle's"):
        take_onnx(engine, version, link=True, files={engine})
    assert list(version.glob("weights*")) == []
    take_onnx(engine, tmp_path / "model", link=False, files={engine, weights})

    record = plan(tmp_path, {"a.head": b"head", "a.tail": b"tail"})
    with pytest.raises(BundleError, match="names a file that is not the bundle's"):
        take_plan(record, version, link=True, files={record, record.with_name("a.head")})
    assert list(version.glob("model.plan")) == []


def test_what_is_no_graph_is_refused(tmp_path: Path, version: Path) -> None:
    engine = tmp_path / "strided.onnx"
    engine.write_bytes(b"no graph")
    with pytest.raises(BundleError, match="not a readable graph"):
        take_onnx(engine, version, link=True)


def test_a_plan_in_parts_is_put_together(tmp_path: Path, version: Path) -> None:
    parts = {"strided.head": b"head" * 5, "shared-1.tail": b"tail" * 9, "strided.head-2": b"end"}
    files = take_plan(plan(tmp_path, parts), version, link=True)
    assert (version / "model.plan").read_bytes() == b"".join(parts.values())
    assert files.weights == sum(map(len, parts.values()))
    assert files.needs == "TensorRT 10.13.0.35 on sm90"


def test_a_plan_in_one_piece_takes_no_room(tmp_path: Path, version: Path) -> None:
    take_plan(plan(tmp_path, {"strided.plan": b"whole"}), version, link=True)
    assert (version / "model.plan").samefile(tmp_path / "strided.plan")


def test_a_plan_of_several_phases_is_refused(tmp_path: Path, version: Path) -> None:
    with pytest.raises(InputError, match="One plan holds all phases"):
        take_plan(plan(tmp_path, {"all.plan": b"whole"}, ("strided", "windowed")), version, link=True)


def test_where_no_link_can_be_made_a_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: Path, _target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    (tmp_path / "a").write_bytes(b"content")
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert not take_file(tmp_path / "a", tmp_path / "b", link=True)
    assert (tmp_path / "b").read_bytes() == b"content"
