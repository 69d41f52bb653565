"""Which tiles a picture gets, and that they cover it."""

from __future__ import annotations

import pytest

from hidiff_export.families.vae_tiling import OVERLAP, TILE, VaeTiles
from hidiff_export.recipe import Recipe, shipped_recipes
from hidiff_runtime.pipeline.tiling import TilePlan


def count(height: int, width: int, tiles: VaeTiles) -> int:
    return len(TilePlan.of((height // 8, width // 8), (tiles.height // 8, tiles.width // 8), tiles.overlap // 8))


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (768, 1360), (64, 8192)])
def test_a_picture_that_fits_is_one_tile(size: tuple[int, int]) -> None:
    assert VaeTiles.of(*size, None) == VaeTiles(*size, 0)


@pytest.mark.parametrize(
    ("size", "tiles", "number"),
    [
        ((2048, 2048), (576, 576), 16),
        ((4096, 4096), (640, 640), 49),
        ((1024, 1536), (576, 576), 6),
        ((2048, 1536), (576, 576), 12),
        ((1032, 1032), (576, 576), 4),
        ((512, 4096), (512, 640), 7),
    ],
)
def test_a_larger_one_gets_as_few_tiles_as_there_can_be(
    size: tuple[int, int], tiles: tuple[int, int], number: int
) -> None:
    found = VaeTiles.of(*size, None)
    assert found == VaeTiles(*tiles, OVERLAP)
    assert count(*size, found) == number
    largest = VaeTiles(min(TILE, size[0]), min(TILE, size[1]), OVERLAP)
    assert count(*size, largest) == number  # the smaller tiles are no more


@pytest.mark.parametrize(
    ("size", "tile", "tiles"),
    [
        ((2048, 2048), 1024, VaeTiles(1024, 1024, 64)),
        ((2048, 2048), 2048, VaeTiles(2048, 2048, 0)),
        ((2048, 512), 1024, VaeTiles(1024, 512, 64)),
        ((512, 512), 256, VaeTiles(256, 256, 32)),
        ((128, 128), 64, VaeTiles(64, 64, 8)),
        ((64, 64), 512, VaeTiles(64, 64, 0)),
    ],
)
def test_a_recipe_may_say_how_long_a_tile_is(size: tuple[int, int], tile: int, tiles: VaeTiles) -> None:
    assert VaeTiles.of(*size, tile) == tiles


@pytest.mark.parametrize("tile", [None, 64, 512, 1024])
def test_tiles_of_any_size_of_picture_cover_it(tile: int | None) -> None:
    for height in (*range(64, 4200, 264), 8192):
        for width in (64, 1000, 1032, 2048, 8192):
            tiles = VaeTiles.of(height, width, tile)
            assert count(height, width, tiles) >= 1
            assert tiles.overlap % 8 == 0
            assert tiles.height * tiles.width <= 1024**2


def test_every_shipped_recipe_s_graphs_have_its_tiles() -> None:
    for name in shipped_recipes():
        recipe = Recipe.load(name)
        assert recipe.tiles == VaeTiles.of(recipe.height, recipe.width, recipe.vae_tile)
        (latents,), (image,) = recipe.tiles.decoder_inputs(), recipe.tiles.decoder_outputs()
        assert [8 * side for side in latents.shape[2:]] == list(image.shape[2:])
        (taken,), (moments,) = recipe.tiles.encoder_inputs(), recipe.tiles.encoder_outputs()
        assert taken == image
        assert (moments.shape[1], moments.shape[2:]) == (8, latents.shape[2:])
