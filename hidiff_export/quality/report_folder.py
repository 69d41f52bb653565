"""The folder of a report: it appears whole, and takes the place of an older one alone."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hidiff_export.errors import InputError
from hidiff_export.files import storage_errors


@contextmanager
def report_folder(folder: Path, files: Sequence[str]) -> Iterator[Path]:
    """Yields a folder for a report, which takes the place of ``folder`` once the block ends without an error.

    Args:
        folder: of the finished report.
        files: names of all that a report's folder may hold, the one first that each holds.

    Raises:
        InputError: there is something else than an older report.
        StorageError: the disk refuses.
    """
    folder = folder.absolute()
    if folder.exists() and not _is_report(folder, files):
        raise InputError(
            "There is something else than an older report.",
            given=folder,
            advice="Give -o another folder, or remove it.",
        )
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.", dir=folder.parent))
    try:
        yield unfinished
        with storage_errors(folder):
            unfinished.chmod(0o777 & ~_umask())
            if folder.exists():
                shutil.rmtree(folder)
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_report(folder: Path, files: Sequence[str]) -> bool:
    """Returns whether a folder is empty, or holds a report and nothing else."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() and not folder.is_symlink() else {""}
    return not names or (files[0] in names and names <= set(files))


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask
