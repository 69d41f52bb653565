"""Runs that start in the middle of the timesteps: which of their evaluations differ from the whole run's.

A scheduler that remembers earlier outputs begins such a run without any, and takes an evaluation or a few until it is
where the whole run was. How many that is depends on the scheduler alone, so it is found from a few starts, followed
until they agree with the whole run; the others are probed only so far, and must have come to the same state there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hidiff_export.errors import ExportError
from hidiff_export.scheduler_tables.linear_probe import Response, respond_from
from hidiff_runtime.sampling.scheduler_state import STATE

_LOOK = 7
"""Evaluations that a start is followed at first: PNDM takes 5 to remember all that it will."""

_AGREEING = 2
"""As many of them must agree at the end, else the start is followed to the end of the run."""

_RTOL = 1e-6
"""Beside the largest coefficient of an evaluation; rounding in the scheduler, where noise is taken away, is 1e-7."""


def probe_starts(pristine: Any, steps: int, whole: Sequence[Response]) -> Mapping[int, Sequence[Response]]:
    """Finds for each evaluation to start from those first ones that differ from the whole run's, state that
    is never read left out. Empty where none of them does.

    Args:
        pristine: the scheduler; it is copied.
        steps: of the whole run.
        whole: its evaluations, as `drop_unread` leaves them.

    Raises:
        StepsUnsupported: the scheduler raises in such a run, or gives numbers that are not finite.
        ExportError: a run that starts in the middle never comes to where the whole run was.
    """
    starts = range(pristine.order, steps * pristine.order, pristine.order)
    if not starts:
        return {}
    few = sorted({starts[0], starts[len(starts) // 2]})
    depth = _depth(pristine, steps, whole, few, _LOOK)
    if depth > _LOOK - _AGREEING:
        depth = _depth(pristine, steps, whole, few, len(whole))
    if depth == 0:
        return {}
    runs = respond_from(copy.deepcopy(pristine), steps, starts, depth)
    begun = {
        start: drop_unread(run, _read_after(whole, start, len(run))) for start, run in zip(starts, runs, strict=True)
    }
    for start, run in begun.items():
        if run[-1].after != _read_after(whole, start, len(run)):
            raise ExportError(
                "A run of this scheduler that starts in the middle does not come to what the whole run remembers.",
                given=f"{type(pristine).__name__}, {steps} steps from evaluation {start + 1}",
                advice="Choose another sampler.",
            )
    return begun


def drop_unread(responses: Sequence[Response], read: tuple[str, ...] = ()) -> list[Response]:
    """Leaves only that state which some later sample depends on, numbered anew after each evaluation.

    Args:
        responses: evaluations in running order.
        read: what is read of the tensors kept after the last of them.
    """
    kept: list[Response] = []
    for response in reversed(responses):
        after = [slot for slot, name in enumerate(response.after) if name in read]
        rows = response.rows[[0, *(1 + slot for slot in after)]]
        before = np.flatnonzero(rows[:, STATE:].any(axis=0)).tolist()
        rows = rows[:, [*range(STATE), *(STATE + slot for slot in before)]]
        read = tuple(response.before[slot] for slot in before)
        names = tuple(response.after[slot] for slot in after)
        kept.append(replace(response, rows=rows, before=read, after=names))
    return kept[::-1]


def _depth(pristine: Any, steps: int, whole: Sequence[Response], starts: Sequence[int], most: int) -> int:
    """Returns how many of the first evaluations differ, in those runs that differ longest."""
    depth = 0
    for start, run in zip(starts, respond_from(copy.deepcopy(pristine), steps, starts, most), strict=True):
        begun = drop_unread(run, _read_after(whole, start, len(run)))
        differing = [
            number
            for number, (mine, stored) in enumerate(zip(begun, whole[start:], strict=False), start=1)
            if not _agree(mine, stored)
        ]
        depth = max([depth, *differing])
    return depth


def _read_after(whole: Sequence[Response], start: int, count: int) -> tuple[str, ...]:
    """Returns what the whole run reads of the tensors kept after ``count`` evaluations from ``start`` on."""
    following = whole[start + count : start + count + 1]
    return following[0].before if following else ()


def _agree(one: Response, other: Response) -> bool:
    facts = [(each.timestep, each.draws_noise, each.before, each.rows.shape) for each in (one, other)]
    if facts[0] != facts[1]:
        return False
    return all(
        np.abs(np.subtract(mine, theirs)).max() <= _RTOL * np.abs(theirs).max()
        for mine, theirs in ((one.rows, other.rows), (one.input_scale, other.input_scale))
    )
