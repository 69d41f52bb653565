"""Model repositories of toy bundles: what Triton reads of them, where the bundle's files are, what is refused."""

from __future__ import annotations

import difflib
import io
import json
from dataclasses import fields, replace
from pathlib import Path

import linked
import pytest
import toy
import toy_pictures
import toy_sizes
from google.protobuf import text_format
from PIL import Image
from toy_reference import record
from tritonclient.grpc import model_config_pb2 as pb

import hidiff_runtime
from hidiff_export.errors import BundleError, InputError
from hidiff_export.triton.model_config import InstancePlacement, Queue
from hidiff_export.triton.repository import BUNDLE, RepositoryPlan, replacing, write
from hidiff_runtime.format.manifest import MANIFEST, Manifest
from hidiff_runtime.pipeline.request_fields import FIELDS
from hidiff_runtime.pipeline.request_values import Limits
from hidiff_runtime.serving.triton.model_parameters import Parameters

FRONT, STREAM = "hidiff", "hidiff_stream"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("toy") / "bundle", toy.Toy())


def made(folder: Path, kind: toy.Toy) -> Path:
    """A bundle with reference samples."""
    toy_pictures.make(folder, kind)
    record(folder, kind)
    return folder


def config(repository: Path, model: str) -> pb.ModelConfig:
    """A model's configuration as Triton reads it."""
    return text_format.Parse((repository / model / "config.pbtxt").read_text("utf-8"), pb.ModelConfig())


def parameters(found: pb.ModelConfig) -> dict[str, str]:
    return {name: value.string_value for name, value in found.parameters.items()}


def entries(folder: Path) -> list[str]:
    """What is in a folder, whatever it is called."""
    return sorted(entry.name for entry in folder.iterdir())


def test_triton_understands_both_configurations(bundle: Path, tmp_path: Path) -> None:
    written = write(bundle, tmp_path / "models", RepositoryPlan())
    assert written.models == (FRONT, STREAM)
    assert entries(tmp_path / "models") == [FRONT, STREAM]
    for model in written.models:
        found = config(tmp_path / "models", model)
        assert found.name == model
        assert found.backend == "python"
        assert found.max_batch_size == 8
        inputs = {tensor.name: tensor for tensor in found.input}
        assert list(inputs) == [*(field.name for field in FIELDS), "output", "previews"]
        assert [name for name, tensor in inputs.items() if not tensor.optional] == ["prompt"]
        assert inputs["seed"].data_type == pb.TYPE_INT64
        assert inputs["strength"].data_type == pb.TYPE_FP64
        assert inputs["image"].data_type == pb.TYPE_STRING
        assert inputs["resize"].data_type == pb.TYPE_BOOL
        outputs = {tensor.name: list(tensor.dims) for tensor in found.output}
        assert outputs["pixels"] == [1, toy_pictures.HEIGHT, toy_pictures.WIDTH, 3]
        assert found.dynamic_batching.preferred_batch_size == [1]
        assert parameters(found)["bundle_hash"] == Manifest.read(bundle).digest == written.bundle
    assert config(tmp_path / "models", STREAM).model_transaction_policy.decoupled
    assert not config(tmp_path / "models", FRONT).model_transaction_policy.decoupled
    assert parameters(config(tmp_path / "models", FRONT))["stream"] == STREAM


def test_the_check_sees_what_triton_would_not_understand(bundle: Path, tmp_path: Path) -> None:
    write(bundle, tmp_path / "models", RepositoryPlan())
    file = tmp_path / "models" / STREAM / "config.pbtxt"
    file.write_text(file.read_text().replace("max_queue_size", "most_in_queue"))
    with pytest.raises(text_format.ParseError, match="most_in_queue"):
        config(tmp_path / "models", STREAM)


def test_queues_and_limits_are_what_the_plan_says(bundle: Path, tmp_path: Path) -> None:
    limits = Limits(prompt_characters=10, image_bytes=20, image_pixels=30, steps=40, pictures=2)
    plan = RepositoryPlan(
        queue=Queue(3, 1.5), limits=limits, options={"threads": 2, "resident": "all", "prefetch": True}
    )
    write(bundle, tmp_path / "models", plan)
    for model in (FRONT, STREAM):
        policy = config(tmp_path / "models", model).dynamic_batching.default_queue_policy
        assert policy.max_queue_size == 3
        assert policy.default_timeout_microseconds == 1_500_000
        assert policy.timeout_action == pb.ModelQueuePolicy.REJECT
        assert policy.allow_timeout_override
    given = parameters(config(tmp_path / "models", STREAM))
    as_triton_tells = {"parameters": {name: {"string_value": value} for name, value in given.items()}}
    assert Parameters.read(as_triton_tells) == Parameters(BUNDLE, Manifest.read(bundle).digest, limits, plan.options)
    assert {f"max_{field.name}" for field in fields(Limits)} < given.keys()


@pytest.mark.parametrize(("batches", "at_once"), [((), "2"), ((2, 4), "8"), ((64,), "16")], ids=str)
def test_requests_are_joined_where_the_plan_says(tmp_path: Path, batches: tuple[int, ...], at_once: str) -> None:
    bundle = made(tmp_path / "bundle", toy.Toy())
    for batch in batches:
        toy_sizes.add_batch(bundle, toy.Toy(), batch)
    usual = write(bundle, tmp_path / "usual", RepositoryPlan()).folder
    joined = write(bundle, tmp_path / "joined", RepositoryPlan(dynamic_batching=True)).folder
    assert changed(usual, joined, FRONT) == [
        f'+ parameters {{ key: "at_once" value: {{ string_value: "{at_once}" }} }}'
    ]
    assert changed(usual, joined, STREAM) == [
        "-   preferred_batch_size: [ 1 ]",
        "+   preferred_batch_size: [ 8 ]",
        '+ parameters { key: "dynamic_batching" value: { string_value: "true" } }',
    ]
    assert config(joined, STREAM).dynamic_batching.preferred_batch_size == [8]
    assert config(joined, FRONT).dynamic_batching.preferred_batch_size == [1]


@pytest.mark.parametrize(
    ("size", "gpus", "at_once"),
    [(64, (), "8"), (3, (), "3"), (1, (), "1"), (9, (0, 1), "4"), (1, (0, 1), "1")],
    ids=str,
)
def test_the_front_asks_for_no_more_than_may_wait(
    tmp_path: Path, size: int, gpus: tuple[int, ...], at_once: str
) -> None:
    bundle = toy_sizes.add_batch(made(tmp_path / "bundle", toy.Toy()), toy.Toy(), 4)
    plan = RepositoryPlan(queue=Queue(size), places=InstancePlacement(gpus), dynamic_batching=True)
    write(bundle, tmp_path / "models", plan)
    assert parameters(config(tmp_path / "models", FRONT))["at_once"] == at_once


def changed(one: Path, other: Path, model: str) -> list[str]:
    """The lines in which a model's configurations differ."""
    texts = ((folder / model / "config.pbtxt").read_text("utf-8").splitlines() for folder in (one, other))
    return [line for line in difflib.ndiff(*texts) if line[0] in "+-"]


@pytest.mark.parametrize("layout", linked.KNOWN)
@pytest.mark.parametrize("way", ["link", "copy"])
def test_a_repository_of_a_bundle_of_links_has_the_files_themselves(
    bundle: Path, tmp_path: Path, layout: str, way: str
) -> None:
    source = linked.KNOWN[layout](bundle, tmp_path / "home")
    written = write(source, tmp_path / "models", RepositoryPlan(bundle=way))
    own = tmp_path / "models" / STREAM / "1" / BUNDLE
    assert written.linked == (way == "link")
    assert not [path for path in own.rglob("*") if path.is_symlink()]
    with hidiff_runtime.open(own, backend=toy_pictures.Backend()) as opened:
        assert opened.manifest == Manifest.read(bundle)
    assert (own / MANIFEST).samefile(source / MANIFEST) == (way == "link")


