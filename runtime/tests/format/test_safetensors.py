"""The numpy safetensors reader and writer: round trips, layout rules, and every way a file can be broken."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hidiff_runtime.errors import BundleError, InputError, StorageError
from hidiff_runtime.format.safetensors import HEADER_LIMIT, SafetensorsFile, SafetensorsWriter, TensorLayout, write

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with any header text or JSON value at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def sample() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "float64": rng.standard_normal((3, 5)),
        "float32": rng.standard_normal((4, 8, 2)).astype(np.float32),
        "float16": rng.standard_normal(7).astype(np.float16),
        "int8": np.arange(-3, 4, dtype=np.int8),
        "int64": np.array([2**62, -1]),
        "uint16": np.arange(9, dtype=np.uint16),
        "bool": np.array([True, False, True]),
        "scalar": np.float32(3.5).reshape(()),
        "empty": np.zeros((0, 4), np.float32),
        "unicode é": np.ones((64, 64), np.float32),
    }


def test_round_trip_keeps_values_shapes_dtypes_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, sample(), {"format": "1"})
    with SafetensorsFile.open(path) as file:
        assert file.metadata == {"format": "1"}
        assert set(file.names()) == set(sample())
        for name, array in sample().items():
            found = file.array(name)
            assert found.dtype == array.dtype
            assert found.shape == array.shape
            np.testing.assert_array_equal(found, array)
            assert array.size == 0 or not found.flags.writeable


def test_info_gives_the_absolute_place_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, sample())
    content = path.read_bytes()
    with SafetensorsFile.open(path) as file:
        for name, array in sample().items():
            info = file.info(name)
            assert content[info.offset : info.offset + info.nbytes] == array.tobytes()


def test_bytes_depend_on_content_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    digest = write(first, sample(), {"x": "1", "y": "2"})
    write(second, dict(reversed(sample().items())), {"y": "2", "x": "1"})
    assert first.read_bytes() == second.read_bytes()
    assert digest == hashlib.sha256(first.read_bytes()).hexdigest()


def test_big_endian_and_strided_arrays_are_stored_as_their_values(tmp_path: Path) -> None:
    path = tmp_path / "a"
    array = np.arange(12, dtype=">f4").reshape(3, 4)
    write(path, {"big": array, "strided": array.T[::2]})
    with SafetensorsFile.open(path) as file:
        np.testing.assert_array_equal(file.array("big"), array)
        np.testing.assert_array_equal(file.array("strided"), array.T[::2])


def test_long_tensors_begin_at_pages_and_others_at_cache_lines(tmp_path: Path) -> None:
    path = tmp_path / "a"
    lengths = [1024, 16, 4, 2048, 48, 1, 4096, 32]
    write(path, {f"{index}": np.zeros(length, np.float32) for index, length in enumerate(lengths)})
    with SafetensorsFile.open(path) as file:
        offsets = {lengths[int(name)]: file.info(name).offset for name in file.names()}
    assert all(offsets[length] % 4096 == 0 for length in (1024, 2048, 4096))
    assert all(offsets[length] % 64 == 0 for length in (16, 32, 48))


def test_bfloat16_comes_as_tagged_bits(tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0xC000], np.uint16)
    with SafetensorsWriter(tmp_path / "a", {"w": TensorLayout("BF16", (2,))}) as writer:
        writer.add("w", bits)
    with SafetensorsFile.open(tmp_path / "a") as file:
        assert file.info("w").dtype == "BF16"
        np.testing.assert_array_equal(file.array("w"), bits)


def test_arrays_outlive_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a", {"w": np.arange(4.0)})
    with SafetensorsFile.open(tmp_path / "a") as file:
        array = file.array("w")
    np.testing.assert_array_equal(array, np.arange(4.0))
    with pytest.raises(ValueError, match="closed"):
        file.array("w")


def test_an_unknown_name_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a", {"w": np.arange(4.0)})
    with SafetensorsFile.open(tmp_path / "a") as file, pytest.raises(BundleError, match="lacks a tensor"):
        file.info("v")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "not JSON"),
        (b"[1]", b"", "not JSON"),
        (b"{", b"", "not valid JSON"),
        (b"{\xff}", b"", "not valid JSON"),
        (b'{"a":' * 100_000, b"", "not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        ({"w": 3}, b"", "not described by"),
        ({"w": {**ENTRY, "stride": 1}}, bytes(8), "not described by"),
        ({"w": {**ENTRY, "dtype": "F4"}}, bytes(8), "not supported"),
        ({"w": {**ENTRY, "dtype": ["F32"]}}, bytes(8), "not supported"),
        ({"w": {**ENTRY, "shape": [-2]}}, bytes(8), "has shape"),
        ({"w": {**ENTRY, "shape": [True, 2]}}, bytes(8), "has shape"),
        ({"w": {**ENTRY, "shape": 2}}, bytes(8), "has shape"),
        ({"w": {**ENTRY, "data_offsets": [0]}}, bytes(8), "has shape"),
        ({"w": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8), "is 8 bytes"),
        ({"w": {**ENTRY, "shape": [2**62, 2**62]}}, bytes(8), "larger than any array"),
        ({"w": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16), "leaves a gap"),
        ({"v": ENTRY, "w": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12), "overlaps"),
        ({"w": ENTRY}, bytes(7), "cut short"),
        ({"w": ENTRY}, bytes(9), "1 bytes after"),
        ({"w": {**ENTRY, "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, bytes(8), "cut short"),
        ({"w": {"dtype": "F32", "shape": [0] * 33, "data_offsets": [0, 0]}}, b"", "has 33 axes"),
        ({"w": {"dtype": "F32", "shape": [9] * 100_000, "data_offsets": [0, 0]}}, b"", "has 100000 axes"),
        ({"w": {"dtype": "F32", "shape": [0, 2**62, 4], "data_offsets": [0, 0]}}, b"", "larger than any array"),
        ({"w": {"dtype": "F32", "shape": [2**63], "data_offsets": [0, 4]}}, bytes(4), "larger than any array"),
        ({"w": {**ENTRY, "data_offsets": [0, 2**63]}}, bytes(8), "is 8 bytes, data_offsets are"),
        ({"__metadata__": {"a": 1}, "w": ENTRY}, bytes(8), "metadata"),
        ({"__metadata__": "a"}, b"", "metadata"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = raw(tmp_path / "a", header, data)
    with pytest.raises(BundleError) as caught:
        SafetensorsFile.open(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_malformed_cases_differ_from_a_good_file_only_in_the_fault(tmp_path: Path) -> None:
    with SafetensorsFile.open(raw(tmp_path / "a", {"w": ENTRY}, bytes(8))) as file:
        assert file.array("w").tolist() == [0, 0]


@pytest.mark.parametrize("length", range(0, 4100, 205))
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a"
    write(path, {"w": np.arange(4.0)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BundleError, match="damaged"):
        SafetensorsFile.open(path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", HEADER_LIMIT + 1))
        file.truncate(HEADER_LIMIT + 100)
    with pytest.raises(BundleError, match="damaged") as caught:
        SafetensorsFile.open(path)
    assert str(HEADER_LIMIT) in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(BundleError, match="cannot be read"):
            SafetensorsFile.open(path)


def test_a_failing_disk_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write(path, {"w": np.zeros(4)})
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="could not be written") as caught:
        write(path, {"w": np.ones(4)})
    assert "No space left" in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def on_full_disk(path: str, flags: int, *mode: int) -> int:
        os.close(opened(path, flags, *mode))
        return opened("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(os, "open", on_full_disk)
    with pytest.raises(StorageError, match="could not be written"):
        write(tmp_path / "a", {"w": np.ones(100_000)})
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="could not be written"):
        write(tmp_path / "file" / "a", {"w": np.ones(4)})


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with SafetensorsWriter(tmp_path / "a", {"w": TensorLayout("F32", (2,))}) as writer:
            writer.add("w", np.zeros(2, np.float32))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    layouts = {"v": TensorLayout("F32", (2,)), "w": TensorLayout("F32", (2,))}
    good = np.zeros(2, np.float32)
    with pytest.raises(InputError, match="out of order"), SafetensorsWriter(tmp_path / "a", layouts) as writer:
        writer.add("w", good)
    with pytest.raises(InputError, match="differs"), SafetensorsWriter(tmp_path / "a", layouts) as writer:
        writer.add("v", np.zeros(3, np.float32))
    with pytest.raises(InputError, match="lacks"), SafetensorsWriter(tmp_path / "a", layouts) as writer:
        writer.add("v", good)
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_the_format_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dtype"):
        write(tmp_path / "a", {"w": np.zeros(2, np.complex64)})


def test_arrays_of_any_shape_that_a_header_may_state_are_given(tmp_path: Path) -> None:
    shapes = ([1] * 32, [0, 2**60], [3, 0])
    entries = {
        f"{place}": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4] if place == 0 else [4, 4]}
        for place, shape in enumerate(shapes)
    }
    text = json.dumps(entries).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with SafetensorsFile.open(tmp_path / "a") as file:
        assert [list(array.shape) for array in file.arrays().values()] == [list(shape) for shape in shapes]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    with pytest.raises(BundleError, match="cannot be read") as caught:
        SafetensorsFile.open(tmp_path / "a")
    assert "it is a named pipe" in str(caught.value)
