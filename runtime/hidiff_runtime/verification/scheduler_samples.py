"""Reference samples of a sampler: what its diffusers scheduler answered to a few numbers, in every run there is.

A scheduler treats each element by itself and needs no UNet to be asked, so a few elements say whether a table's
coefficients are the scheduler's. In each evaluation of a run it was given the same sample, model output and noise,
whatever came before; only what it remembers by itself came from the evaluations before. The runs are those from the
start for each number of steps; DDIM's at some etas; those that begin at each later step, for as long as that shows; and
one of these for each number of steps that goes on to its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.codec import REBUILD
from hidiff_runtime.format.record_codec import Positive
from hidiff_runtime.verification.comparison import Bound

Array = NDArray[Any]

MOST_LANES = 16
"""Elements that a scheduler is asked about at once."""

COUNT, SKIPPED, LENGTH = 0, 1, 2
"""Columns of `SamplerSample.runs`."""


@dataclass(frozen=True)
class SamplerSample:
    """Names of the tensors that hold what one sampler's scheduler was asked, and its answers.

    L is the number of elements, C of step counts, R of runs and N of the evaluations of all of them. E of these are
    those of the runs from the start at eta 0, which come first.

    Args:
        sampler: its name in the bundle.
        order: UNet evaluations a logical step.
        eta: that the coefficients are of, where runs cannot choose it (TCD).
        depth: for how many evaluations a start in the middle shows.
        steps: int64 ``[C]``.
        init_noise_sigma: float64 ``[C]``.
        runs: which number of ``steps``, how many steps are skipped, and how many evaluations were asked for: int32
            ``[R, 3]``.
        etas: of each run: float64 ``[R]``.
        asked: sample, model output and noise in a run's n-th evaluation: float32 ``[most evaluations, 3, L]``.
        samples: the next sample: float32 ``[N, L]``.
        draws: whether noise was drawn: bool ``[N]``.
        timesteps: float32 ``[E]``.
        scaled: the sample as the UNet would be given it: float32 ``[E, L]``.
        noised: the sample as a picture, with the noise that is due there: float32 ``[E, L]``.
    """

    sampler: str
    order: Positive
    eta: float | None
    depth: int
    steps: str = ""
    init_noise_sigma: str = ""
    runs: str = ""
    etas: str = ""
    asked: str = ""
    samples: str = ""
    draws: str = ""
    timesteps: str = ""
    scaled: str = ""
    noised: str = ""

    def tensors(self) -> dict[str, str]:
        """Returns the name of each tensor, by what it is."""
        return {name: getattr(self, name) for name in SamplerAnswers.__dataclass_fields__}


@dataclass(frozen=True)
class SamplerAnswers:
    """The tensors of a `SamplerSample`.

    Raises:
        BundleError: they do not fit together.
    """

    steps: NDArray[np.int64]
    init_noise_sigma: NDArray[np.float64]
    runs: NDArray[np.int32]
    etas: NDArray[np.float64]
    asked: NDArray[np.float32]
    samples: NDArray[np.float32]
    draws: NDArray[np.bool_]
    timesteps: NDArray[np.float32]
    scaled: NDArray[np.float32]
    noised: NDArray[np.float32]

    @classmethod
    def of(cls, sample: SamplerSample, tensors: Mapping[str, Array]) -> SamplerAnswers:
        """Returns those that ``sample`` names."""
        return cls(**{name: tensors[tensor] for name, tensor in sample.tensors().items()})

    @property
    def whole(self) -> NDArray[np.bool_]:
        """Which runs are those from the start at eta 0, ``[R]``."""
        whole: NDArray[np.bool_] = (self.runs[:, SKIPPED] == 0) & (self.etas == 0)
        return whole

    def __post_init__(self) -> None:
        lanes = self.asked.shape[-1] if self.asked.ndim == 3 else 0
        counts, total, whole = len(self.steps), len(self.samples), len(self.timesteps)
        expected = {
            "steps": (np.int64, (counts,)),
            "init_noise_sigma": (np.float64, (counts,)),
            "runs": (np.int32, (len(self.runs), 3)),
            "etas": (np.float64, (len(self.runs),)),
            "asked": (np.float32, (len(self.asked), 3, lanes)),
            "samples": (np.float32, (total, lanes)),
            "draws": (np.bool_, (total,)),
            "timesteps": (np.float32, (whole,)),
            "scaled": (np.float32, (whole, lanes)),
            "noised": (np.float32, (whole, lanes)),
        }
        for name, (dtype, shape) in expected.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape:
                raise _broken(name, f"{array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} {list(shape)}")
        if not 1 <= lanes <= MOST_LANES:
            raise _broken("asked", f"{lanes} elements, expected 1 to {MOST_LANES}")
        self._check_runs()

    def _check_runs(self) -> None:
        count, skipped, length = self.runs.T.astype(np.int64)
        if not len(self.runs) or count.min() < 0 or count.max() >= len(self.steps) or skipped.min() < 0:
            raise _broken("runs", "no runs, or of step counts that there are not")
        if length.min() < 1 or length.max() > len(self.asked) or length.sum() != len(self.samples):
            raise _broken("runs", f"{length.sum()} evaluations, expected {len(self.samples)}")
        first = int(self.whole.sum())
        if not self.whole[:first].all() or length[:first].sum() != len(self.timesteps):
            raise _broken("runs", f"expected the whole ones first, with {len(self.timesteps)} evaluations")
        if not np.array_equal(count[:first], np.arange(len(self.steps))):
            raise _broken("runs", f"expected one whole run for each of {len(self.steps)} step counts")


def _broken(name: str, problem: str) -> BundleError:
    return BundleError("The reference samples of a sampler are broken.", given=f"{name}: {problem}", advice=REBUILD)


AGREES = Bound(
    snr_db=100,
    reason="A step is a sum of a few numbers; rounding within a scheduler leaves 3e-7 beside it, 1.2e-6 in Heun's.",
    rtol=0.0,
    atol=5e-6,
)
"""Of errors beside what was added up. Each step is compared by itself, so that none adds to another's."""