def test_a_bundle_of_links_is_refused_unless_their_folder_is_allowed(bundle: Path, tmp_path: Path) -> None:
    source = linked.elsewhere(bundle, tmp_path)
    with pytest.raises(BundleError, match="consists of symbolic links that lead out"):
        write(source, tmp_path / "models", RepositoryPlan())
    allowed = (str(tmp_path / "store"),)
    write(source, tmp_path / "models", RepositoryPlan(allow_links=allowed))
    assert "allow_links" not in parameters(config(tmp_path / "models", STREAM))
    write(source, tmp_path / "thin", RepositoryPlan(allow_links=allowed, bundle="/mnt/bundle"))
    assert json.loads(parameters(config(tmp_path / "thin", STREAM))["allow_links"]) == list(allowed)


def test_instances_are_one_on_each_gpu_and_as_many_in_front(bundle: Path, tmp_path: Path) -> None:
    write(bundle, tmp_path / "gpus", RepositoryPlan(places=InstancePlacement((0, 2))))
    (group,) = config(tmp_path / "gpus", STREAM).instance_group
    assert (group.kind, group.count, list(group.gpus)) == (pb.ModelInstanceGroup.KIND_GPU, 1, [0, 2])
    (group,) = config(tmp_path / "gpus", FRONT).instance_group
    assert (group.kind, group.count) == (pb.ModelInstanceGroup.KIND_CPU, 2)
    write(bundle, tmp_path / "cpu", RepositoryPlan())
    for model in (FRONT, STREAM):
        (group,) = config(tmp_path / "cpu", model).instance_group
        assert (group.kind, group.count) == (pb.ModelInstanceGroup.KIND_CPU, 1)


@pytest.mark.parametrize(
    ("kind", "pictures"),
    [(toy.Toy(), []), (toy.Toy(inpainting=True), ["image", "mask"]), (toy.Toy(control=True), ["control_image"])],
    ids=["text", "inpainting", "control"],
)
def test_the_warm_up_request_has_a_file_for_each_of_its_inputs(
    kind: toy.Toy, pictures: list[str], tmp_path: Path
) -> None:
    bundle = made(tmp_path / "bundle", kind)
    write(bundle, tmp_path / "models", RepositoryPlan())
    (warm_up,) = config(tmp_path / "models", STREAM).model_warmup
    folder = tmp_path / "models" / STREAM / "warmup"
    assert sorted(warm_up.inputs) == sorted(["prompt", "steps", *pictures]) == entries(folder)
    assert all(given.input_data_file == name for name, given in warm_up.inputs.items())
    steps = int.from_bytes((folder / "steps").read_bytes(), "little")
    assert steps == Manifest.read(bundle).steps[0]
    for name in pictures:
        content = (folder / name).read_bytes()
        assert int.from_bytes(content[:4], "little") == len(content) - 4
        with Image.open(io.BytesIO(content[4:])) as picture:
            assert picture.size == (toy_pictures.WIDTH, toy_pictures.HEIGHT)


def test_links_share_the_bundles_files_and_copies_do_not(bundle: Path, tmp_path: Path) -> None:
    linked = write(bundle, tmp_path / "linked", RepositoryPlan())
    copied = write(bundle, tmp_path / "copied", RepositoryPlan(bundle="copy"))
    assert linked.linked is True
    assert copied.linked is False
    size = sum(record.size for record in Manifest.read(bundle).files.values())
    assert linked.bytes + size < copied.bytes
    for path in (MANIFEST, *Manifest.read(bundle).files):
        one, other = (tmp_path / name / STREAM / "1" / BUNDLE / path for name in ("linked", "copied"))
        assert one.samefile(bundle / path)
        assert not other.samefile(bundle / path)
        assert other.read_bytes() == (bundle / path).read_bytes()


def test_a_bundle_elsewhere_stays_there(bundle: Path, tmp_path: Path) -> None:
    place = '/mnt/a "good" place/é'
    written = write(bundle, tmp_path / "models", RepositoryPlan(bundle=place))
    assert written.linked is None
    assert parameters(config(tmp_path / "models", STREAM))["bundle"] == place
    assert entries(tmp_path / "models" / STREAM / "1") == ["model.py"]
    with pytest.raises(InputError, match="absolute"):
        RepositoryPlan(bundle="mnt/bundle")


