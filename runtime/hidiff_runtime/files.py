"""Checks that a bundle's files are those its manifest was written for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hidiff_runtime.errors import BundleError, InputError
from hidiff_runtime.manifest import FileRecord
from hidiff_runtime.paths import inside

MODES = ("hash", "size")

State = tuple[int, int, int, int]
"""Of a file: disk, number there, size, and when it was last written; another where its content is another."""


def verify_files(root: Path, files: Mapping[str, FileRecord], mode: str = "hash") -> None:
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
    largest_first = sorted(files, key=lambda path: -files[path].size)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        faults = pool.map(lambda path: fault_of(inside(root, path), files[path], mode), largest_first)
        found = [f"{path} {fault}" for path, fault in zip(largest_first, faults, strict=True) if fault]
    if found:
        more = f"\n         and {len(found) - 8} more" if len(found) > 8 else ""
        raise BundleError(
            "The bundle is broken: its files are not those it was written with.",
            given="\n         ".join(sorted(found)[:8]) + more,
            advice="Fetch the bundle again, or build it again.",
        )


def fault_of(path: Path, record: FileRecord, mode: str = "hash") -> str:
    """What is wrong with the file at ``path``; empty when it is as recorded."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != record.size:
        return f"has {size} bytes instead of {record.size}"
    if mode == "hash" and FileRecord.of(path).sha256 != record.sha256:
        return "has changed: its SHA-256 is not the manifest's"
    return ""


def state_of(path: Path) -> State | None:
    """The file's state; None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
