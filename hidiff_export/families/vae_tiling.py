"""In which tiles a VAE sees a picture, and so what goes in and out of its two graphs."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from hidiff_export.families.family import LATENT_CHANNELS, PIXELS_PER_LATENT
from hidiff_runtime.format.manifest import TensorSpec

UNTILED = 1024 * 1024
"""Pixels of the largest picture that is one tile, unless the recipe names a tile."""

TILE = 640
"""Side of the largest tile in pixels, unless the recipe names one: decoding it takes ONNX Runtime 2.4 GB."""

OVERLAP = 64
"""Pixels that neighbouring tiles share at least, but an eighth of a tile where that is less."""

MULTIPLE = 64
"""What a tile's sides are multiples of, in pixels; not so where they are the picture's own."""


@dataclass(frozen=True)
class VaeTiles:
    """Tiles of one size.

    Args:
        height: of a tile in pixels; ``width`` likewise.
        overlap: the least that neighbours share, in pixels; 0 where one tile is the picture.
    """

    height: int
    width: int
    overlap: int

    @classmethod
    def of(cls, height: int, width: int, tile: int | None) -> VaeTiles:
        """Returns the tiles of a picture.

        Without a tile's size, pictures of up to `UNTILED` pixels are one tile, and larger ones are cut into as few
        tiles of at most `TILE` as there can be, no larger than it takes.

        Args:
            height: of the picture in pixels; ``width`` likewise.
            tile: the longest a tile's side may be, a multiple of 64; None to choose.
        """
        longest = tile or (TILE if height * width > UNTILED else max(height, width))
        if max(height, width) <= longest:
            return cls(height, width, 0)
        overlap = min(OVERLAP, longest // 8)
        rows, columns = (min(longest, side) if tile else _fitted(side, longest, overlap) for side in (height, width))
        return cls(rows, columns, overlap)

    def decoder_inputs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Returns ``latents``, with the scaling factor taken out."""
        return (TensorSpec("latents", (batch, LATENT_CHANNELS, *self._latents), "float32"),)

    def decoder_outputs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Returns ``image``, from about -1 to 1, not clamped."""
        return (TensorSpec("image", (batch, 3, self.height, self.width), "float32"),)

    def encoder_inputs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Returns ``image``, -1 to 1."""
        return self.decoder_outputs(batch)

    def encoder_outputs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Returns ``moments``: the means, then the logarithms of the variances."""
        return (TensorSpec("moments", (batch, 2 * LATENT_CHANNELS, *self._latents), "float32"),)

    @property
    def _latents(self) -> tuple[int, int]:
        return self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT


def _fitted(side: int, longest: int, overlap: int) -> int:
    """Returns the shortest tile with which as few tiles reach from end to end as with the longest."""
    if side <= longest:
        return side
    count = ceil((side - overlap) / (longest - overlap))
    return ceil((side + (count - 1) * overlap) / count / MULTIPLE) * MULTIPLE
