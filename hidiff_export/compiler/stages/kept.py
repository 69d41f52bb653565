"""The files of a finished bundle, as they are: what sizes that come and go leave alone."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from hidiff_export.compiler.stages.stage import Report, Stage, StageContext
from hidiff_export.errors import BundleError
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.format.integrity import verify_files
from hidiff_runtime.format.manifest import Contents

_FICLONE = 0x40049409
"""Linux's request to share a file's blocks until one of two is written to."""


class KeptBundle(Stage):
    """A bundle's files, linked where the disk can and copied where it cannot.

    Args:
        folder: of the bundle.
        digest: that it had when it was decided what is kept.
        contents: which of its files are kept.
    """

    name = "kept"
    title = "what stays"
    needs = ()

    def __init__(self, folder: BundleFolder, digest: str, contents: Contents) -> None:
        self.folder = folder
        self.digest = digest
        self.contents = contents

    def inputs(self, context: StageContext) -> Any:  # noqa: ARG002 - the protocol's signature
        """Returns the files by their content.

        Raises:
            BundleError: the bundle is another by now: somebody changed it before the build had its lock, or since.
        """
        if self.folder.manifest().digest != self.digest:
            raise BundleError(
                "The bundle was changed meanwhile.", given=self.folder.root, advice="Run the same command again."
            )
        return {name: record.sha256 for name, record in self.contents.files.items()}

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Links file after file, then compares each with the manifest.

        Raises:
            BundleError: a file is another.
        """
        files = self.contents.files
        # ONNX itself, by which ModelOpt reads a UNet to quantize it, takes no weights from a file with two names.
        copied = {self.contents.shared.weights["unet"]} if context.recipe.precision.quantized else set()
        for index, name in enumerate(files):
            report(index, len(files), name)
            path = context.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            give = _copy if name in copied else _link
            give(self.folder.file(name).resolve(), path)
        verify_files(BundleFolder(context.folder), files)
        return tuple(context.folder / name for name in files)


def _link(source: Path, path: Path) -> None:
    """Gives a file a second name; a copy on disks that have none."""
    try:
        os.link(source, path)
    except OSError:
        _copy(source, path)


def _copy(source: Path, path: Path) -> None:
    """Copies a file, on disks that can (Btrfs, XFS) without its blocks."""
    with source.open("rb") as old, path.open("xb") as new:
        if not _cloned(old, new):
            shutil.copyfileobj(old, new, 1 << 24)


def _cloned(old: BinaryIO, new: BinaryIO) -> bool:
    """Lets two files share their blocks; returns whether they do."""
    if sys.platform != "linux":
        return False
    import fcntl

    with suppress(OSError):
        fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        return True
    return False
