"""What passes left as it was, though it could have been theirs: logged, and counted in a file beside the graphs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from hidiff_export.files import write_json
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.format.codec import Fields, read_object

ENDING = ".declined.json"
"""Ends the name of a stage's file, in the folder of the UNet; a stage in which nothing was declined has none."""

Counts = dict[str, dict[str, dict[str, int]]]
"""Nodes by graph, pass and reason: ``{"strided.onnx": {"NearestToGather": {"a shape is not known": 2}}}``."""

log = logging.getLogger(__name__)
_collected: ContextVar[Counts | None] = ContextVar("_collected", default=None)


@contextmanager
def collecting() -> Iterator[Counts]:
    """Counts what passes decline as long as the context lasts."""
    counts: Counts = {}
    token = _collected.set(counts)
    try:
        yield counts
    finally:
        _collected.reset(token)


def note_declined(graph: str, name: str, reasons: Iterable[str]) -> None:
    """Logs what a pass declined in a graph, and counts it where that is asked for.

    Args:
        graph: name of its file.
        name: of the pass.
        reasons: one for each node.
    """
    counted = Counter(reasons)
    for reason, nodes in counted.items():
        log.info(_line(graph, name, nodes, reason))
    counts = _collected.get()
    if counts is not None and counted:
        known = counts.setdefault(graph, {}).setdefault(name, {})
        for reason, nodes in counted.items():
            known[reason] = known.get(reason, 0) + nodes


def write_declined(counts: Counts, path: Path) -> tuple[Path, ...]:
    """Writes what was counted to ``path``; gives the files written: none where nothing was declined."""
    if not counts:
        return ()
    write_json(path, counts)
    return (path,)


def read_declined(folder: BundleFolder, names: Iterable[str]) -> Counts:
    """Reads what passes declined in all of a bundle's graphs.

    Args:
        folder: of the bundle.
        names: of its files; a bundle from before this was kept has none of these.

    Raises:
        BundleError: a file cannot be read, or holds something else.
    """
    found: Counts = {}
    for name in sorted(name for name in names if name.endswith(ENDING)):
        content = read_object(folder.file(name), name, "The record of what passes declined")
        found.update(Fields({"graphs": content}, name).named("graphs", _passes))
    return found


def _passes(fields: Fields, graph: str) -> dict[str, dict[str, int]]:
    return fields.named(graph, lambda inner, name: inner.named(name, lambda last, reason: last.whole(reason, 1)))


def lines(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Iterator[str]:
    """Yields it in words, for people: a line for each graph, pass and reason."""
    for graph, passes in sorted(counts.items()):
        for name, reasons in sorted(passes.items()):
            for reason, nodes in sorted(reasons.items()):
                yield _line(graph, name, nodes, reason)


def _line(graph: str, name: str, nodes: int, reason: str) -> str:
    what = "1 node as it was" if nodes == 1 else f"{nodes} nodes as they were"
    return f"{graph}: {name} left {what}: {reason}"
