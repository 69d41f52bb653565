"""Reading and writing safetensors files with numpy alone.

A file is eight bytes (the header's length, little endian), a JSON header and the tensors' bytes, which follow the
header with neither gap nor overlap. The rules checked here are those of https://github.com/huggingface/safetensors,
and a file that breaks one is refused whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.errors import BundleError, InputError, StorageError
from hidiff_runtime.format.atomic_write import atomic_write
from hidiff_runtime.format.dtypes import BY_TAG
from hidiff_runtime.format.regular_files import open_regular

HEADER_LIMIT = 4 * 2**20
"""Longest JSON header of a bundle's file in bytes; SDXL's weights have a twentieth of it. Parsed, the worst of this
size takes 110 MB."""

CHECKPOINT_HEADER_LIMIT = 100_000_000
"""Longest JSON header of a file from elsewhere: the reference reader's own limit."""

_MOST_AXES, _LARGEST_ARRAY = 32, 2**63 - 1
"""Axes that every numpy can hold, and bytes that it can count, empty axes left out."""

PAGE = 4096
"""Where the data begins: at a multiple of this, by spaces after the JSON header."""

DTYPES: Mapping[str, np.dtype[Any]] = {
    tag: np.dtype("uint16" if tag == "BF16" else known.name).newbyteorder("<") for tag, known in BY_TAG.items()
}
"""Each dtype tag and the numpy dtype of its array. numpy has no bfloat16: its bits come as uint16, tagged ``BF16``."""

_TAGS = {dtype: tag for tag, dtype in DTYPES.items() if tag != "BF16"}
_SHOWN = 200
"""Characters of a header's own text that a message quotes."""

_ADVICE = "Copy or download the file again."


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's place in a file: dtype tag, shape, and absolute offset and length in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorLayout:
    """A tensor to be written: dtype tag (a key of `DTYPES`) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Length of the data in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class SafetensorsFile:
    """A safetensors file mapped into memory. Use `open`; arrays taken from it stay valid after it is closed."""

    def __init__(
        self, path: Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], data: mmap.mmap
    ) -> None:
        self.path = path
        self.metadata = metadata
        self._infos = infos
        self._data: mmap.mmap | None = data

    @classmethod
    def open(cls, path: str | os.PathLike[str], header_limit: int = HEADER_LIMIT) -> SafetensorsFile:
        """Maps a regular file and checks its header, which may have so many bytes. Raises BundleError when it is
        missing, of another kind, cut short or malformed.
        """
        path = Path(path)
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                header, start = _read_header(file, path, size, header_limit)
                infos, metadata = _parse(header, path, start, size)
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise BundleError(
                "A safetensors file cannot be read.",
                given=f"{path}: {error.strerror or error}",
                advice="Check the path and its permissions.",
            ) from error
        return cls(path, infos, metadata, data)

    def names(self) -> tuple[str, ...]:
        """Returns the tensors' names in the order of their data."""
        return tuple(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Returns where a tensor lies. Raises BundleError for an unknown name."""
        try:
            return self._infos[name]
        except KeyError:
            raise BundleError(
                "A safetensors file lacks a tensor.", given=f"{name!r} in {self.path}", advice="Build the file again."
            ) from None

    def array(self, name: str) -> NDArray[Any]:
        """Returns a tensor as a read-only view of the file, without a copy; bfloat16 as its bits in uint16."""
        info = self.info(name)
        if self._data is None:
            raise ValueError(f"{self.path} is closed")
        dtype = DTYPES[info.dtype]
        if info.nbytes == 0:
            return np.empty(info.shape, dtype)
        return np.frombuffer(self._data, dtype, math.prod(info.shape), info.offset).reshape(info.shape)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Returns every tensor by name, as `array` gives it."""
        return {name: self.array(name) for name in self._infos}

    def close(self) -> None:
        """Gives up the mapping, which ends with the last array taken from it."""
        self._data = None

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)


class SafetensorsWriter:
    """Writes one file tensor by tensor, beside its final name, and renames it when the block ends without an error.

    The bytes depend on nothing but names, dtypes, shapes, values and metadata. Tensors are ordered so that each begins
    at a multiple of 64 bytes (of 4096 when long enough) as far as their lengths allow: the format has no gaps, so
    lengths divisible by a higher power of two come first, and by name among equals.

    Attributes:
        order: the names in the order in which `add` takes them.
        infos: where each tensor lies in the file.
        sha256: the finished file's SHA-256 in hexadecimal; empty until the block has ended.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layouts: Mapping[str, TensorLayout],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.order = tuple(sorted(layouts, key=lambda name: (-_power_of_two(layouts[name].nbytes), name)))
        self.sha256 = ""
        self._header, self.infos = _build_header(layouts, self.order, dict(metadata or {}))
        self._part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._file: BinaryIO
        self._open: ExitStack
        self._hash = hashlib.sha256()
        self._written = 0

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Writes the next tensor of `order`. Raises InputError for another one, StorageError when the disk refuses."""
        if self._written == len(self.order) or name != self.order[self._written]:
            raise InputError("A tensor is written out of order.", given=name, advice="Follow SafetensorsWriter.order.")
        info = self.infos[name]
        if array.shape != info.shape or array.dtype != DTYPES[info.dtype]:
            raise InputError(
                "A tensor differs from the layout it was announced with.",
                given=f"{name}: {array.dtype} {array.shape}, announced {info.dtype} {info.shape}",
            )
        if info.nbytes:
            self._write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._written += 1

    def __enter__(self) -> SafetensorsWriter:
        with ExitStack() as stack:
            try:
                self._file = stack.enter_context(atomic_write(self.path, beside=self._part))
            except OSError as error:
                raise _storage_error(self.path, error) from error
            self._write(self._header)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *failure: Any) -> None:
        if kind is not None:
            self._open.__exit__(kind, *failure)
            return
        try:
            with self._open:
                if self._written != len(self.order):
                    raise InputError("A safetensors file lacks tensors it announced.", given=self.order[self._written])
        except OSError as failure:
            raise _storage_error(self.path, failure) from failure
        self.sha256 = self._hash.hexdigest()

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise _storage_error(self.path, error) from error
        self._hash.update(data)


