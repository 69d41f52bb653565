"""A plan that is stored as several files, read as one piece of memory without copying what is large.

Plans of phases over the same weights end in the same bytes, so a plan may be a small head of its own and a tail that
other plans name too. A library wants it whole. Here the files are mapped next to each other: addresses are reserved for
all of them, the tail is mapped over the end of the reservation, where a page begins, and the head is read in right
before it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from hidiff_runtime.errors import EngineError
from hidiff_runtime.format.codec import REBUILD
from hidiff_runtime.format.regular_files import open_regular

_MAP_FIXED = 0x10
"""The same on Linux (x86-64, arm64), macOS and the BSDs; Python's ``mmap`` does not name it."""

_CAN_PLACE = os.name == "posix" and ctypes.sizeof(ctypes.c_void_p) == 8
"""Whether a file can be mapped at an address of our choice. Windows replaces no part of a reservation."""


def map_parts(paths: Sequence[Path]) -> memoryview:
    """Returns the bytes of a plan's parts one after another, read only, in one piece.

    The last file is mapped, and so are others whose size is a multiple of the page size; what lies before them is read
    into memory. Where the system cannot map a file at a given address everything is read. The files may be removed or
    replaced while the memory is in use, but must not be shortened: check their hashes before.

    Returns:
        bytes; all of it is unmapped when the view and what was made from it are released or no longer referred to.

    Raises:
        EngineError: a part is missing, empty or unreadable, or memory does not suffice.
    """
    with ExitStack() as opened:
        try:
            files = [opened.enter_context(open_regular(path)) for path in paths]
            sizes = [os.fstat(file.fileno()).st_size for file in files]
            for path, size in zip(paths, sizes, strict=True):
                if not size:
                    raise EngineError("A part of an engine is empty.", given=path, advice=REBUILD)
            if len(files) == 1:
                return memoryview(mmap.mmap(files[0].fileno(), 0, access=mmap.ACCESS_READ))
            return _place(files, sizes) if _CAN_PLACE else _read(files, sizes)
        except OSError as error:
            raise EngineError("A part of an engine cannot be read.", given=error, advice=REBUILD) from error


def _place(files: Sequence[BinaryIO], sizes: Sequence[int]) -> memoryview:
    """Maps what begins at a page, the last file above all, and reads the rest in before it."""
    offset = start = -sum(sizes[:-1]) % mmap.PAGESIZE
    space = mmap.mmap(-1, start + sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(space)
    for file, size in zip(files, sizes, strict=True):
        fills_pages = file is files[-1] or size % mmap.PAGESIZE == 0
        if offset % mmap.PAGESIZE == 0 and fills_pages:
            _map_over(space, offset, size, file)
        else:
            _read_into(view[offset : offset + size], file)
        offset += size
    return view[start:].toreadonly()


def _map_over(space: mmap.mmap, offset: int, size: int, file: BinaryIO) -> None:
    """Maps a file over a page-aligned piece of a mapping, which goes on to own it: unmapping one unmaps both."""
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = ctypes.c_void_p
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    address = ctypes.addressof(ctypes.c_char.from_buffer(space, offset))
    placed = call(address, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, file.fileno(), 0)
    if placed != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), file.name)


def _read(files: Sequence[BinaryIO], sizes: Sequence[int]) -> memoryview:
    """Reads everything into memory."""
    view = memoryview(bytearray(sum(sizes)))
    offset = 0
    for file, size in zip(files, sizes, strict=True):
        _read_into(view[offset : offset + size], file)
        offset += size
    return view.toreadonly()


def _read_into(view: memoryview, file: BinaryIO) -> None:
    """Fills ``view`` from the beginning of a file."""
    if file.readinto(view) != len(view):  # type: ignore[attr-defined]  # a buffered reader's
        raise EngineError("A part of an engine ends too soon.", given=file.name, advice=REBUILD)
