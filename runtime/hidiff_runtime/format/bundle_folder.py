"""A bundle's folder: the one place that decides which file a path in it stands for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hidiff_runtime.errors import BundleError, InputError
from hidiff_runtime.format.manifest import MANIFEST, Manifest
from hidiff_runtime.format.paths import path_error
from hidiff_runtime.format.symlinks import is_dangling, refusal, stores_of

FETCH_LINKED = "Get what the links lead to: with dvc pull, git annex get, or a new download."
"""What to do where links lead to nothing."""

LinksOption = str | Path | Sequence[str | Path]
"""Folders that symbolic links may lead into: one or several."""


class BundleFolder:
    """A bundle's folder and where symbolic links in it may lead.

    That is inside it, into `hidiff_runtime.format.symlinks.stores_of` it, and into folders that its user names.

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
            raise refusal(root, name, target, lambda place: self._may_lead_to(root, place))
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
        if target.is_relative_to(root) or any(target.is_relative_to(store) for store in stores_of(root)):
            return True
        return any(target.is_relative_to(folder.resolve()) for folder in self._allowed)
