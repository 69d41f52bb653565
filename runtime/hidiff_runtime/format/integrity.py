"""Checks that a bundle's files are those its manifest was written for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hidiff_runtime.errors import BundleError, InputError
from hidiff_runtime.format.bundle_folder import FETCH_LINKED, BundleFolder, is_dangling
from hidiff_runtime.format.manifest import FileDigest
from hidiff_runtime.format.regular_files import kind_of

MODES = ("hash", "size")

State = tuple[int, int, int, int]
"""Of a file: disk, number there, size, and when it was last written; another where its content is another."""


class CheckedFiles:
    """A bundle's files, each compared with the manifest again once its state is another.

    Another bundle may have been put in its place, or a link been led elsewhere, at any time after the opening.

    Args:
        folder: of the bundle.
        files: the manifest's records.
        known: states in which files need no look at their hash.
    """

    def __init__(self, folder: BundleFolder, files: Mapping[str, FileDigest], known: Mapping[str, State]) -> None:
        self._folder = folder
        self._files = files
        self._known = dict(known)

    def file(self, name: str) -> Path:
        """Returns the file ``name``, whose content is what the manifest says.

        Raises:
            BundleError: it is not, or is no file of the bundle.
        """
        if name not in self._files:
            raise BundleError(f"The bundle needs {name}, which is no file of the bundle.", advice="Build it again.")
        path = self._folder.file(name)
        state = state_of(path)
        if state is None or self._known.get(name) != state:
            if fault := mismatch(path, self._files[name]):
                raise BundleError(f"The bundle's {name} {fault}.", advice=_advice([path]))
            if state is not None:
                self._known[name] = state
        return path

    def lost(self, names: Iterable[str]) -> tuple[str, ...]:
        """Returns those of these files that are not there, or not of their size."""
        return tuple(name for name in dict.fromkeys(names) if self._is_lost(name))

    def _is_lost(self, name: str) -> bool:
        try:
            return mismatch(self._folder.file(name), self._files[name], "size") != ""
        except BundleError:  # a link that leads elsewhere now
            return True


def verify_files(folder: BundleFolder, files: Mapping[str, FileDigest], mode: str = "hash") -> None:
    """Compares every file with its record: size and SHA-256, or the size alone.

    Hashing takes one thread per processor; each lets go of the interpreter while it hashes.

    Raises:
        BundleError: a file is missing, changed, or outside the bundle; all of them are named.
        InputError: ``mode`` is neither ``hash`` nor ``size``.
    """
    if mode not in MODES:
        raise InputError(
            "verify must be 'hash' or 'size'.", given=repr(mode), advice="Use 'hash' unless starts must be fast."
        )
    largest_first = sorted(files, key=lambda name: -files[name].size)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        faults = pool.map(lambda name: mismatch(folder.file(name), files[name], mode), largest_first)
        found = {name: fault for name, fault in zip(largest_first, faults, strict=True) if fault}
    if found:
        lines = [f"{name} {fault}" for name, fault in sorted(found.items())]
        more = f"\n         and {len(found) - 8} more" if len(found) > 8 else ""
        raise BundleError(
            "The bundle is broken: its files are not those it was written with.",
            given="\n         ".join(lines[:8]) + more,
            advice=_advice([folder.file(name) for name in found]),
        )


def _advice(broken: list[Path]) -> str:
    """Returns what to do about broken files: links that lead to nothing need no other bundle."""
    return FETCH_LINKED if all(map(is_dangling, broken)) else "Fetch the bundle again, or build it again."


def mismatch(path: Path, record: FileDigest, mode: str = "hash") -> str:
    """Returns what is wrong with the file at ``path``; empty when it is as recorded."""
    try:
        if is_dangling(path):
            return f"is missing: it is a symbolic link to {path.readlink()}, which is not there"
        state = path.stat()
        if kind := kind_of(state.st_mode):
            return f"is {kind}, not a file"
        size = state.st_size
        if size != record.size:
            return f"has {size} bytes instead of {record.size}"
        if mode == "hash" and FileDigest.of(path).sha256 != record.sha256:
            return "has changed: its SHA-256 is not the manifest's"
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:  # a store may be another user's
        return f"cannot be read: {error.strerror}"
    return ""


def state_of(path: Path) -> State | None:
    """Returns the file's state; None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
