"""Stores what plans over the same weights have in common once: the bytes in which they end.

TensorRT-RTX writes the weights last, and in an order that the phase hardly changes, so plans of one network agree from
some byte near their beginning to their end. Each becomes a head of its own and the tails it shares; its bytes are those
of its parts one after another. `hidiff_runtime.backends.tensorrt.parts.map_parts` reads them as one mapping.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from hidiff_export.bundle import storage_errors

MINIMUM = 1 << 22
"""Bytes: a shorter tail is not worth a file of its own."""

PAGE = 1 << 16
"""Bytes of the largest page in use (arm64): a part between two others is a multiple of it, so that it can be mapped."""

ALIGNMENT = 64
"""Bytes: the first plan's address in memory is a multiple of this. The others' are as their lengths allow."""

_CHUNK = 1 << 22

_Common = Mapping[frozenset[Path], int]


@dataclass(frozen=True)
class _Piece:
    """Bytes that one or more plans hold, from ``far`` to ``near`` bytes before their end."""

    owners: tuple[Path, ...]
    far: int
    near: int


def share_tails(plans: Sequence[Path], minimum: int = MINIMUM) -> dict[Path, tuple[Path, ...]]:
    """Divides plans into parts, of which those that several plans share are stored once.

    The plans are removed when all their parts are on the disk, not before: until then the parts take room beside them,
    as much as will be taken in the end. Memory does not depend on the size of the plans. Where writing fails or is
    interrupted no part is left and every plan is whole.

    Args:
        plans: files in one folder, of different names. ``strided.tensorrt-rtx.plan`` becomes
            ``strided.tensorrt-rtx.head`` and tails such as ``shared-1.tensorrt-rtx.tail``.
        minimum: bytes that plans must agree in, at their end, beyond which the agreement is stored once.

    Returns:
        for each plan its parts in order: head and tails, or the plan itself if it shares nothing.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
        OSError: a plan cannot be read.
    """
    sizes = {plan: plan.stat().st_size for plan in plans}
    common = {frozenset(pair): common_suffix(*pair) for pair in combinations(plans, 2)}
    pieces = list(_divide(tuple(plans), 0, sizes, common, minimum))
    names = _names(pieces)
    parts = {plan: tuple(names[piece] for piece in reversed(pieces) if plan in piece.owners) for plan in plans}
    divided = {plan: paths for plan, paths in parts.items() if any(name.suffix == ".tail" for name in paths)}
    needed = {piece: path for piece, path in names.items() if piece.owners[0] in divided}
    if divided:
        with storage_errors(plans[0].parent):
            _write(needed, sizes)
            for plan in divided:
                plan.unlink()
    return {plan: divided.get(plan, (plan,)) for plan in plans}


def common_suffix(one: Path, other: Path) -> int:
    """How many bytes two files agree in, counted from their ends."""
    with one.open("rb") as a, other.open("rb") as b:
        sizes = os.fstat(a.fileno()).st_size, os.fstat(b.fileno()).st_size
        agreed = 0
        while agreed < min(sizes):
            count = min(_CHUNK, min(sizes) - agreed)
            left, right = (
                os.pread(file.fileno(), count, size - agreed - count) for file, size in zip((a, b), sizes, strict=True)
            )
            if left != right:
                differ = np.frombuffer(left, np.uint8) != np.frombuffer(right, np.uint8)
                return agreed + int(np.argmax(differ[::-1]))
            agreed += count
        return agreed


def _divide(
    group: tuple[Path, ...], taken: int, sizes: Mapping[Path, int], common: _Common, minimum: int
) -> Iterator[_Piece]:
    """The pieces of plans that agree in their last ``taken`` bytes, which have a piece already; last parts first."""
    if len(group) == 1:
        if taken < sizes[group[0]]:
            yield _Piece(group, sizes[group[0]], taken)
        return
    agreed = min(common[frozenset(pair)] for pair in combinations(group, 2))
    far = agreed - (agreed - taken) % PAGE if taken else agreed - (agreed - sizes[group[0]]) % ALIGNMENT
    if far - taken >= minimum:
        yield _Piece(group, far, taken)
        taken = far
    # To agree in more than the least that any two do is an equivalence; these are its classes.
    rest = group
    while rest:
        alike = tuple(plan for plan in rest if plan is rest[0] or common[frozenset((rest[0], plan))] > agreed)
        rest = tuple(plan for plan in rest if plan not in alike)
        yield from _divide(alike, taken, sizes, common, minimum)


def _names(pieces: Sequence[_Piece]) -> dict[_Piece, Path]:
    """A file for each piece: a head is named after its plan, tails are numbered."""
    names = {}
    for piece in pieces:
        plan = piece.owners[0]
        if len(piece.owners) == 1:
            names[piece] = plan.with_suffix(".head")
        else:
            number = 1 + sum(path.suffix == ".tail" for path in names.values())
            names[piece] = plan.with_name(f"shared-{number}{''.join(plan.suffixes[:-1])}.tail")
    return names


def _write(pieces: Mapping[_Piece, Path], sizes: Mapping[Path, int]) -> None:
    """Copies each piece out of the first plan that holds it; all of them, or none if one fails."""
    done = []
    try:
        for piece, path in pieces.items():
            beside = path.with_name(f"{path.name}.tmp")
            done += [beside, path]
            size = sizes[piece.owners[0]]
            _copy(piece.owners[0], size - piece.far, size - piece.near, beside)
            beside.replace(path)
    except BaseException:
        for path in done:
            path.unlink(missing_ok=True)
        raise


def _copy(source: Path, begin: int, end: int, target: Path) -> None:
    """Writes bytes ``begin`` to ``end`` of a file to another and waits until the disk has them."""
    with source.open("rb") as reader, target.open("wb") as writer:
        reader.seek(begin)
        while begin < end:
            chunk = reader.read(min(_CHUNK, end - begin))
            writer.write(chunk)
            begin += len(chunk)
        writer.flush()
        os.fsync(writer.fileno())
