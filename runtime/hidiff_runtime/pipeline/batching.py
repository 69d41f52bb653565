"""Requests that are drawn together: runs of one picture each, of one size and alike in all that a run has but once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from hidiff_runtime.denoising.conditioning import Array, is_whole
from hidiff_runtime.denoising.window_shifts import own_seeds_refused
from hidiff_runtime.errors import InputError
from hidiff_runtime.format.validation import WINDOW_SHIFTS
from hidiff_runtime.pipeline.request import Request
from hidiff_runtime.sampling.torch_rng import SEED_MAX

if TYPE_CHECKING:
    from collections.abc import Hashable

    from hidiff_runtime.format.manifest import Manifest

_ONCE = ("steps", "guidance_scale", "guidance_rescale", "full_run", "sampler", "eta", "strength", "conditioning_scale")
"""Settings that all pictures of a run have in common."""


def batches(manifest: Manifest, requests: Sequence[Request]) -> list[list[Request]]:
    """Returns the requests in their order, those together that one run draws.

    Neighbors that are alike in all that a run has once fill the largest batch that the bundle has of their size, then
    the next; each picture has a random stream of its own, so that it is the same in any batch, but for rounding.

    Args:
        manifest: of any size of the bundle.
    """
    found: list[list[Request]] = []
    for _, alike in groupby(requests, key=run_key):
        waiting = list(alike)
        while waiting:
            count = fill(manifest, waiting[0], len(waiting))
            found.append(waiting[:count])
            waiting = waiting[count:]
    return found


def fill(manifest: Manifest, request: Request, count: int) -> int:
    """Returns how many of ``count`` requests like this one a run draws: as many as fill its largest batch, or 1."""
    return next((size for size in _batch_sizes(manifest, request) if size <= count), 1)


def _batch_sizes(manifest: Manifest, request: Request) -> tuple[int, ...]:
    """Returns how many requests like this one a run can draw, the most first; none where it is drawn by itself."""
    if len(request.prompts) > 1:
        return ()
    every = (one for one in manifest.whole.manifests if (one.width, one.height) == request.size)
    return tuple(sorted({one.batch for one in every if one.batch > 1 and takes_own_shifts(one)}, reverse=True))


def takes_own_shifts(manifest: Manifest) -> bool:
    """Returns whether each picture of a batch can have a random stream of its own."""
    shifts = manifest.phases[0].input(WINDOW_SHIFTS)
    return manifest.batch == 1 or shifts is None or len(shifts.shape) > 1


def run_key(request: Request) -> Hashable:
    """Returns what is equal for requests that one run can draw."""
    shared = tuple(getattr(request.settings, name) for name in _ONCE)
    return (request.size, len(request.prompts), request.negative_prompts is None, request.given, shared)


def counted(request: Request, count: Any, manifest: Manifest) -> list[Request]:
    """Returns the requests of so many pictures of one prompt, whose seeds count up from the request's.

    Args:
        count: of pictures.
        manifest: of the request's size and batch.

    Raises:
        InputError: it is no such number, or not one of this bundle's batches.
    """
    batch, seed = len(request.prompts), request.settings.seed
    if not is_whole(count) or not 1 <= count <= SEED_MAX - seed + 1:
        raise InputError(
            "num_images must be a whole number from 1, and the seeds that follow each other seeds.",
            given=f"{count!r}, from seed {seed}",
            advice="Give another number, or a smaller seed.",
        )
    if count % batch:
        raise InputError(
            f"This bundle makes {batch} pictures of this size a run.",
            given=f"num_images {count}",
            advice=f"Give a multiple of {batch}, or add a batch of 1: 'hidiff-export add' does.",
        )
    if len(set(request.prompts)) > 1 or len(set(request.negative_prompts or ("",))) > 1:
        raise InputError(
            "num_images is for several pictures of one prompt.",
            given="a list of prompts",
            advice="Leave it out, or give one prompt.",
        )
    if not takes_own_shifts(manifest):
        raise own_seeds_refused()
    return [request.seeded(*range(first, first + batch)) for first in range(seed, seed + count, batch)]


def together(requests: Sequence[Request]) -> Request:
    """Returns one request of the pictures of all, which are alike in `run_key`; each keeps its seed."""
    first = requests[0]
    if len(requests) == 1:
        return first
    pictures: dict[str, Any] = {name: [getattr(request.settings, name) for request in requests] for name in first.given}
    negative = tuple(text for request in requests for text in request.negative_prompts or ())
    return replace(
        first,
        prompts=tuple(text for request in requests for text in request.prompts),
        negative_prompts=negative or None,
        settings=replace(first.settings, **pictures),
        seeds=tuple(request.settings.seed for request in requests),
        time_ids=_joined([request.time_ids for request in requests]),
        negative_time_ids=_joined([request.negative_time_ids for request in requests]),
    )


def _joined(arrays: Sequence[Array | None]) -> Array | None:
    given: list[Any] = [array for array in arrays if array is not None]
    return np.concatenate(given) if given else None
