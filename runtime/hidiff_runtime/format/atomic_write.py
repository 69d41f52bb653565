"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path, *, beside: Path | None = None, permissions: int = 0o666) -> Iterator[BinaryIO]:
    """Opens a file beside ``path``, and renames it there when the block ends without an error and the disk has it all.

    Where the block or the disk fails, what was written is removed and an older file at ``path`` stays.

    Args:
        path: of the file.
        beside: what is written first, in place of what is left there from a run that was killed; by default a new
            hidden file.
        permissions: of the new file, less those that the process takes away (its umask).

    Raises:
        OSError: the disk refuses.
    """
    # The name may be as long as can be already.
    part = beside or path.with_name(f".{path.name[:32]}.{os.urandom(4).hex()}.part")
    file = open(part, "xb" if beside is None else "wb", opener=lambda name, flags: os.open(name, flags, permissions))  # noqa: SIM115
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        part.replace(path)
    except BaseException:
        with suppress(OSError):  # closing flushes, and the disk that refused the data refuses it again
            file.close()
        part.unlink(missing_ok=True)
        raise
