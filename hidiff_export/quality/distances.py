"""How far pictures are apart: pixel by pixel, by what a network sees in them, and as sets.

PSNR and SSIM are the runtime's. The distance of two sets is the kernel inception distance of
Bińkowski et al. 2018 (arXiv 1801.01401): the unbiased estimate of the squared maximum mean discrepancy under the
polynomial kernel ``(x·y / d + 1)³``, with the features of whichever network is at hand in place of Inception's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hidiff_runtime.verification import image_metrics

Array = NDArray[Any]

FEWEST = 4
"""Pictures that a set needs for a distance with an interval."""

_DEVIATIONS = 1.96
"""Of the standard error, to either side: what 95 % lie in."""
_MOST_DB = 100.0
"""What two equal pictures are said to have, whose PSNR has no end."""


@dataclass(frozen=True)
class Interval:
    """An estimate, and the bounds that it lies between with 95 % confidence."""

    value: float
    low: float
    high: float


def as_tensor(pictures: Sequence[Array]) -> Tensor:
    """Returns pictures, uint8 ``[height, width, 3]`` each, as float32 ``[batch, 3, height, width]`` from 0 to 1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def psnr(one: Array, other: Array) -> float:
    """Returns the peak signal-to-noise ratio of two uint8 pictures ``[height, width, 3]`` in dB, at most 100."""
    return min(image_metrics.psnr(one / 255, other / 255), _MOST_DB)


def ssim(one: Array, other: Array) -> float:
    """Returns the structural similarity of two uint8 pictures ``[height, width, 3]``, 1 where they are equal."""
    return image_metrics.ssim(np.moveaxis(one, -1, 0) / 255, np.moveaxis(other, -1, 0) / 255)


def feature_distances(one: Tensor, other: Tensor) -> list[float]:
    """Returns, for each pair of rows of ``[pictures, features]``, one less their cosine: 0 the same, 1 unlike."""
    apart = 1 - torch.cosine_similarity(one.double(), other.double())
    return [max(0.0, float(value)) for value in apart]


def set_distance(one: Tensor, other: Tensor) -> Interval:
    """Returns the kernel distance of two sets of features, in thousandths, with its 95 % interval.

    Pictures of one prompt are no independent draws, so the pairs themselves are left out: two equal sets are exactly 0
    apart. The standard error is the jackknife's, which leaves one prompt out at a time.

    Args:
        one: ``[pictures, features]``, of at least `FEWEST` pictures; ``other`` likewise, of the same prompts in order.
    """
    if torch.equal(one, other):  # to the last bit, which matrix products leave to the processor
        return Interval(0.0, 0.0, 0.0)
    count = len(one)
    joint = torch.cat([one, other]).double()
    kernel = (joint @ joint.T / joint.shape[1] + 1) ** 3
    across = kernel[:count, count:]
    apart = kernel[:count, :count] + kernel[count:, count:] - across - across.T
    apart.fill_diagonal_(0)
    total, by_prompt = apart.sum(), apart.sum(1)
    value = float(total / (count * (count - 1)))
    without = (total - 2 * by_prompt) / ((count - 1) * (count - 2))
    error = float(((count - 1) * without.var(correction=0)).sqrt())
    return Interval(1000 * value, 1000 * (value - _DEVIATIONS * error), 1000 * (value + _DEVIATIONS * error))
