"""The folder a build writes into: beside its final name, locked, resumable, renamed only when whole.

While a bundle is being built it lives in ``<output>.partial`` with a ``build.json`` that says which stages are
whole. At the end every file is compared with what its stage left, the manifest is written and the folder renamed in
one step, so ``<output>`` either does not exist, is the bundle that was there before, or is complete. ``build.json`` and
the lock go last: a build that is killed at any moment goes on, or is found to be finished.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hidiff_export.compiler.build_state import STATE, BuildState, StageRecord, faults
from hidiff_export.compiler.existing_bundle import check_deletable, delete_bundle, digest_of, existing_bundle
from hidiff_export.compiler.output_folder import is_plain, make_parents, output_folder, try_renaming
from hidiff_export.engines.protocol import Report
from hidiff_export.errors import BundleError, InputError, StorageError
from hidiff_export.files import storage_errors, write_json
from hidiff_runtime.format.manifest import MANIFEST, Contents, FileDigest, Manifest

__all__ = ["STATE", "FilesChanged", "Workspace"]

FOLDERS = frozenset(
    ("unet", "controlnet", "text_encoder", "text_encoder_2", "vae", "step", "samplers", "scheduler", "reference")
)
"""Those that the stages of a build write into."""

_OLD_LOCK = ".lock"
"""In the working folder of versions that kept their lock there."""

_OWN = frozenset(name for own in (STATE, MANIFEST) for name in (own, f"{own}.tmp")) | {_OLD_LOCK}
"""What lies beside those folders while a build goes on."""

_HALF = (".tmp", ".part")
"""End the names of half-written files."""

_SCRATCH = (*_HALF, ".built")
"""End the names of what builds write for themselves."""

_SHOWN = 3
_PARTIAL, _REPLACED, _LOCK = ".partial", ".replaced", ".partial.lock"


class FilesChanged(StorageError):  # noqa: N818 - names the outcome
    """Files of finished stages are not as those left them.

    Attributes:
        stages: names of the stages.
    """

    def __init__(self, stages: Iterable[str], found: Mapping[str, str]) -> None:
        self.stages = frozenset(stages)
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        super().__init__(
            "Files of finished stages were changed while the build went on.",
            given="; ".join(f"{name} {fault}" for name, fault in sorted(found.items())[:_SHOWN]) + more,
            advice="Find out what changes them, then run the same command again; what is whole is kept.",
        )


class Workspace:
    """A build's folder, held under a lock for as long as the context lasts.

    Args:
        output: where the finished bundle goes; a symbolic link stays, and the bundle goes where it leads to.
        force: forget what is half built, and replace a finished bundle.
        resume: with ``force``, forget only what is half built under a damaged record.

    Raises:
        BundleError: ``output`` holds something that is not a bundle, or one of a newer format, or (without ``force``)
            a finished bundle; or the folder it would be built in holds what no build left there.
        InputError: ``output`` can never become a bundle, see `hidiff_export.compiler.output_folder`.
        StorageError: another build holds the folder, or it cannot be written.
    """

    def __init__(self, output: Path, *, force: bool = False, resume: bool = False) -> None:
        self.output = output_folder(output, (_PARTIAL, _REPLACED, _LOCK))
        self.folder = _beside(self.output, _PARTIAL)
        self.force = force
        self.resume = resume
        self._replaced = _beside(self.output, _REPLACED)
        self._lock_file = _beside(self.output, _LOCK)
        self._lock = FileLock(self._lock_file, timeout=0)
        self._state = BuildState()

    def __enter__(self) -> Workspace:
        self.check()
        with storage_errors(self.folder):
            self._take_lock()
            try:
                self._recover()
                self._check()
                self._begin()
            except BaseException:
                self._let_go()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def check(self) -> None:
        """Looks at the output and at what an earlier build left, and writes nothing. Raises what entering does."""
        with storage_errors(self.folder):
            ending = os.path.lexists(self.output / STATE) or _marked(self.folder) is not None
            if not ending:  # else an earlier build has to be brought to its end first, which takes the lock
                self._check()

    def _take_lock(self) -> None:
        if os.path.lexists(self._lock_file) and not (is_plain(self._lock_file) and not self._lock_file.stat().st_size):
            raise _in_the_way(self._lock_file)
        make_parents(self.output)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise StorageError(
                "Another build is writing this bundle.",
                given=str(self.folder),
                advice="Wait for it to end, or build into another folder.",
            ) from error

    def _let_go(self) -> None:
        if self._lock.is_locked:
            with suppress(OSError):
                self._lock_file.unlink()  # before the release: who has opened it by now finds it unlinked, and waits
            self._lock.release()

    def _recover(self) -> None:
        """Brings to its end what a build began that was killed between the renames of `commit` or after them."""
        if (old := _marked(self.folder)) is not None:
            if not self.output.exists() and digest_of(self._replaced) == old:
                self._replaced.rename(self.output)
            self._state = BuildState.read(self.folder)
            self._mark(None)
        if _is_state(self.output):
            self._end(_marked(self.output))

    def _end(self, old: str | None) -> None:
        """Deletes what a bundle that has its name replaced, and then the record of its build."""
        if old is not None and digest_of(self._replaced) in (old, ""):
            try:
                delete_bundle(self._replaced)
            except OSError as error:
                raise StorageError(
                    "The new bundle is in its place, but the old one could not be deleted.",
                    given=f"{error.filename or self._replaced}: {error.strerror}",
                    advice=f"Delete {self._replaced} and {self.output / STATE}.",
                ) from error
        (self.output / STATE).unlink()

    def _check(self) -> None:
        """Refuses what is there and is not a build's."""
        finished = existing_bundle(self.output)
        if finished is not None and not self.force:
            raise BundleError(
                "The output already holds a finished bundle.",
                given=str(self.output),
                advice="Use --force to rebuild it, or another --output.",
            )
        if finished is not None:
            check_deletable(self.output)
            if digest_of(self._replaced) not in (None, ""):
                raise _in_the_way(self._replaced)
        self._refuse_strangers()

    def _refuse_strangers(self) -> None:
        """Refuses a working folder in which there is what no build leaves."""
        if not os.path.lexists(self.folder):
            return
        if self.folder.is_symlink() or not self.folder.is_dir():
            raise _in_the_way(self.folder)
        known = set(_OWN)
        if any((self.folder / name).is_file() for name in (STATE, MANIFEST)):
            known |= {*FOLDERS, *self._recorded()}
        found = {path.relative_to(self.folder) for path in _entries(self.folder)}
        strangers = [
            name
            for name in sorted(path.as_posix() for path in found)
            if not is_plain(self.folder / name) or not (name in known or name.partition("/")[0] in known - {name})
        ]
        if strangers:
            raise BundleError(
                "The folder a build would work in holds files that no build left there.",
                given=f"{self.folder} ({', '.join(strangers[:_SHOWN])})",
                advice="Move them away, or build into another folder.",
            )

    def _recorded(self) -> Iterable[str]:
        """Returns the files of the interrupted build's finished stages; none of a damaged record under ``force``."""
        try:
            return BuildState.read(self.folder).files()
        except BundleError:
            if self.force:
                return ()
            raise

    def _begin(self) -> None:
        starts_over = self._starts_over()
        self._state = BuildState() if starts_over else BuildState.read(self.folder)
        if self.output.exists():
            self._try_replacing()
        self.folder.mkdir(exist_ok=True)
        self._save()  # first: a build that is killed here leaves a folder that is known as a build's
        if starts_over:
            for entry in self.folder.iterdir():
                if entry.name != STATE:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for path in list(_entries(self.folder)):
            if path.name.endswith(_HALF):
                path.unlink()

    def _starts_over(self) -> bool:
        """Returns whether what is half built is forgotten."""
        if not (self.force and self.resume):
            return self.force
        try:
            BuildState.read(self.folder)
        except BundleError:
            return True
        return False

    def _try_replacing(self) -> None:
        """Renames what is at the output for a moment, as `commit` will have to, so that a refusal comes now."""
        if (old := digest_of(self.output)) == "":
            if not os.path.lexists(self._replaced):
                try_renaming(self.output, self._replaced)
            return
        self.folder.mkdir(exist_ok=True)
        self._mark(old)
        try_renaming(self.output, self._replaced)
        self._mark(None)

    def is_complete(self, name: str, key: str) -> bool:
        """Returns whether stage ``name`` was finished from the same inputs and each of its files is as it was left."""
        record = self._state.stages.get(name)
        return record is not None and record.key == key and not faults(self.folder, record.files)

    def begin(self, name: str) -> None:
        """Forgets what an earlier attempt at stage ``name`` left, files included."""
        record = self._state.stages.pop(name, None)
        if record is not None:
            self._save()  # first: a record without its files is as good as none, files without a record are left over
            for path in record.files:
                (self.folder / path).unlink(missing_ok=True)

    def forget_all_but(self, names: Collection[str]) -> None:
        """Forgets stages of another build, whose files would be listed with this one's."""
        for name in self._state.stages.keys() - names:
            self.begin(name)

    def notices(self, name: str) -> tuple[str, ...]:
        """Returns what stage ``name`` told when it was finished."""
        return self._state.stages[name].notices

    def finish(self, name: str, key: str, paths: tuple[Path, ...], notices: Sequence[str] = ()) -> None:
        """Records that stage ``name`` is whole, wrote ``paths`` and told ``notices``."""
        files = {path.relative_to(self.folder).as_posix(): FileDigest.of(path) for path in paths}
        self._state.stages[name] = StageRecord(key, files, tuple(notices))
        self._save()

    def files(self) -> dict[str, FileDigest]:
        """Returns every file that the finished stages wrote."""
        return self._state.files()

    def compare(self, report: Report | None = None) -> None:
        """Compares size and SHA-256 of every file with what its stage left.

        Args:
            report: told of the bytes that were compared.

        Raises:
            FilesChanged: a file is gone or another.
        """
        if found := faults(self.folder, self.files(), report):
            raise FilesChanged(
                (name for name, stage in self._state.stages.items() if not found.keys().isdisjoint(stage.files)), found
            )

    def commit(
        self, assemble: Callable[[Mapping[str, FileDigest]], Contents | Manifest], report: Report | None = None
    ) -> tuple[str, ...]:
        """Compares all files, writes the manifest, and gives the folder its final name.

        What only the build needed goes, and so does what killed builds left; the latter is returned.

        Args:
            assemble: makes the manifest of the files.
            report: told of the bytes that were compared.

        Raises:
            BundleError: meanwhile the output became something that is not to be replaced.
            FilesChanged: a file is not as its stage left it; nothing was renamed.
            StorageError: the disk refuses.
        """
        with storage_errors(self.folder):
            self.compare(report)
            contents = assemble(self.files())
            write_json(self.folder / MANIFEST, contents.to_json())
            self._check()
            removed = self._clean({*contents.files, MANIFEST, STATE})
            old = digest_of(self.output) or None
            if old is not None:
                self._mark(old)
                self.output.rename(self._replaced)
            self.folder.rename(self.output)
            self._end(old)
        return removed

    def _clean(self, keep: set[str]) -> tuple[str, ...]:
        """Deletes files that are not to be kept, and empty folders; the names of those that no build needs."""
        removed = []
        for path in sorted(self.folder.rglob("*"), reverse=True):
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif name not in keep:
                path.unlink()
                if name not in _OWN and not name.endswith(_SCRATCH):
                    removed.append(name)
        return tuple(reversed(removed))

    def _mark(self, old: str | None) -> None:
        """Writes down that the bundle of the digest ``old`` is being renamed, or that none is."""
        self._state.replaces = old
        self._save()

    def _save(self) -> None:
        write_json(self.folder / STATE, self._state.to_json())


def _beside(output: Path, suffix: str) -> Path:
    return output.with_name(f"{output.name}{suffix}")


def _entries(folder: Path) -> Iterator[Path]:
    """Yields every file below a folder, and every link, which is not followed."""
    for above, folders, files in os.walk(folder):
        yield from (Path(above, name) for name in files)
        yield from (path for name in folders if (path := Path(above, name)).is_symlink())


def _is_state(folder: Path) -> bool:
    """Returns whether there is a build's record in a folder."""
    with suppress(BundleError):
        return os.path.lexists(folder / STATE) and BuildState.read(folder) is not None
    return False


def _marked(folder: Path) -> str | None:
    """Returns the digest of the bundle that the build of ``folder`` was replacing, if it says that it was."""
    with suppress(BundleError):
        return BuildState.read(folder).replaces
    return None


def _in_the_way(path: Path) -> InputError:
    return InputError(
        "A name that the build needs beside the output is taken.",
        given=path,
        advice="If it is left of an older build, delete it; else rename it or choose another output.",
    )
