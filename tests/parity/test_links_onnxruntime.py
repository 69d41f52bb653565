"""ONNX Runtime on bundles whose graphs and weights are symbolic links into a store, and graphs that are led there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import linked
import numpy as np
import onnx
import onnxruntime
import pytest
import toy
from onnx import GraphProto, ModelProto, SparseTensorProto, TensorProto, helper, numpy_helper

from hidiff_runtime import BundleError, EngineError, check
from hidiff_runtime import open as open_bundle
from hidiff_runtime.backends.external_data import relinked
from tests.parity.toy_onnx import make

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("ort") / "bundle", toy.Toy())


@pytest.mark.parametrize("weights", ["packed", "shared"])
@pytest.mark.parametrize("layout", linked.KNOWN)
def test_engines_behind_links_give_the_reference(pristine: Path, tmp_path: Path, layout: str, weights: str) -> None:
    report = check(linked.KNOWN[layout](pristine, tmp_path / "home"), weights=weights)
    assert report.backend == "onnxruntime"
    assert report.ok, report.render()


@pytest.mark.parametrize("layout", ["dvc", "annex"])
def test_onnx_runtime_itself_does_not_open_them(pristine: Path, tmp_path: Path, layout: str) -> None:
    """Else there would be no need to lead graphs to their weights."""
    folder = linked.KNOWN[layout](pristine, tmp_path / "home")
    with pytest.raises(Exception, match="escapes model directory"):
        onnxruntime.InferenceSession(folder / "unet/strided.onnxruntime.onnx")


def test_weights_alone_may_be_links(pristine: Path, tmp_path: Path) -> None:
    """As where the one large file of a bundle lies on another disk."""
    folder = Path(shutil.copytree(pristine, tmp_path / "bundle"))
    (tmp_path / "disk").mkdir()
    shutil.move(folder / "unet/weights.safetensors", tmp_path / "disk/0001")
    (folder / "unet/weights.safetensors").symlink_to(tmp_path / "disk/0001")
    with pytest.raises(BundleError, match="leaves the bundle through a symbolic link"):
        check(folder)
    assert check(folder, allow_links=tmp_path / "disk").ok


def test_the_weights_behind_the_link_are_those_that_count(pristine: Path, tmp_path: Path) -> None:
    """Weights of another content, and a manifest that says so: what is behind the link is read, and no copy."""
    made = Path(shutil.copytree(pristine, tmp_path / "made"))
    weights = made / "unet/weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 0x40
    weights.write_bytes(content)
    toy.seal(made)
    report = check(linked.annex(made, tmp_path / "home"), runs=False)
    assert not report.ok
    assert check(linked.annex(pristine, tmp_path / "own"), runs=False).ok


def external(name: str, location: str = "weights.safetensors", offset: int = 0) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=VALUES.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", VALUES.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def branch(name: str, nodes: Sequence[onnx.NodeProto], initializers: Sequence[TensorProto]) -> GraphProto:
    output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, VALUES.shape)
    return helper.make_graph(nodes, name, [], [output], initializers)


def nested() -> ModelProto:
    """External weights wherever a model may have them: in branches, as attributes, sparse, in functions."""
    then = branch("then", [helper.make_node("Neg", ["inner"], ["then_y"])], [external("inner")])
    constant = helper.make_node("Constant", [], ["else_y"], value=external("value"))
    chosen = helper.make_node("If", ["on"], ["y"], then_branch=then, else_branch=branch("else", [constant], []))
    inputs = [helper.make_tensor_value_info("on", TensorProto.BOOL, [])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, VALUES.shape)]
    own = numpy_helper.from_array(VALUES, "own")
    graph = helper.make_graph([chosen], "nested", inputs, outputs, [external("outer", "./weights.safetensors"), own])
    indices = numpy_helper.from_array(np.arange(3), "indices")
    graph.sparse_initializer.append(SparseTensorProto(values=external("sparse"), indices=indices, dims=[9]))
    opset = helper.make_opsetid("", 20)
    called = helper.make_node("Constant", [], ["f"], value=external("called"))
    function = helper.make_function("own.domain", "Called", [], ["f"], [called], [opset])
    return helper.make_model(graph, opset_imports=[opset], ir_version=10, functions=[function])


def locations(message: onnx.ModelProto) -> Iterator[onnx.StringStringEntryProto]:
    """Every location in a message, wherever it is."""
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        for inner in values if field.type == field.TYPE_MESSAGE else []:
            if field.name == "external_data" and inner.key == "location":
                yield inner
            yield from locations(inner)


def test_every_location_is_led_to_the_file_and_nothing_else_changes(tmp_path: Path) -> None:
    engine, weights = tmp_path / "unet/nested.onnx", tmp_path / "unet/weights.safetensors"
    engine.parent.mkdir()
    model = nested()
    engine.write_bytes(model.SerializeToString())
    target = tmp_path / "store/long" / ("a" * 200)
    target.parent.mkdir(parents=True)
    target.write_bytes(VALUES.tobytes())
    weights.symlink_to(target)
    found = relinked(engine, [weights, tmp_path / "vae/weights.safetensors"])
    assert found is not None
    moved = onnx.load_from_string(found[0])
    assert found[1] == target.parent
    assert [entry.value for entry in locations(moved)] == [target.name] * 5
    for entry in locations(moved):
        entry.value = "weights.safetensors"
    for entry in locations(model):
        entry.value = "weights.safetensors"
    assert moved == model


@pytest.mark.parametrize("on", [True, False])
def test_weights_in_branches_are_read_behind_the_link(tmp_path: Path, on: bool) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "stored").write_bytes(VALUES.tobytes())
    engine, weights = tmp_path / "unet/nested.onnx", tmp_path / "unet/weights.safetensors"
    weights.symlink_to(tmp_path / "stored")
    model = nested()
    del model.functions[:], model.graph.sparse_initializer[:]
    engine.write_bytes(model.SerializeToString())
    found = relinked(engine, [weights])
    assert found is not None
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(found[1]))
    session = onnxruntime.InferenceSession(found[0], options)
    (y,) = session.run(None, {"on": np.array(on)})
    np.testing.assert_array_equal(y, -VALUES if on else VALUES)


def test_a_graph_beside_its_weights_opens_as_it_is(pristine: Path, tmp_path: Path) -> None:
    engine, weights = pristine / "unet/strided.onnxruntime.onnx", pristine / "unet/weights.safetensors"
    assert relinked(engine, [weights]) is None
    assert relinked(engine, []) is None
    mount = linked.config_map(pristine, tmp_path)
    assert relinked(mount / "unet/strided.onnxruntime.onnx", [mount / "unet/weights.safetensors"]) is None


def test_other_files_of_the_store_are_not_reached(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "unet").mkdir()
    for name in ("0001", "of another bundle"):
        (tmp_path / "blobs" / name).write_bytes(VALUES.tobytes())
    engine, weights = tmp_path / "unet/a.onnx", tmp_path / "unet/weights.safetensors"
    weights.symlink_to(tmp_path / "blobs/0001")
    for location in ("of another bundle", "../weights.safetensors", "/etc/hosts", ""):
        model = nested()
        model.graph.initializer.append(external("reaching", location))
        engine.write_bytes(model.SerializeToString())
        with pytest.raises(EngineError, match="not the bundle's"):
            relinked(engine, [weights])


def truncated(content: bytes) -> bytes:
    return content[:-3]


@pytest.mark.parametrize(
    "spoilt",
    [truncated, lambda content: content + b"\x3f", lambda content: content + b"\xff" * 12, lambda _: b"\x3a\xff\xff"],
    ids=["truncated", "no field", "a number without an end", "a field longer than the file"],
)
def test_what_is_no_graph_is_refused(tmp_path: Path, spoilt: Callable[[bytes], bytes]) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "stored").write_bytes(VALUES.tobytes())
    engine, weights = tmp_path / "unet/a.onnx", tmp_path / "unet/weights.safetensors"
    weights.symlink_to(tmp_path / "stored")
    engine.write_bytes(spoilt(nested().SerializeToString()))
    with pytest.raises(EngineError, match=r"cannot be read") as caught:
        relinked(engine, [weights])
    assert str(engine) in str(caught.value)


def test_a_bundle_opens_again_behind_other_links(pristine: Path, tmp_path: Path) -> None:
    """A store that was moved while the bundle was open: the same content at another place."""
    folder = linked.annex(pristine, tmp_path / "home")
    store = tmp_path / "home/.git/annex/objects"
    with open_bundle(folder) as bundle:
        phase = bundle.manifest.phases[0].phase
        bundle.engine(phase)
        bundle.close()
        shutil.move((folder / "unet/weights.safetensors").resolve(), store / "elsewhere")
        linked.relink(folder / "unet/weights.safetensors", store / "elsewhere")
        bundle.engine(phase)