def write(
    path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> str:
    """Writes arrays under their names, whole or not at all, and returns the file's SHA-256 in hexadecimal.

    The same arrays and metadata give the same bytes in whatever order they come. Raises StorageError when the disk
    refuses, InputError for a dtype the format does not have.
    """
    little = {
        name: np.asarray(array).astype(array.dtype.newbyteorder("<"), copy=False) for name, array in arrays.items()
    }
    layouts = {name: TensorLayout(_tag(name, array.dtype), array.shape) for name, array in little.items()}
    with SafetensorsWriter(path, layouts, metadata) as writer:
        for name in writer.order:
            writer.add(name, little[name])
    return writer.sha256


def _tag(name: str, dtype: np.dtype[Any]) -> str:
    try:
        return _TAGS[dtype]
    except KeyError:
        raise InputError(
            "A tensor's dtype has no place in a safetensors file.",
            given=f"{name}: {dtype}",
            advice=f"Use one of {', '.join(sorted(str(known) for known in _TAGS))}.",
        ) from None


def _power_of_two(nbytes: int) -> int:
    """Returns the highest power of two, up to a page, that divides a length."""
    return math.gcd(nbytes, PAGE)


def _build_header(
    layouts: Mapping[str, TensorLayout], order: tuple[str, ...], metadata: dict[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    begin = 0
    for name in order:
        end = begin + layouts[name].nbytes
        shape = list(layouts[name].shape)
        entries[name] = {"dtype": layouts[name].dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    start = -(-(8 + len(text)) // PAGE) * PAGE
    infos = {}
    offset = start
    for name in order:
        layout = layouts[name]
        infos[name] = TensorInfo(layout.dtype, layout.shape, offset, layout.nbytes)
        offset += layout.nbytes
    return struct.pack("<Q", start - 8) + text.ljust(start - 8), infos


def _read_header(file: BinaryIO, path: Path, size: int, limit: int) -> tuple[dict[str, Any], int]:
    """Returns the parsed JSON header and the absolute offset at which the data begins."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise _malformed(path, f"{size} bytes, too short for a header")
    (length,) = struct.unpack("<Q", prefix)
    if length > limit:
        raise _malformed(path, f"its header claims {length} bytes; the limit is {limit}")
    if 8 + length > size:
        raise _malformed(path, f"cut short inside the header: {size} bytes of at least {8 + length}")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise _malformed(path, "its header is not JSON")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, f"its header is not valid JSON ({str(error)[:_SHOWN]})") from error
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _parse(header: dict[str, Any], path: Path, start: int, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed(path, "its metadata is not a map of strings")
    infos = {name: _parse_entry(name, entry, path, start) for name, entry in header.items()}
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    expected = start
    for name, info in infos.items():
        if info.offset != expected:
            problem = "overlaps the tensor before it" if info.offset < expected else "leaves a gap before it"
            raise _malformed(path, f"{_shown(name)} {problem}")
        expected += info.nbytes
    if expected > size:
        raise _malformed(path, f"cut short: {size} bytes of {expected}")
    if expected < size:
        raise _malformed(path, f"{size - expected} bytes after the last tensor")
    return infos, metadata


def _parse_entry(name: str, entry: object, path: Path, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(path, f"{_shown(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BundleError(
            "A tensor has a dtype that is not supported.",
            given=f"{_shown(name)} is {_shown(dtype)} in {path}",
            advice=f"Convert it to one of {', '.join(DTYPES)}.",
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _malformed(path, f"{_shown(name)} has shape {_shown(shape)} and data_offsets {_shown(offsets)}")
    bytes_each = DTYPES[dtype].itemsize
    if len(shape) > _MOST_AXES or math.prod(max(axis, 1) for axis in shape) * bytes_each > _LARGEST_ARRAY:
        raise _malformed(path, f"{_shown(name)} has {len(shape)} axes, or is larger than any array: {_shown(shape)}")
    layout = TensorLayout(dtype, tuple(shape))
    if offsets[1] - offsets[0] != layout.nbytes:
        found = f"{dtype} {shape} is {layout.nbytes} bytes, data_offsets are {_shown(offsets)}"
        raise _malformed(path, f"{_shown(name)}: {found}")
    return TensorInfo(dtype, layout.shape, start + offsets[0], layout.nbytes)


def _shown(value: object) -> str:
    return repr(value)[:_SHOWN]


def _naturals(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _malformed(path: Path, problem: str) -> BundleError:
    return BundleError("A safetensors file is damaged.", given=f"{path}: {problem}", advice=_ADVICE)


def _storage_error(path: Path, error: OSError) -> StorageError:
    return StorageError(
        "A file could not be written; nothing of it was kept.",
        given=f"{path}: {error.strerror or error}",
        advice="Free space on the disk, or choose a folder that can be written to.",
    )
