"""Paths inside a bundle: relative, and written with slashes."""

from __future__ import annotations

LONGEST_PART, LONGEST = 255, 1024
"""Bytes that a file's name and a whole path may have: what every common file system takes."""


def path_error(path: str) -> str:
    """Returns why ``path`` cannot name a file inside a bundle; empty when it can.

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
    try:
        written = path.encode()
    except UnicodeEncodeError:
        return "has half of a surrogate pair"
    if len(written) > LONGEST or any(len(part) > LONGEST_PART for part in written.split(b"/")):
        return f"is longer than {LONGEST} bytes, or has a name longer than {LONGEST_PART}"
    return ""
