"""Seeds of requests to a server, which draws one where a random one is asked for."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from hidiff_runtime.errors import InputError
from hidiff_runtime.sampling.torch_rng import SEED_MAX, SEED_MIN

RANDOM = -1
"""The seed that asks for a random one, as in web UIs."""

DRAWN = 2**32
"""Seeds that are drawn are below this; a page's JavaScript holds them exactly."""


def with_seed(values: Mapping[str, object]) -> Mapping[str, object]:
    """Draws the seed where it is `RANDOM`.

    Args:
        values: by the names of `hidiff_runtime.pipeline.request_fields.FIELDS`.

    Raises:
        InputError: it is beyond the last one, or negative otherwise: those are torch's other names of the largest.
    """
    seed = values.get("seed")
    if type(seed) is not int or 0 <= seed <= SEED_MAX:
        return values
    if seed != RANDOM:
        raise InputError(
            "seed must be a whole number from 0 to 2**64 - 1, or -1 for a random one.",
            given=seed,
            advice=f"{seed + 2**64} is the same seed." if SEED_MIN <= seed < 0 else "Give one of these.",
        )
    return {**values, "seed": secrets.randbelow(DRAWN)}
