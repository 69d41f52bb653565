"""The folder a build writes into: hidden beside its final name, locked, resumable, renamed only when whole.

While a bundle is being built it lives in ``<output>.partial`` with a ``build.json`` that says which stages are
whole. The manifest is written last and the folder renamed in one step, so ``<output>`` either does not exist, is the
bundle that was there before, or is complete.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hidiff_export.errors import BundleError, InputError, StorageError
from hidiff_runtime.manifest import MANIFEST, FileRecord, Manifest

STATE = "build.json"
LOCK = ".lock"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)


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
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside ``path`` and renames it there."""
    beside = path.with_name(f"{path.name}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@dataclass
class StageRecord:
    """What a finished stage left: the key of its inputs, and its files by path relative to the bundle."""

    key: str
    files: dict[str, FileRecord]


class Workspace:
    """A build's folder, held under a lock for as long as the context lasts.

    Args:
        output: where the finished bundle goes.
        force: forget what is half built, and replace a finished bundle.

    Raises:
        BundleError: ``output`` holds something that is not a bundle, or one of a newer format, or (without ``force``)
            a finished bundle.
        StorageError: another build holds the folder, or it cannot be written.
    """

    def __init__(self, output: Path, *, force: bool = False) -> None:
        self.output = output.absolute()
        self.folder = self.output.with_name(f"{self.output.name}.partial")
        self.force = force
        self.stages: dict[str, StageRecord] = {}
        self._replaced = self.output.with_name(f"{self.output.name}.replaced")
        self._lock = FileLock(self.folder / LOCK, timeout=0)

    def __enter__(self) -> Workspace:
        with storage_errors(self.folder):
            self._recover()
            self._refuse_foreign()
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout as error:
                raise StorageError(
                    "Another build is writing this bundle.",
                    given=str(self.folder),
                    advice="Wait for it to end, or build into another folder.",
                ) from error
            try:
                self._begin()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _recover(self) -> None:
        """Gives a bundle its name back when a build was killed between the two renames of `commit`."""
        if self._replaced.exists() and not self.output.exists():
            self._replaced.rename(self.output)

    def _refuse_foreign(self) -> None:
        if self.output.exists() and not self.output.is_dir():
            raise InputError(
                "The output is a file, not a folder.",
                given=str(self.output),
                advice="Give a folder that is not there yet.",
            )
        if existing_bundle(self.output) is not None and not self.force:
            raise BundleError(
                "The output already holds a finished bundle.",
                given=str(self.output),
                advice="Use --force to rebuild it, or another --output.",
            )
        ours = any((self.folder / name).is_file() for name in (STATE, MANIFEST))
        if self.folder.exists() and not ours:
            strangers = [entry.name for entry in self.folder.iterdir() if entry.name != LOCK]
            if strangers:
                raise BundleError(
                    "The folder a build would work in holds files that no build left there.",
                    given=f"{self.folder} ({', '.join(sorted(strangers)[:3])})",
                    advice="Move them away, or build into another folder.",
                )

    def _begin(self) -> None:
        if self.force:
            for entry in self.folder.iterdir():
                if entry.name != LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        state = self.folder / STATE
        if state.is_file():
            try:
                stages = json.loads(state.read_text(encoding="utf-8"))["stages"]
                self.stages = {
                    name: StageRecord(
                        stage["key"], {path: FileRecord(**record) for path, record in stage["files"].items()}
                    )
                    for name, stage in stages.items()
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BundleError(
                    "The record of the interrupted build is damaged.",
                    given=str(state),
                    advice="Run the command again with --force to start over.",
                ) from error
        self._save()

    def whole(self, name: str, key: str) -> bool:
        """Whether stage ``name`` was finished from the same inputs and each of its files is as it was left."""
        record = self.stages.get(name)
        if record is None or record.key != key:
            return False
        return all(
            (self.folder / path).is_file() and FileRecord.of(self.folder / path) == expected
            for path, expected in record.files.items()
        )

    def begin(self, name: str) -> None:
        """Forgets what an earlier attempt at stage ``name`` left, files included."""
        record = self.stages.pop(name, None)
        if record is not None:
            for path in record.files:
                (self.folder / path).unlink(missing_ok=True)
            self._save()

    def finish(self, name: str, key: str, paths: tuple[Path, ...]) -> None:
        """Records that stage ``name`` is whole and wrote ``paths``."""
        files = {path.relative_to(self.folder).as_posix(): FileRecord.of(path) for path in paths}
        self.stages[name] = StageRecord(key, files)
        self._save()

    def files(self) -> dict[str, FileRecord]:
        """Every file that the finished stages wrote."""
        return {path: record for stage in self.stages.values() for path, record in stage.files.items()}

    def commit(self, manifest: Manifest) -> None:
        """Writes the manifest, drops what only the build needed and gives the folder its final name."""
        with storage_errors(self.folder):
            keep = {*manifest.files, MANIFEST}
            write_json(self.folder / MANIFEST, manifest.to_json())
            self._lock.release()
            for path in sorted(self.folder.rglob("*"), reverse=True):
                if path.is_dir():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path.relative_to(self.folder).as_posix() not in keep:
                    path.unlink()
            if self.output.exists():
                self.output.rename(self._replaced)
            self.folder.rename(self.output)
            if self._replaced.exists():
                shutil.rmtree(self._replaced)

    def _save(self) -> None:
        write_json(
            self.folder / STATE,
            {"stages": {name: asdict(record) for name, record in self.stages.items()}},
        )


def existing_bundle(folder: Path) -> Manifest | None:
    """The manifest of the bundle in ``folder``; ``None`` where there is no folder or an empty one.

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
