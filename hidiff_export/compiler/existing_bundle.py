"""A finished bundle that a build replaces: whether there is one, which one it is, and how it is deleted."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from hidiff_export.errors import BundleError, StorageError
from hidiff_runtime.format.manifest import MANIFEST, Manifest


def existing_bundle(folder: Path) -> Manifest | None:
    """Returns the manifest of the bundle in ``folder``; ``None`` where there is no folder or an empty one.

    Raises:
        BundleError: the folder holds something else, or a bundle of a newer format.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / MANIFEST).is_file():
        raise BundleError(
            "The output folder holds files, but no bundle.",
            given=str(folder),
            advice="Give an empty or new folder; nothing in this one was touched.",
        )
    return Manifest.read(folder / MANIFEST)


def digest_of(folder: Path) -> str | None:
    """Returns a bundle's digest; empty for an empty folder, ``?`` for anything else, None where there is nothing."""
    if not os.path.lexists(folder):
        return None
    if folder.is_symlink() or not folder.is_dir():
        return "?"
    if not any(folder.iterdir()):
        return ""
    with suppress(BundleError):
        return Manifest.read(folder).digest
    return "?"


def delete_bundle(bundle: Path) -> None:
    """Deletes a bundle, its manifest last: what is left by a build that is killed here is still known."""
    for entry in bundle.iterdir():
        if entry.name != MANIFEST:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    shutil.rmtree(bundle)


def check_deletable(bundle: Path) -> None:
    """Raises StorageError where a bundle that is to be replaced could not be deleted."""
    for folder, _, _ in os.walk(bundle):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise StorageError(
                "The bundle at the output cannot be deleted, so that no other can take its place.",
                given=f"{folder} cannot be written to",
                advice="Choose another output, or change the folder's permissions.",
            )
