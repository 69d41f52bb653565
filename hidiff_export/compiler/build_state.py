"""What an interrupted build left: which stages are finished, and whether their files are still as they were left."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hidiff_export.compiler.output_folder import is_plain
from hidiff_export.engines.protocol import Report
from hidiff_export.errors import BundleError
from hidiff_runtime.format.codec import Fields, parse_object
from hidiff_runtime.format.record_codec import LATER, OMITTED, decode, encode
from hidiff_runtime.format.specs import FileDigest, ListedFile

STATE = "build.json"


@dataclass
class StageRecord:
    """What a finished stage left.

    Args:
        key: of its inputs.
        files: by path relative to the bundle.
        notices: what it told, which is told again where a build goes on.
    """

    key: str
    files: dict[str, ListedFile]
    notices: tuple[str, ...] = field(default=(), metadata=LATER)


@dataclass
class BuildState:
    """A build's finished stages.

    Args:
        stages: by name.
        replaces: digest of the bundle that is being replaced; None but for the moment in which it is.
    """

    stages: dict[str, StageRecord] = field(default_factory=dict)
    replaces: str | None = field(default=None, metadata=OMITTED)

    @classmethod
    def read(cls, folder: Path) -> BuildState:
        """Reads ``build.json`` in ``folder``; an empty state where there is none.

        Raises:
            BundleError: it is damaged, or names a file outside the folder.
        """
        path = folder / STATE
        if not os.path.lexists(path):
            return cls()
        try:
            fields = Fields(parse_object(path.read_text(encoding="utf-8"), STATE), STATE)
            return decode(cls, fields)
        except (BundleError, OSError, UnicodeDecodeError) as error:
            summary = error.summary if isinstance(error, BundleError) else str(error)
            raise BundleError(
                "The record of the interrupted build is damaged.",
                given=f"{path}: {summary}",
                advice="Run the command again with --force to start over.",
            ) from error

    def to_json(self) -> dict[str, Any]:
        """Returns what ``build.json`` holds."""
        return encode(self)

    def files(self) -> dict[str, FileDigest]:
        """Returns every file that the finished stages wrote."""
        return {path: record for stage in self.stages.values() for path, record in stage.files.items()}


def faults(folder: Path, files: Mapping[str, FileDigest], report: Report | None = None) -> dict[str, str]:
    """Compares size and SHA-256 of files with their records; what is wrong with each that differs.

    Args:
        folder: that the paths are relative to; files reached through symbolic links are no files of it.
        files: the records, by path.
        report: told of the bytes that were compared.
    """
    total, done = sum(record.size for record in files.values()), 0
    found: dict[str, str] = {}
    root = Path(os.path.realpath(folder))
    largest_first = sorted(files, key=lambda name: -files[name].size)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        compared = pool.map(lambda name: _fault(root, name, files[name]), largest_first)
        for name, fault in zip(largest_first, compared, strict=True):
            if fault:
                found[name] = fault
            done += files[name].size
            if report is not None:
                report(done, total, name)
    return found


def _fault(root: Path, name: str, record: FileDigest) -> str:
    path = root / name
    try:
        if os.path.realpath(path) != str(path):
            return "is reached through a symbolic link"
        if not is_plain(path):
            return "is no plain file"
        if path.stat().st_size != record.size:
            return f"has {path.stat().st_size} bytes instead of {record.size}"
        return "" if FileDigest.of(path) == record else "has another content"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
