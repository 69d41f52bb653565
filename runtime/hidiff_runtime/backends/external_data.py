"""Where ONNX graphs look for weights that lie in other files, and graphs whose weights lie behind symbolic links.

Any file may be named there, and ONNX Runtime would map it. So the names are read first, for the bundle to look whether
each is a file of its own.

ONNX Runtime opens a graph's external data by its path beside the graph and refuses a link that leads out of that
folder; which links it refuses differs from version to version. In a content-addressed store the graph and its weights
lie in folders of their own, under names that no graph knows. So such a graph is given as bytes, with the path of the
file behind the link in the place of its own, and the folder that these paths start from. ONNX Runtime then maps the
file as it maps any other.
"""

from __future__ import annotations

import mmap
import os
import posixpath
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from hidiff_runtime.backends.protobuf_wire import wire_field, wire_fields
from hidiff_runtime.errors import BundleError, EngineError
from hidiff_runtime.format.codec import REBUILD
from hidiff_runtime.format.paths import path_error
from hidiff_runtime.format.regular_files import open_regular

_MESSAGES: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""Where in a ``ModelProto`` tensors are: for each message the fields that lead to them, by number."""

_KEY, _VALUE = 1, 2


def files_of(engine: Path) -> tuple[Path, ...]:
    """Returns a graph and the files that its weights lie in, as it names them: below its own folder.

    Args:
        engine: the graph, not resolved.

    Raises:
        BundleError: it is not a readable graph, or names a file that is not below its folder.
    """
    found: dict[str, None] = {}
    try:
        with open_regular(engine) as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        _collect(memoryview(content), "model", found)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError("A graph cannot be read.", given=f"{engine}: {error}", advice=REBUILD) from error
    for location in found:
        if fault := path_error(location):
            raise BundleError(
                f"A graph looks for its weights outside the bundle: the path {fault}.",
                given=f"{engine.name}: {location[:200]!r}",
                advice="Do not use this bundle; fetch it again from a source you trust.",
            )
    return (engine, *(engine.parent / location for location in found))


def _collect(message: memoryview, kind: str, found: dict[str, None]) -> None:
    """Adds where the tensors below a message have their data. Raises ValueError."""
    if kind == "entry":
        if (location := _location(message)) is not None:
            found[location] = None
        return
    below = _MESSAGES[kind]
    for number, _, content, end in wire_fields(message):
        if number in below and content is not None:
            _collect(message[content:end], below[number], found)


def link_targets(engine: Path, weights: Iterable[Path]) -> dict[str, Path] | None:
    """Returns the files behind links by the names that a graph has for them.

    Args:
        engine: the graph, not resolved: what it names lies beside it.
        weights: files that it may name, not resolved either; others than those below its folder are passed over.

    Returns:
        None where no link is on the way from the graph's folder to the weights.
    """
    beside = engine.parent
    below = [path for path in weights if path.is_relative_to(beside)]
    targets = {path.relative_to(beside).as_posix(): path.resolve() for path in below}
    return None if all(target == beside.resolve() / name for name, target in targets.items()) else targets


def relinked(engine: Path, weights: Iterable[Path]) -> tuple[bytes, Path] | None:
    """Returns a graph that finds its weights where links lead to, and the folder that it looks for them from.

    Args:
        engine: as for `link_targets`; ``weights`` likewise.

    Returns:
        None where no link is on the way from the graph's folder to the weights: then it opens as it is.

    Raises:
        EngineError: it is not a readable graph, or names other files.
    """
    targets = link_targets(engine, weights)
    if targets is None:
        return None
    folder = Path(os.path.commonpath([target.parent for target in targets.values()]))

    def moved(location: str) -> str:
        target = targets.get(location)
        if target is None:
            raise EngineError(
                "A graph names weights that are not the bundle's.", given=f"{engine}: {location}", advice=REBUILD
            )
        return target.relative_to(folder).as_posix()

    try:
        with open_regular(engine) as file:
            return _relocated(file.read(), "model", moved), folder
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError("A graph cannot be read.", given=f"{engine}: {error}", advice=REBUILD) from error


def _relocated(message: bytes, kind: str, moved: Callable[[str], str]) -> bytes:
    """Returns the message with another location in each tensor below it whose data is external. Raises ValueError."""
    if kind == "entry":
        location = _location(message)
        if location is None:
            return message
        return wire_field(_KEY, b"location") + wire_field(_VALUE, moved(location).encode())
    below = _MESSAGES[kind]
    parts = []
    for number, start, content, end in wire_fields(message):
        if number in below and content is not None:
            parts.append(wire_field(number, _relocated(message[content:end], below[number], moved)))
        else:
            parts.append(message[start:end])
    return b"".join(parts)


def _location(entry: bytes | memoryview) -> str | None:
    """Returns where an entry says that the data is; None for what says something else."""
    texts = {number: bytes(entry[content:end]) for number, _, content, end in wire_fields(entry) if content is not None}
    return posixpath.normpath(texts.get(_VALUE, b"").decode()) if texts.get(_KEY) == b"location" else None