def test_a_repository_is_replaced_only_by_force(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "models"
    write(bundle, output, RepositoryPlan(name="one"))
    with pytest.raises(InputError, match="already"):
        write(bundle, output, RepositoryPlan(name="two"))
    assert entries(output) == ["one", "one_stream"]
    write(bundle, output, RepositoryPlan(name="two"), force=True)
    assert entries(output) == ["two", "two_stream"]
    assert entries(tmp_path) == ["models"]


def test_a_folder_that_is_no_repository_is_never_replaced(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("mine")
    refusals = {"home": "no model repository", "home/letters.txt": "is a file", "home/letters.txt/in": "below a file"}
    for name, refusal in refusals.items():
        with pytest.raises(InputError, match=refusal):
            write(bundle, tmp_path / name, RepositoryPlan(), force=True)
    assert (tmp_path / "home" / "letters.txt").read_text() == "mine"
    write(bundle, tmp_path / "models", RepositoryPlan())  # a folder that is there and empty is as good as none
    (tmp_path / "empty").mkdir()
    write(bundle, tmp_path / "empty", RepositoryPlan())
    assert entries(tmp_path / "empty") == [FRONT, STREAM]


def test_a_repository_goes_where_a_link_leads(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "models").symlink_to(tmp_path / "disk" / "models")
    for name in ("one", "two"):
        write(bundle, tmp_path / "models", RepositoryPlan(name=name), force=True)
        assert entries(tmp_path / "disk" / "models") == [name, f"{name}_stream"]
    assert (tmp_path / "models").is_symlink()
    assert entries(tmp_path / "disk") == ["models"]


def test_a_folder_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def put(folder: Path) -> None:
        (folder / "models").mkdir()
        (folder / "models" / "letters.txt").write_text("mine")

    with pytest.raises(InputError, match="no model repository"), replacing(tmp_path / "models", force=True):
        put(tmp_path)
    assert (tmp_path / "models" / "letters.txt").read_text() == "mine"
    assert entries(tmp_path) == ["models"]


def test_nothing_is_left_of_a_repository_that_failed(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "models"
    write(bundle, output, RepositoryPlan(name="before"))
    with pytest.raises(FileExistsError), replacing(output, force=True) as folder:
        [(folder / "half").mkdir() for _ in range(2)]
    assert entries(tmp_path) == ["models"]
    assert entries(output) == ["before", "before_stream"]


def test_a_bundle_that_lacks_a_file_is_refused(bundle: Path, tmp_path: Path) -> None:
    write(bundle, tmp_path / "in", RepositoryPlan(bundle="copy"))
    broken = tmp_path / "in" / STREAM / "1" / BUNDLE
    (broken / next(iter(Manifest.read(broken).files))).unlink()
    with pytest.raises(BundleError, match="is broken"):
        write(broken, tmp_path / "models", RepositoryPlan())
    assert entries(tmp_path) == ["in"]


def test_a_bundle_that_no_server_could_prove_is_refused(bundle: Path, tmp_path: Path) -> None:
    write(bundle, tmp_path / "in", RepositoryPlan(bundle="copy"))
    bare = tmp_path / "in" / STREAM / "1" / BUNDLE
    toy.seal(bare, replace(Manifest.read(bare), reference=None))
    with pytest.raises(BundleError, match="no reference samples"):
        write(bare, tmp_path / "models", RepositoryPlan())
    toy.seal(bare, replace(Manifest.read(bundle), steps=(8,)))
    with pytest.raises(InputError, match="within the limit"):
        write(bare, tmp_path / "models", RepositoryPlan(limits=Limits(steps=7)))
    with pytest.raises(BundleError):
        write(tmp_path, tmp_path / "models", RepositoryPlan())
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("name", ["", "a b", "../up", "1st", "x" * 65])
def test_names_that_are_no_models_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="no name"):
        RepositoryPlan(name=name)
