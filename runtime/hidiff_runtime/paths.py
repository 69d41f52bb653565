"""Paths inside a bundle: relative, written with slashes, and never leaving the folder."""

from __future__ import annotations

from pathlib import Path

from hidiff_runtime.errors import BundleError

_ADVICE = "Do not use this bundle; fetch it again from a source you trust."


def fault_in(path: str) -> str:
    """Why ``path`` cannot name a file inside a bundle; empty when it can.

    The same on every system: what would be absolute, a drive or a parent folder anywhere is refused everywhere.
    """
    if not path or any(ord(letter) < 32 for letter in path):
        return "is empty or has a control character"
    if "\\" in path or ":" in path:
        return "must be written with '/' and without a drive letter"
    if path.startswith("/"):
        return "must be relative to the bundle"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "must not have '.', '..' or empty parts"
    return ""


def inside(root: Path, path: str) -> Path:
    """The file ``path`` of the bundle at ``root``, symbolic links followed.

    Raises:
        BundleError: the path, or a symbolic link on its way, leaves the bundle.
    """
    fault = fault_in(path)
    if fault:
        raise BundleError(f"The path {path!r} {fault}.", given=path, advice=_ADVICE)
    folder = root.resolve()
    target = (folder / path).resolve()
    if not target.is_relative_to(folder):
        raise BundleError(f"{path} leaves the bundle through a symbolic link.", given=target, advice=_ADVICE)
    return folder / path
