"""Paths inside a bundle: relative, and written with slashes."""

from __future__ import annotations


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
