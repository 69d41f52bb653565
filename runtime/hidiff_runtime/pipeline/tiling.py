"""A picture, or its latents, in tiles of one size that overlap, and how they are blended.

Every tile is whole: they are spread evenly, the first at one edge and the last at the other, so that none is cut off
and neighbours share at least the overlap that is asked for. Where tiles overlap, each one's share falls linearly
towards its edge, and all shares together are 1 everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hidiff_runtime.denoising.conditioning import Array
from hidiff_runtime.errors import InputError


@dataclass(frozen=True)
class TileAxis:
    """The tiles along one axis, in latents.

    Args:
        length: of the whole.
        tile: length of a tile.
        overlap: the least that neighbours share; of no account where one tile is the whole.

    Raises:
        InputError: the tile is longer than the whole, or not longer than the overlap.
    """

    length: int
    tile: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.tile <= self.length:
            raise InputError(
                "Tiles must be longer than their overlap, and no longer than the picture.",
                given=f"tiles of {self.tile}, overlap {self.overlap}, picture {self.length} (in latents)",
                advice="Use the bundle for pictures of its own size.",
            )

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each tile begins: as few tiles as reach from end to end, evenly spread."""
        rest = self.length - self.tile
        gaps = -(-rest // (self.tile - self.overlap))
        return tuple(index * rest // gaps for index in range(gaps + 1)) if gaps else (0,)

    def shares(self, scale: int = 1) -> Array:
        """Returns what each tile counts at each of its places, float32 [tiles, tile * scale]; they add up to 1
        everywhere.

        Args:
            scale: places for each latent, so 8 for pixels.
        """
        starts, tile = [start * scale for start in self.starts], self.tile * scale
        ramps = np.ones((len(starts), tile))
        for left, right in zip(range(len(starts)), range(1, len(starts)), strict=False):
            shared = starts[left] + tile - starts[right]
            rising = (np.arange(shared) + 0.5) / shared
            ramps[right, :shared] = np.minimum(ramps[right, :shared], rising)
            ramps[left, tile - shared :] = np.minimum(ramps[left, tile - shared :], rising[::-1])
        total = np.zeros(self.length * scale)
        for start, ramp in zip(starts, ramps, strict=True):
            total[start : start + tile] += ramp
        for start, ramp in zip(starts, ramps, strict=True):
            ramp /= total[start : start + tile]
        return ramps.astype(np.float32)


@dataclass(frozen=True)
class TilePlan:
    """The tiles of a picture, row by row: those along its height, and those along its width."""

    rows: TileAxis
    columns: TileAxis

    @classmethod
    def of(cls, size: tuple[int, int], tile: tuple[int, int], overlap: int) -> TilePlan:
        """Returns the plan for a picture of this height and width and tiles of theirs, all in latents.

        Raises:
            InputError: a tile is larger than the picture, or no larger than the overlap.
        """
        rows, columns = (
            TileAxis(length, side, overlap if length > side else 0) for length, side in zip(size, tile, strict=True)
        )
        return cls(rows, columns)

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def places(self, scale: int = 1) -> Iterator[tuple[slice, slice]]:
        """Yields rows and columns of each tile, ``scale`` of them for each latent."""
        for top in self.rows.starts:
            for left in self.columns.starts:
                yield (
                    slice(top * scale, (top + self.rows.tile) * scale),
                    slice(left * scale, (left + self.columns.tile) * scale),
                )

    def shares(self, scale: int = 1) -> Iterator[Array]:
        """Yields what each tile counts, float32 [tile's height * scale, tile's width * scale], in the order of
        `places`.

        Made one at a time, so that no more than one is in memory.
        """
        columns = self.columns.shares(scale)
        for row in self.rows.shares(scale):
            for column in columns:
                yield row[:, None] * column
