"""Reading what a bundle holds: regular files alone, and no more of them than is expected.

A pipe would be waited for and a device read without end, so neither is opened.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_of(mode: int) -> str:
    """Returns what a file of this ``st_mode`` is that is not a regular one; nothing for one that is."""
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading; a symbolic link to one counts.

    Raises:
        OSError: there is none, it is of another kind, or it may not be read.
    """
    _refuse_other_kinds(path, os.stat(path).st_mode)  # noqa: PTH116 - before it is opened, which acts on some devices
    stream = open(path, "rb", opener=_open)  # noqa: SIM115 - it has no opener, and is the caller's to close
    try:
        _refuse_other_kinds(path, os.fstat(stream.fileno()).st_mode)
    except BaseException:
        stream.close()
        raise
    return stream


def read_regular(path: Path, most: int) -> bytes:
    """Reads a whole regular file, which may have ``most`` bytes.

    Raises:
        OSError: as `open_regular`, or it is larger.
    """
    with open_regular(path) as stream:
        content = stream.read(most + 1) if os.fstat(stream.fileno()).st_size <= most else None
    if content is None or len(content) > most:
        raise OSError(errno.EFBIG, f"it is larger than the {most} bytes that are read", str(path))
    return content


def _open(path: str, flags: int) -> int:
    """Opens without waiting for a writer, should a pipe be put in the file's place after it was looked at."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _refuse_other_kinds(path: Path, mode: int) -> None:
    if kind := kind_of(mode):
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
