"""Where pictures are written: checked before anything runs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hidiff_runtime.errors import InputError, StorageError
from hidiff_runtime.pipeline.image_metadata import check_name

INDEX, SEED = "{index}", "{seed}"
"""What stands in a pattern for the number of a picture, from 000, and for the seed of its run."""


@dataclass(frozen=True)
class OutputPaths:
    """The files to write.

    Args:
        pictures: in order.
        extra: sheet and previews, where they are wanted.
        folder: to be made first, if it is not there.
    """

    pictures: tuple[Path, ...]
    extra: tuple[Path, ...]
    folder: Path | None

    def make_folder(self) -> None:
        """Makes the folder. Raises StorageError when the disk refuses."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(
                "The output's folder cannot be made.",
                given=f"{self.folder}: {error.strerror}",
                advice="Choose another.",
            ) from error


def find_output_paths(
    output: str, seeds: Sequence[int], *, many: bool, extra: Sequence[Path | None] = (), force: bool = False
) -> OutputPaths:
    """Returns the files for pictures of these seeds.

    Args:
        output: a file; with ``many`` a folder, or a pattern with ``{index}`` or ``{seed}``.
        many: whether a folder is meant where one is there.
        extra: more files to write, None where one is not wanted.

    Raises:
        InputError: a name does not fit, two are the same, or a file is there already.
        StorageError: a folder cannot be written to or looked into, or a name is too long.
    """
    try:
        return _found(output, seeds, many, tuple(path for path in extra if path is not None), force)
    except OSError as error:
        raise StorageError(
            "The output cannot be written there.",
            given=f"{error.filename or output}: {error.strerror}",
            advice="Choose another name or folder.",
        ) from error


def _found(output: str, seeds: Sequence[int], many: bool, extra: tuple[Path, ...], force: bool) -> OutputPaths:
    folder = Path(output) if output.endswith(("/", os.sep)) or Path(output).is_dir() else None
    if folder is not None and not many:
        raise InputError("The output is a folder.", given=output, advice=f"Name a file: {folder / 'picture.png'}, say.")
    pattern = str(folder / f"{INDEX}.png") if folder is not None else output
    if len(seeds) > 1 and INDEX not in pattern and SEED not in pattern:
        name = Path(output)
        raise InputError(
            f"One file cannot hold {len(seeds)} pictures.",
            given=output,
            advice=f"Give a folder ({name.with_suffix('')}/), or a pattern: {name.with_suffix('')}-{INDEX}.png",
        )
    pictures = tuple(
        Path(pattern.replace(INDEX, f"{number:03}").replace(SEED, str(seed))) for number, seed in enumerate(seeds)
    )
    _check(pictures, extra, folder, force)
    return OutputPaths(pictures, extra, folder)


def _check(pictures: Sequence[Path], extra: Sequence[Path], folder: Path | None, force: bool) -> None:
    paths = [*pictures, *extra]
    for path, count in Counter(path.parent.resolve() / path.name for path in paths).items():
        if count > 1:
            raise InputError(
                f"{count} files would have the same name.", given=path, advice=f"Put {INDEX} into the pattern."
            )
    for path in paths:
        check_name(path)
        parent = path.absolute().parent
        if folder is not None and path.parent == folder and not folder.exists():
            parent = folder.absolute().parent
        if not parent.is_dir():
            raise InputError("The output's folder does not exist.", given=path, advice="Make it first.")
        if path.is_dir():
            raise InputError("The output is a folder.", given=path, advice="Name a file.")
        if not os.access(parent, os.W_OK):
            raise StorageError("The output's folder cannot be written to.", given=parent, advice="Choose another.")
        if path.exists() and not force:
            raise InputError("The file is there already.", given=path, advice="Give --force to replace it.")
