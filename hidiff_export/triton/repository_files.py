"""How a file comes into a repository."""

from __future__ import annotations

import shutil
from pathlib import Path


def take_file(source: Path, target: Path, *, link: bool) -> bool:
    """Puts a file to ``target``, whose folder is there; whether it is a hard link, which takes no room.

    Nothing changes a bundle's files in place, so that links are as safe as copies.

    Args:
        link: copies all the same where the disk is another one, or has no hard links.
    """
    if link:
        try:
            target.hardlink_to(source.resolve())
        except OSError:
            link = False
    if not link:
        shutil.copyfile(source, target)
    return link
