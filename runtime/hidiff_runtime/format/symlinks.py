"""Symbolic links in a bundle: where they may lead, and what to say of one that leads elsewhere.

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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hidiff_runtime.errors import BundleError

_SHOWN = 3
"""Folders that links lead to, of which a message tells."""


def stores_of(root: Path) -> tuple[Path, ...]:
    """Returns the stores that a bundle's links may lead into: those of the nearest folder above it that has any.

    Args:
        root: of the bundle, without links.
    """
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


def refusal(root: Path, name: str, target: Path, allowed: Callable[[Path], bool]) -> BundleError:
    """Returns the error for a link that leads where it may not: another one where most of the bundle's files are such
    links.

    Args:
        root: of the bundle, without links.
        name: of the file, relative to it.
        target: where the link leads.
        allowed: whether a link may lead to a place.
    """
    count, leaving = 0, []
    for path in _entries(root):
        count += 1
        if path.is_symlink() and (place := _target(path)) is not None and not allowed(place):
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
