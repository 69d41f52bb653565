"""Stores what plans over the same weights have in common once.

TensorRT-RTX writes the weights last, in an order that the phase hardly changes: counted from their ends, plans of one
network agree in nearly all of their bytes, but for a beginning of their own and here and there a constant of the phase.
Each plan becomes parts, its own and those it shares, and its bytes are those of its parts one after another.
`hidiff_runtime.backends.tensorrt.mapped_parts.map_parts` reads them as one mapping.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO

from hidiff_export.files import storage_errors, temporary
from hidiff_runtime.format.atomic_write import atomic_write

MINIMUM = 1 << 22
"""Bytes: a shorter stretch that plans share is not worth a file of its own."""

PAGE = 1 << 16
"""Bytes of the largest page in use (arm64): parts begin at a multiple of it, counted from the last, to be mapped."""

ALIGNMENT = 64
"""Bytes: the first plan's address in memory is a multiple of this. The others' are as their lengths allow."""

_CHUNK = 1 << 22
_OWN, _SHARED = ".head", ".tail"

_Owners = tuple[Path, ...]


@dataclass(frozen=True)
class _Piece:
    """Bytes that one or more plans hold, from ``far`` to ``near`` bytes before their end."""

    owners: _Owners
    far: int
    near: int


def share_tails(plans: Sequence[Path], minimum: int = MINIMUM) -> dict[Path, tuple[Path, ...]]:
    """Divides plans into parts, of which those that several plans share are stored once.

    The plans are removed when all their parts are on the disk, not before: until then the parts take room beside them,
    as much as will be taken in the end. Memory does not depend on the size of the plans. Where writing fails or is
    interrupted no part is left and every plan is whole.

    Args:
        plans: files in one folder, of different names. Of ``strided.tensorrt-rtx.plan`` the parts of its own are
            ``strided.tensorrt-rtx.head``, ``strided.tensorrt-rtx.head-2`` and so on; what it shares with later ones is
            ``strided.tensorrt-rtx.tail`` and so on: no other plans in the folder, of another size, have such names.
        minimum: bytes in a row that plans must agree in, at the same distance from their end, to be stored once.

    Returns:
        for each plan its parts in order, or the plan itself if it shares nothing.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
        OSError: a plan cannot be read.
    """
    sizes = {plan: plan.stat().st_size for plan in plans}
    runs = list(_long(_runs(sizes), minimum))
    pieces = {plan: tuple(_pieces(plan, size, runs)) for plan, size in sizes.items()}
    divided = {plan: found for plan, found in pieces.items() if len(found) > 1}
    names = _names(divided)
    if divided:
        with storage_errors(plans[0].parent):
            _write(names, sizes)
            for plan in divided:
                plan.unlink()
    return {
        plan: tuple(names[piece] for piece in reversed(divided[plan])) if plan in divided else (plan,) for plan in plans
    }


@dataclass(frozen=True)
class _Run:
    """Bytes from ``far`` to ``near`` before the ends of plans; for each plan that shares them, all that do."""

    far: int
    near: int
    owners: Mapping[Path, _Owners]


def _runs(sizes: Mapping[Path, int]) -> Iterator[_Run]:
    """Yields which plans agree where, in blocks of `PAGE` from the end on, as far as two plans go."""
    with ExitStack() as opened:
        files = {plan: opened.enter_context(plan.open("rb")).fileno() for plan in sizes}
        near = 0
        far = PAGE + next(iter(sizes.values()), 0) % ALIGNMENT
        while sum(size >= far for size in sizes.values()) > 1:
            blocks = {
                plan: os.pread(file, far - near, sizes[plan] - far)
                for plan, file in files.items()
                if sizes[plan] >= far
            }
            alike = {
                plan: tuple(other for other, content in blocks.items() if content == block)
                for plan, block in blocks.items()
            }
            yield _Run(far, near, {plan: owners for plan, owners in alike.items() if len(owners) > 1})
            near, far = far, far + PAGE


def _long(runs: Iterator[_Run], minimum: int) -> Iterator[_Run]:
    """Joins runs with the same owners; what is shorter than ``minimum`` nobody shares."""
    joined: list[_Run] = []
    for run in runs:
        if joined and joined[-1].owners == run.owners:
            joined[-1] = _Run(run.far, joined[-1].near, run.owners)
        else:
            joined.append(run)
    for run in joined:
        yield run if run.far - run.near >= minimum else _Run(run.far, run.near, {})


def _pieces(plan: Path, size: int, runs: Sequence[_Run]) -> Iterator[_Piece]:
    """Yields the pieces of a plan, the last one first: what no run says is its own."""
    alone: _Owners = (plan,)
    owners, far, near = alone, 0, 0
    for run in runs:
        if run.far > size:
            break
        found = run.owners.get(plan, alone)
        if found != owners:
            if far:
                yield _Piece(owners, far, near)
            owners, near = found, run.near
        far = run.far
    if owners == alone:
        yield _Piece(owners, size, near)
        return
    yield _Piece(owners, far, near)
    if far < size:
        yield _Piece(alone, size, far)


def _names(divided: Mapping[Path, Sequence[_Piece]]) -> dict[_Piece, Path]:
    """Returns a file for each piece, named by the first plan that holds it and counted from that one's beginning."""
    names: dict[_Piece, Path] = {}
    for plan, pieces in divided.items():
        numbers = {_OWN: count(1), _SHARED: count(1)}
        for piece in reversed(pieces):
            if piece not in names:
                suffix = _OWN if len(piece.owners) == 1 else _SHARED
                number = next(numbers[suffix])
                names[piece] = plan.with_suffix(suffix if number == 1 else f"{suffix}-{number}")
    return names


def _write(pieces: Mapping[_Piece, Path], sizes: Mapping[Path, int]) -> None:
    """Copies each piece out of the first plan that holds it; all of them, or none if one fails."""
    done = []
    try:
        for piece, path in pieces.items():
            done.append(path)
            size = sizes[piece.owners[0]]
            with atomic_write(path, beside=temporary(path)) as file:
                _copy(piece.owners[0], size - piece.far, size - piece.near, file)
    except BaseException:
        for path in done:
            path.unlink(missing_ok=True)
        raise


def _copy(source: Path, begin: int, end: int, writer: BinaryIO) -> None:
    """Writes bytes ``begin`` to ``end`` of a file to another."""
    with source.open("rb") as reader:
        reader.seek(begin)
        while begin < end:
            chunk = reader.read(min(_CHUNK, end - begin))
            writer.write(chunk)
            begin += len(chunk)
