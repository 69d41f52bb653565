"""What is left to do of a job: rows without whole pictures that were made from the same row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hidiff_runtime.bulk.output import PICTURES, ImageEntry, Output
from hidiff_runtime.bulk.rows import DeadLetter, Row

CHANGED = "the row changed"
MISSING = "a picture is missing or not whole"
SPOILT = "a picture is not the one that was made"


@dataclass(frozen=True)
class ResumePlan:
    """What to do with each row.

    Args:
        todo: to be made.
        finished: rows that need nothing.
        failed: dead letters that stay, of rows that were refused or failed before.
        again: how many are made again, by the reason.
    """

    todo: tuple[Row, ...]
    finished: int
    failed: tuple[DeadLetter, ...]
    again: Counter[str]


def plan_resume(
    rows: Sequence[Row],
    refused: Sequence[DeadLetter],
    output: Output,
    bundle: str,
    *,
    batch: int,
    recheck: str = "hash",
    retry_failed: bool = False,
) -> ResumePlan:
    """Compares rows, each of ``batch`` pictures of the bundle with this hash, with what earlier jobs left.

    Args:
        recheck: ``hash`` reads every picture that is there and compares its SHA-256, ``size`` compares sizes.
        retry_failed: whether rows that failed before are tried again.

    Raises:
        StorageError: pictures cannot be listed or read.
    """
    sizes = output.store.sizes(PICTURES) if output.index else {}
    reasons: dict[str, str] = {}
    candidates = []
    for row in rows:
        pictures = output.index.get(row.id)
        if pictures is None:
            continue
        if any(picture.fingerprint != row.fingerprint(bundle) for picture in pictures):
            reasons[row.id] = CHANGED
        elif len(pictures) != batch or any(sizes.get(_name(picture)) != picture.bytes for picture in pictures):
            reasons[row.id] = MISSING
        else:
            candidates.append(row.id)
    if recheck == "hash":
        reasons |= dict.fromkeys(_spoilt(output, candidates), SPOILT)
    buried = {} if retry_failed else {letter.fingerprint: letter for letter in output.dead if letter.fingerprint}
    todo, failed = [], list(refused)
    for row in rows:
        if row.id in output.index and row.id not in reasons:
            continue
        letter = buried.get(row.fingerprint(bundle))
        if letter is None:
            todo.append(row)
        else:
            failed.append(letter)
    finished = len(rows) - len(todo) - (len(failed) - len(refused))
    return ResumePlan(
        tuple(todo), finished, tuple(failed), Counter(reasons[row.id] for row in todo if row.id in reasons)
    )


def _name(picture: ImageEntry) -> str:
    return picture.file.removeprefix(f"{PICTURES}/")


def _spoilt(output: Output, ids: Sequence[str]) -> list[str]:
    """Returns the rows whose pictures are not those of the index."""

    def is_spoilt(row_id: str) -> bool:
        for picture in output.index[row_id]:
            content = output.store.read(picture.file)
            if content is None or hashlib.sha256(content).hexdigest() != picture.sha256:
                return True
        return False

    with ThreadPoolExecutor(16) as pool:
        return [row_id for row_id, spoilt in zip(ids, pool.map(is_spoilt, ids), strict=True) if spoilt]
