"""Writing files whole, and what the operating system says where it refuses to."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hidiff_export.errors import StorageError
from hidiff_runtime.format.atomic_write import atomic_write

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_UNFIT = (errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals to write into a `StorageError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StorageError(
                f"The disk filled up while writing {path}.",
                given=error.strerror,
                advice="Free some room and run the same command again; finished stages are kept.",
            ) from error
        if error.errno in _NO_ACCESS:
            raise StorageError(
                f"Cannot write in {path}.", given=error.strerror, advice="Choose a folder that you may write to."
            ) from error
        if error.errno in _UNFIT:
            raise StorageError(
                f"The system refuses what has to be done in {path}.",
                given=f"{error.filename}: {error.strerror}",
                advice="Run the same command again; choose a folder on another disk if it comes back.",
            ) from error
        raise


def temporary(path: Path) -> Path:
    """Returns the name that a file is written under first; a resumed build removes what a killed one left there."""
    return path.with_name(f"{path.name}.tmp")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside ``path`` and renames it there."""
    with atomic_write(path, beside=temporary(path)) as file:
        file.write(f"{json.dumps(value, indent=1, sort_keys=True)}\n".encode())
