"""The weight store: precision, layout, refusal of broken weights, and failing disks."""

from __future__ import annotations

import resource
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build
from hidiff_export.checkpoints.state_dict import LazyStateDict
from hidiff_export.checkpoints.synthetic import synthesize
from hidiff_export.checkpoints.weight_store import PRECISIONS, WeightStore
from hidiff_export.errors import BundleError, CheckpointError, StorageError
from hidiff_export.families.family import Family, Task, Width, unet_config
from hidiff_export.recipe.field_types import Precision
from hidiff_runtime.format.safetensors import SafetensorsFile, SafetensorsWriter, TensorLayout, write
from tests.export.checkpoints.checkpoint_files import STEM, Arrays, tiny, write_folder

NAME = "weights.safetensors"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "b.weight": (64, 48),
        "a.weight": (32, 16, 3, 3),
        "a.bias": (32,),
        "odd": (3,),
        "scalar": (),
        "none": (0, 4),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensors_come_back_rounded_to_the_precision(tmp_path: Path, precision: Precision) -> None:
    WeightStore.write(tensors(), tmp_path / NAME, precision)
    store = WeightStore.open(tmp_path / NAME)
    assert store.precision is precision
    found = store.state_dict()
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert torch.equal(found[name], tensor.to(PRECISIONS[precision][1]))


def test_a_half_precision_checkpoint_is_widened(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in tensors().items()}
    found = WeightStore.write(half, tmp_path / NAME, Precision.FLOAT32).state_dict()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in half.items())


def test_references_point_at_the_bytes(tmp_path: Path) -> None:
    store = WeightStore.write(tensors(), tmp_path / NAME, Precision.FLOAT16)
    content = (tmp_path / NAME).read_bytes()
    for name, tensor in tensors().items():
        reference = store.reference(name)
        assert reference.shape == tuple(tensor.shape)
        assert content[reference.offset :][: reference.nbytes] == tensor.half().numpy().tobytes()


def test_the_file_depends_on_the_weights_alone(tmp_path: Path) -> None:
    one = WeightStore.write(tensors(), tmp_path / "one", Precision.BFLOAT16)
    other = WeightStore.write(dict(reversed(tensors().items())), tmp_path / "other", Precision.BFLOAT16)
    changed = WeightStore.write({**tensors(), "odd": torch.zeros(3)}, tmp_path / "changed", Precision.BFLOAT16)
    assert one.path.read_bytes() == other.path.read_bytes() != changed.path.read_bytes()


@pytest.mark.parametrize("tag", ["F32", "F16"])
@pytest.mark.parametrize("family", [Family.SD15, Family.SD21, Family.SDXL])
def test_every_tensor_of_a_full_unet_is_aligned_to_64_bytes(tmp_path: Path, family: Family, tag: str) -> None:
    shapes = Component.UNET.shapes(unet_config(family, Task.TEXT_TO_IMAGE, Width.FULL))
    infos = SafetensorsWriter(tmp_path / NAME, {name: TensorLayout(tag, shape) for name, shape in shapes.items()}).infos
    assert all(info.offset % 64 == 0 for info in infos.values())
    at_pages = sum(info.nbytes for info in infos.values() if info.offset % 4096 == 0)
    assert at_pages > 0.999 * sum(info.nbytes for info in infos.values())


def test_the_state_dict_is_mapped_and_the_file_is_never_written_to(tmp_path: Path) -> None:
    store = WeightStore.write(tensors(), tmp_path / NAME, Precision.FLOAT32)
    before = (tmp_path / NAME).read_bytes()
    found = store.state_dict()
    place = found["b.weight"].data_ptr() - store.reference("b.weight").offset
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert any(line.startswith(f"{place:x}-") and line.endswith(NAME) for line in maps)
    found["b.weight"].zero_()
    assert (tmp_path / NAME).read_bytes() == before
    assert torch.equal(store.state_dict()["b.weight"], tensors()["b.weight"])


def test_a_network_built_from_the_store_holds_the_mapped_tensors(tmp_path: Path) -> None:
    config = tiny(Family.SD15)
    found = WeightStore.write(synthesize(Component.UNET, config, 0), tmp_path / NAME, Precision.FLOAT32).state_dict()
    unet = build(Component.UNET, config, found)
    assert {name: tensor.data_ptr() for name, tensor in unet.state_dict().items()} == {
        name: tensor.data_ptr() for name, tensor in found.items()
    }
    assert not unet.training
    assert not any(parameter.requires_grad for parameter in unet.parameters())


