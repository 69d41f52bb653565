"""Random numbers with the values that torch's CPU generator gives for the same seed, and the window shifts from them.

torch draws from MT19937 (ATen/core/MT19937RNGEngine.h), which numpy has too; what is written here is how torch turns
its 32-bit words into floats (ATen/core/TransformationHelper.h and ATen/native/cpu/DistributionTemplates.h).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.errors import InputError

SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1
"""The seeds torch takes, both included; only the lowest 32 bits tell two seeds apart."""

_BLOCK = 16
"""From this many normals on torch fills blocks of 16; fewer come one by one in double precision."""

_TWO_PI = np.float32(2 * math.pi)
_SHIFT_EDGES = np.array([0.25, 0.5, 0.75], dtype=np.float32)


class TorchGenerator:
    """The stream of ``torch.Generator("cpu").manual_seed(seed)``.

    Uniforms are bit-identical. Normals differ by at most 5e-7, because torch's vector unit rounds logarithm, sine and
    cosine its own way (on a processor without AVX2 torch itself differs from that by up to 2.2e-6).

    Args:
        seed: a whole number from -2**63 to 2**64 - 1, as torch takes it.

    Raises:
        InputError: any other seed.
    """

    def __init__(self, seed: int) -> None:
        self._engine = np.random.RandomState(_checked(seed) & 0xFFFFFFFF)
        self._second_normal: float | None = None

    def rand(self, shape: int | tuple[int, ...]) -> NDArray[np.float32]:
        """Uniforms in [0, 1), float32 of ``shape``; one 32-bit word each."""
        return self._uniforms(int(np.prod(shape))).reshape(shape)

    def randn(self, shape: int | tuple[int, ...]) -> NDArray[np.float32]:
        """Returns standard normals, float32 of ``shape``."""
        size = int(np.prod(shape))
        if size < _BLOCK:
            return np.array([self._one_normal() for _ in range(size)], dtype=np.float32).reshape(shape)
        whole = size - size % _BLOCK
        uniforms = self._uniforms(size)
        normals = np.empty(size, dtype=np.float32)
        normals[:whole] = _box_muller(uniforms[:whole])
        if whole != size:
            normals[-_BLOCK:] = _box_muller(self._uniforms(_BLOCK))  # torch redraws a whole block for the remainder
        return normals.reshape(shape)

    def _uniforms(self, size: int) -> NDArray[np.float32]:
        uniforms: NDArray[np.float32] = (self._words(size) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)
        return uniforms

    def _words(self, size: int) -> NDArray[np.uint32]:
        """Returns the engine's next 32-bit words: over this whole range, randint neither rejects nor masks."""
        return self._engine.randint(0, 2**32, size, dtype=np.uint32)

    def _one_normal(self) -> float:
        """Returns one normal of a pair; torch keeps the other for its next single normal, whatever is drawn between."""
        if self._second_normal is not None:
            normal, self._second_normal = self._second_normal, None
            return normal
        angle = 2 * math.pi * self._double()
        radius = math.sqrt(-2 * math.log1p(-self._double()))
        self._second_normal = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _double(self) -> float:
        high, low = (int(word) for word in self._words(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


class PictureGenerators:
    """A stream for each picture of a batch, as diffusers takes a list of generators.

    A picture's numbers are those that it would have in a run by itself.

    Args:
        seeds: of the pictures, as torch takes them.

    Attributes:
        each: the pictures' streams.

    Raises:
        InputError: one is no seed.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.each = tuple(TorchGenerator(seed) for seed in seeds)

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Returns standard normals, float32 of ``shape``, whose first axis is the pictures'."""
        assert shape[0] == len(self.each)
        return np.concatenate([generator.randn((1, *shape[1:])) for generator in self.each])


RandomStream = TorchGenerator | PictureGenerators
"""What a run draws from: one stream for its whole batch, or one for each picture."""


def draw_window_shifts(generator: RandomStream, count: int) -> NDArray[np.int32]:
    """Draws by how many quarters of a window each of ``count`` windowed blocks is rolled in one UNet evaluation.

    One uniform r a block, as HiDiffusion draws them: 0 up to r = 0.25, 1 up to 0.5, 2 up to 0.75, else 3.

    Returns:
        int32 ``[count]``, each 0 to 3, in the order that the blocks run; ``[pictures, count]`` where each has a stream.
    """
    if isinstance(generator, PictureGenerators):
        return np.stack([draw_window_shifts(each, count) for each in generator.each])
    return np.searchsorted(_SHIFT_EDGES, generator.rand(count), side="left").astype(np.int32)


def _box_muller(uniforms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normals from blocks of 16 uniforms: 8 radii, then 8 angles, become 8 cosines, then 8 sines.

    In float32 as in torch, whose angle is rounded before its sine is taken.
    """
    blocks = uniforms.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    angle = _TWO_PI * blocks[:, 1]
    normals: NDArray[np.float32] = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    return normals


def _checked(seed: Any) -> int:
    try:
        whole = None if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        whole = None
    if whole is None or not SEED_MIN <= whole <= SEED_MAX:
        raise InputError("This is not a seed.", given=repr(seed), advice="Use a whole number from -2**63 to 2**64 - 1.")
    return whole
