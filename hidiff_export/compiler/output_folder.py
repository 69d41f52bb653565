"""Folders that are made beside their final name and renamed: what the end needs is looked at before the work begins."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from hidiff_export.errors import InputError, StorageError

_MOUNTS = Path("/proc/self/mountinfo")
_NEW_FOLDER = "Give a folder that is not there yet."


def output_folder(output: Path, suffixes: tuple[str, ...]) -> Path:
    """Returns the folder that is to be made and renamed: ``output``, or what it leads to as a symbolic link.

    Nothing is written.

    Args:
        output: as a person gave it.
        suffixes: of the names beside it that the work takes.

    Raises:
        InputError: it can never become a folder: it is the root, a file or below one, a mount point, a symbolic link
            to nowhere, or its name is too long.
        StorageError: its folder cannot be written to.
    """
    try:
        folder = _behind_link(output)
        parent = _existing_parent(folder)
        if folder.exists() and not folder.is_dir():
            raise InputError("The output is a file, not a folder.", given=folder, advice=_NEW_FOLDER)
        if _is_mount_point(folder):
            raise _mount_point(folder)
        _check_name(folder, parent, suffixes)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise _too_long(output.name, "Choose a shorter one") from error
        raise StorageError(
            "The output's folder cannot be looked into.",
            given=f"{output}: {error.strerror}",
            advice="Choose a folder that you may write to.",
        ) from error
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError(
            "The output's folder cannot be made or renamed: the folder that it lies in cannot be written to.",
            given=parent,
            advice="Choose a folder that you may write to.",
        )
    return folder


def make_parents(output: Path) -> None:
    """Makes the folders that ``output`` is to lie in.

    Raises:
        StorageError: the system does not let one be made, as below /proc.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            "The folder that the output is to lie in cannot be made.",
            given=f"{output.parent}: {error.strerror}",
            advice="Choose a folder that you may write to.",
        ) from error


def try_renaming(folder: Path, aside: Path) -> None:
    """Renames a folder and gives it its name back, as the end of the work will have to.

    Raises:
        InputError: it is a mount point.
        StorageError: it cannot be renamed.
    """
    try:
        folder.rename(aside)
        aside.rename(folder)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _mount_point(folder) from error
        raise StorageError(
            "The output is there and cannot be renamed, so that nothing could take its place.",
            given=f"{folder}: {error.strerror}",
            advice="Choose another output; folders of a container's image and of other users cannot be replaced.",
        ) from error


def _behind_link(output: Path) -> Path:
    """Returns the absolute path, with a name; what it leads to where it is a symbolic link."""
    folder = output.absolute()
    if folder.name in ("", ".."):
        folder = folder.resolve()
    if not folder.name:
        raise InputError("The root of a disk cannot be the output.", given=output, advice=_NEW_FOLDER)
    if not folder.is_symlink():
        return folder
    try:
        target = folder.resolve()
    except RuntimeError as error:  # Python before 3.13
        raise _circle(folder) from error
    if target.is_symlink():
        raise _circle(folder)
    if not target.parent.is_dir():
        raise InputError(
            "The output is a symbolic link, and the folder that it leads into is not there.",
            given=f"{folder} -> {target}",
            advice=f"Make {target.parent}, or remove the link.",
        )
    return target


def _circle(link: Path) -> InputError:
    return InputError("The output is a symbolic link that leads round in a circle.", given=link, advice="Remove it.")


def _existing_parent(folder: Path) -> Path:
    """Returns the nearest folder above that is there."""
    parent = next(above for above in folder.parents if above.exists() or above.is_symlink())
    if not parent.is_dir():
        raise InputError(
            "The output lies below a file, where no folder can be.",
            given=f"{folder}, below {parent}",
            advice="Choose another output.",
        )
    return parent


def _is_mount_point(folder: Path) -> bool:
    """Returns whether something is mounted at ``folder``; binding a folder of the same disk shows in the list alone."""
    if os.path.ismount(folder):
        return True
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError:  # a system without such a list
        return False
    # The list writes blanks and backslashes as octal numbers.
    wanted = str(folder.resolve()).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011")
    return any(line.split(" ")[4] == wanted for line in lines if line.count(" ") > 4)


def _mount_point(folder: Path) -> InputError:
    return InputError(
        "The output is a mount point, as a container's volume is; it cannot be renamed, so that nothing can take its "
        "place.",
        given=folder,
        advice=f"Give a folder inside it: {folder / 'bundle'}",
    )


def _check_name(folder: Path, parent: Path, suffixes: tuple[str, ...]) -> None:
    """Refuses a name that leaves no room for those beside it."""
    if hasattr(os, "pathconf"):
        most = os.pathconf(parent, "PC_NAME_MAX") - max(map(len, suffixes))
        if len(os.fsencode(folder.name)) > most:
            raise _too_long(folder.name, f"Use at most {most} bytes")


def _too_long(name: str, what: str) -> InputError:
    return InputError(
        "The output's name is too long.",
        given=f"{len(os.fsencode(name))} bytes: {name[:40]}…",
        advice=f"{what}; folders of longer names are made beside it while the work goes on.",
    )


def is_plain(path: Path) -> bool:
    """Returns whether it is a file itself: no symbolic link, no pipe, no device."""
    return stat.S_ISREG(path.lstat().st_mode)