def test_memory_is_bounded_by_a_few_tensors(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def make(_: str) -> torch.Tensor:
        nonlocal most
        tensor = torch.zeros(1000)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    names = [f"{index}" for index in range(60)]
    WeightStore.write(LazyStateDict(dict.fromkeys(names, (1000,)), make), tmp_path / NAME, Precision.FLOAT32)
    assert len(alive) == len(names)
    assert most <= 6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, precision: Precision, value: float) -> None:
    broken = tensors()
    broken["a.weight"][3, 2, 1, 0] = value
    with pytest.raises(CheckpointError, match="NaN or an infinity") as caught:
        WeightStore.write(broken, tmp_path / NAME, precision)
    assert "a.weight: 1 of 4608" in str(caught.value)
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_weight_beyond_float16_is_refused_there_alone(tmp_path: Path) -> None:
    large = {**tensors(), "odd": torch.tensor([1.0, -70000.0, 2.0])}
    with pytest.raises(CheckpointError, match="beyond the range of float16") as caught:
        WeightStore.write(large, tmp_path / NAME, Precision.FLOAT16)
    assert "odd: magnitude 70000" in str(caught.value)
    WeightStore.write(large, tmp_path / NAME, Precision.BFLOAT16)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a floating-point number"):
        WeightStore.write({"w": torch.zeros(3, dtype=torch.int8)}, tmp_path / NAME, Precision.FLOAT32)
    write(tmp_path / "ints", {"w": np.zeros(3, np.int8)})
    with pytest.raises(BundleError, match="one floating-point precision"):
        WeightStore.open(tmp_path / "ints")
    write(tmp_path / "mixed", {"v": np.zeros(3, np.float32), "w": np.zeros(3, np.float16)})
    with pytest.raises(BundleError, match="one floating-point precision"):
        WeightStore.open(tmp_path / "mixed")


def test_progress_runs_to_the_end(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    WeightStore.write(tensors(), tmp_path / NAME, Precision.FLOAT32, lambda *call: calls.append(call))
    nbytes = sum(4 * tensor.numel() for tensor in tensors().values())
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert done[-1] == nbytes
    assert {call[1] for call in calls} == {nbytes}


@contextmanager
def limited_files(nbytes: int) -> Iterator[None]:
    """No file may grow beyond this: the kernel answers a write past it as it answers one to a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_leaves_nothing_new(tmp_path: Path) -> None:
    WeightStore.write(tensors(), tmp_path / NAME, Precision.FLOAT16)
    before = (tmp_path / NAME).read_bytes()
    large = {**tensors(), "large": torch.zeros(300_000)}
    with limited_files(1_000_000), pytest.raises(StorageError, match="could not be written") as caught:
        WeightStore.write(large, tmp_path / NAME, Precision.FLOAT32)
    assert caught.value.exit_code == 6
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert (tmp_path / NAME).read_bytes() == before


def test_a_disk_without_room_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(2000, 1000, 1000))

    def make(name: str) -> torch.Tensor:
        raise AssertionError(name)

    with pytest.raises(StorageError, match="no room"):
        WeightStore.write(LazyStateDict({"w": (300,)}, make), tmp_path / NAME, Precision.FLOAT32)


def test_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written to"):
        WeightStore.write(tensors(), tmp_path / "none" / NAME, Precision.FLOAT32)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(name: str) -> torch.Tensor:
    raise RuntimeError(name)


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda path: WeightStore.write(tensors(), path, Precision.FLOAT32, _interrupt), KeyboardInterrupt),
        (lambda path: WeightStore.write(LazyStateDict({"w": (3,)}, _fail), path, Precision.FLOAT32), RuntimeError),
    ],
    ids=["interrupted", "failing tensor"],
)
def test_an_interrupted_writing_leaves_nothing(
    tmp_path: Path, act: Callable[[Path], WeightStore], error: type[BaseException]
) -> None:
    with pytest.raises(error):
        act(tmp_path / NAME)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle in a zip"])
def test_a_damaged_store_is_a_bundle_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(BundleError, match="damaged"):
        WeightStore.open(tmp_path / NAME)


def test_the_safetensors_library_reads_a_store(tmp_path: Path) -> None:
    for precision in PRECISIONS:
        store = WeightStore.write(tensors(), tmp_path / NAME, precision)
        theirs = safetensors.torch.load_file(tmp_path / NAME)
        ours = store.state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_we_read_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    theirs: Arrays = {
        "i": np.arange(5),
        "f": np.ones((2, 3), np.float32),
        "h": np.ones(3, np.float16),
        "b": np.array([True]),
    }
    safetensors.numpy.save_file(theirs, tmp_path / "a", metadata={"format": "np"})
    with SafetensorsFile.open(tmp_path / "a") as file:
        assert file.metadata == {"format": "np"}
        assert all(np.array_equal(file.array(name), theirs[name]) for name in theirs)
    safetensors.torch.save_file({"w": tensors()["odd"].bfloat16()}, tmp_path / "b")
    assert torch.equal(WeightStore.open(tmp_path / "b").state_dict()["w"], tensors()["odd"].bfloat16())


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    arrays: Arrays = {
        "i": np.arange(5),
        "f": np.ones((2, 3), np.float32),
        "e": np.zeros((0, 2)),
        "unicode é": np.array([True]),
    }
    write(tmp_path / "a", arrays, {"key": "value"})
    with safetensors.safe_open(tmp_path / "a", "np") as theirs:
        assert theirs.metadata() == {"key": "value"}
        assert all(np.array_equal(theirs.get_tensor(name), arrays[name]) for name in arrays)


def test_diffusers_reads_a_store(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    config = tiny(Family.SD15)
    write_folder(tmp_path / "unet", {}, config, "UNet2DConditionModel")
    store = WeightStore.write(
        synthesize(Component.UNET, config, 0), tmp_path / "unet" / f"{STEM}.safetensors", Precision.FLOAT32
    )
    theirs = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet").state_dict()
    ours = store.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
