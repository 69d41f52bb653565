"""A bundle's folder: the one place that decides which file a path in it stands for, and where links may lead.

A bundle is data from anywhere, so a link in it may lead to files of the bundle alone. Three tools keep a folder's files
in a store beside it and leave links in their place; the store that such a tool uses for the very folder that the bundle
lies in is allowed too:

- the Hugging Face hub's cache: ``REPOSITORY/snapshots/REVISION/…`` leads into ``REPOSITORY/blobs``;
- DVC: a folder of a repository leads into ``.dvc/cache`` of that repository;
- git-annex and DataLad: a folder of a repository leads into ``.git/annex/objects`` of that repository.

A store that is itself a link to somewhere else is not taken. A mounted ConfigMap needs no rule: its links lead to
``..data`` in the mount itself, and so stay inside the bundle.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from hidiff_runtime.errors import BundleError, InputError
from hidiff_runtime.format.manifest import MANIFEST, Manifest
from hidiff_runtime.format.paths import path_error

FETCH_LINKED = "Get what the links lead to: with dvc pull, git annex get, or a new download."
"""What to do where links lead to nothing."""

LinksOption = str | Path | Sequence[str | Path]
"""Folders that symbolic links may lead into: one or several."""

_SHOWN = 3
"""Folders that links lead to, of which a message tells."""


class BundleFolder:
    """A bundle's folder and where symbolic links in it may lead.

    That is inside it, into the store of a tool that it lies in, and into folders that its user names.

    Links are followed anew for each question, since they may be put elsewhere at any time.

    Args:
        root: the folder, or the ``manifest.json`` in it; made absolute.
        allow_links: further folders that links may lead into.

    Raises:
        InputError: one of those is no folder.
    """

    def __init__(self, root: str | Path, allow_links: LinksOption = ()) -> None:
        given = Path(root).absolute()  # whatever folder is the current one later
        self.root = given.parent if given.name == MANIFEST and not os.path.isdir(given) else given  # noqa: PTH112 - never raises
        several = (allow_links,) if isinstance(allow_links, str | Path) else allow_links
        self._allowed = tuple(Path(folder).absolute() for folder in several)
        for folder in self._allowed:
            if not folder.is_dir():
                raise InputError(
                    "A folder that links may lead into is not there.",
                    given=folder,
                    advice="Give --allow-links the folder that holds the files.",
                )

    def file(self, name: str) -> Path:
        """Returns the file ``name`` of the bundle, below the folder itself: what is beside it there is beside it in the
        bundle.

        Raises:
            BundleError: the name leaves the folder, or a symbolic link on its way leads where it may not.
        """
        if fault := path_error(name):
            raise BundleError(
                f"The path {name!r} {fault}.",
                given=name,
                advice="Do not use this bundle; fetch it again from a source you trust.",
            )
        try:
            root = self.root.resolve()
            target = (root / name).resolve()
        except (OSError, RuntimeError) as error:  # Python before 3.13 raises the latter
            raise BundleError(
                f"{name} is a symbolic link that leads round in a circle.", given=error, advice=FETCH_LINKED
            ) from error
        if not self._may_lead_to(root, target):
            raise self._refusal(root, name, target)
        return root / name

    def manifest(self) -> Manifest:
        """Reads the manifest, once neither it nor a file that it names is a link that leads where it may not.

        Raises:
            BundleError: one of them is; or there is no manifest, or it is broken, foreign or of a newer format.
        """
        if is_dangling(path := self.file(MANIFEST)):
            raise BundleError(
                "manifest.json is a symbolic link to a file that is not there.",
                given=path.resolve(),
                advice=FETCH_LINKED,
            )
        manifest = Manifest.read(self.root)
        for name in manifest.files:
            self.file(name)
        return manifest

    def _may_lead_to(self, root: Path, target: Path) -> bool:
        if target.is_relative_to(root) or any(target.is_relative_to(store) for store in _stores_of(root)):
            return True
        return any(target.is_relative_to(folder.resolve()) for folder in self._allowed)

    def _refusal(self, root: Path, name: str, target: Path) -> BundleError:
        """Returns the error for a link that leads where it may not, or for a bundle that consists of such links."""
        count, leaving = 0, []
        for path in _entries(root):
            count += 1
            if path.is_symlink() and (place := _target(path)) is not None and not self._may_lead_to(root, place):
                leaving.append(place)
        copy = f"copy it whole: cp -rL {shlex.quote(str(root))} DST"
        if 2 * len(leaving) <= count:
            return BundleError(
                f"{name} leaves the bundle through a symbolic link.",
                given=target,
                advice="Do not use this bundle; fetch it again from a source you trust. "
                f"If the link is your own, {copy}{_allow(_places([target], root))}.",
            )
        places = _places(leaving, root)
        more = f" and {len(places) - _SHOWN} more folders" if len(places) > _SHOWN else ""
        return BundleError(
            "The bundle consists of symbolic links that lead out of its folder.",
            given=f"{len(leaving)} of {count} entries lead into {', '.join(map(str, places[:_SHOWN]))}{more}",
            advice=f"If that is your own cache or store, {copy}{_allow(places)}.",
        )


def _stores_of(root: Path) -> tuple[Path, ...]:
    """Returns the stores that a bundle's links may lead into: those of the nearest folder above it that has any."""
    for folder in (root, *root.parents):
        found = [folder / ".dvc" / "cache", folder / ".git" / "annex" / "objects"]
        if folder.parent.name == "snapshots":
            found.append(folder.parent.parent / "blobs")
        if stores := tuple(store for store in found if _is_real(store)):
            return stores
    return ()


def _is_real(store: Path) -> bool:
    """Returns whether it is a folder at this very place; not where that may not be looked at."""
    try:
        return store.is_dir() and store.resolve() == store
    except OSError:
        return False


def is_dangling(path: Path) -> bool:
    """Returns whether it is a symbolic link to nothing."""
    try:
        path.stat()
    except FileNotFoundError:
        return path.is_symlink()
    except OSError:
        pass
    return False


def _allow(places: Sequence[Path]) -> str:
    """Returns the other way to open such a bundle; none where it would allow every file there is."""
    if any(place == place.parent for place in places):
        return ""
    options = " ".join(f"--allow-links {shlex.quote(str(place))}" for place in places[:_SHOWN])
    more = " and so on" if len(places) > _SHOWN else ""
    return f"\n         or allow it: {options}{more} (allow_links= in Python)"


def _entries(root: Path) -> Iterator[Path]:
    """Yields every file of a folder and every link, which is not followed."""
    for folder, folders, files in os.walk(root):
        at = Path(folder)
        yield from (at / name for name in files)
        yield from (at / name for name in folders if (at / name).is_symlink())


def _target(link: Path) -> Path | None:
    """Returns where a link leads; None where that is round in a circle."""
    try:
        return link.resolve()
    except (OSError, RuntimeError):
        return None


def _places(targets: Sequence[Path], root: Path) -> list[Path]:
    """Returns the folder that all targets lie in; each one's own where that would hold the bundle or the whole disk."""
    parents = sorted({target.parent for target in targets})
    try:
        shared = Path(os.path.commonpath(parents))
    except ValueError:  # on several drives
        return parents
    return parents if shared == shared.parent or root.is_relative_to(shared) else [shared]
