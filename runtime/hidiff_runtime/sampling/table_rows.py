"""The coefficients of a sampler table, each distinct row once: most of those that update the state are alike.

They are looked up for the evaluations that are asked for and never spread out whole, so that a table takes the memory
of its file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.errors import BundleError
from hidiff_runtime.finite_values import count_nonfinite
from hidiff_runtime.sampling.scheduler_state import NOISE, STATE, FloatArray

MOST_STATES = 32
"""Tensors that a scheduler may keep from one evaluation to the next. A probe tells no more apart; PNDM keeps 3."""

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rows:
    """The coefficients of E evaluations, ``[1 + K, 3 + K]`` each.

    An evaluation of a run that began in the middle has others at first: those by how many evaluations came before it,
    for the first D numbers of them.

    Attributes:
        distinct: float64 ``[U, 3 + K]``.
        places: which of ``distinct``, in a run from its start (0) and ``d`` evaluations after a start in the middle
            (``1 + d``): int32 ``[1 + D, E, 1 + K]``.

    Raises:
        BundleError: the arrays do not fit together.
    """

    distinct: FloatArray
    places: NDArray[np.int32]

    def __post_init__(self) -> None:
        distinct, places = self.distinct, self.places
        if distinct.dtype != np.float64 or places.dtype != np.int32 or not _fit(distinct.shape, places.shape):
            given = f"rows {distinct.dtype} {list(distinct.shape)}, places {places.dtype} {list(places.shape)}"
            raise broken(f"{given}, expected float64 [U, 3 + K] and int32 [1 + D, E, 1 + K], K up to {MOST_STATES}")
        if count_nonfinite(distinct):
            raise broken("rows are not finite")
        if places.size and not 0 <= places.min() <= places.max() < len(distinct):
            raise broken(f"places {places.min()} to {places.max()} of {len(distinct)} rows")

    @classmethod
    def of(cls, whole: FloatArray, early: FloatArray | None = None) -> Rows:
        """Returns those of spread out coefficients.

        Args:
            whole: of a run from its start, ``[E, 1 + K, 3 + K]``.
            early: after a start in the middle, ``[D, E, 1 + K, 3 + K]``; none where nothing is remembered.
        """
        every = whole[None] if early is None else np.concatenate([whole[None], early])
        distinct, places = np.unique(every.reshape(-1, every.shape[-1]), axis=0, return_inverse=True)
        return cls(distinct, places.reshape(every.shape[:-1]).astype(np.int32))

    @property
    def depth(self) -> int:
        """D, for how many evaluations a start in the middle shows."""
        return len(self.places) - 1

    @property
    def states(self) -> int:
        """K, how many tensors are kept from one evaluation to the next."""
        return int(self.distinct.shape[1]) - STATE

    def at(self, evaluations: Integers, behind: Integers) -> FloatArray:
        """Returns the coefficients of single evaluations, float64 ``[n, 1 + K, 3 + K]``.

        Args:
            evaluations: which, below E, ``[n]``.
            behind: how many evaluations came before each in a run from the middle; from D on, and so for every run from
                its start, it makes no difference, ``[n]``.
        """
        layer = np.where(behind < self.depth, 1 + behind, 0)
        found: FloatArray = self.distinct[self.places[layer, evaluations]]
        return found

    def takes_noise(self, evaluations: NDArray[np.bool_]) -> bool:
        """Returns whether noise has a coefficient anywhere in these evaluations, a flag for each of the E."""
        with_noise = self.distinct[:, NOISE] != 0
        return bool(with_noise[self.places[:, evaluations]].any())


def broken(problem: str) -> BundleError:
    """Returns the error for a sampler table that has ``problem``."""
    return BundleError("A sampler table is broken.", given=problem, advice="Build the bundle again.")


def _fit(distinct: tuple[int, ...], places: tuple[int, ...]) -> bool:
    if len(distinct) != 2 or len(places) != 3 or not places[0]:
        return False
    return STATE <= distinct[1] <= STATE + MOST_STATES and distinct[1] == places[2] + NOISE
