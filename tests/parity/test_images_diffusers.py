"""Pictures as arrays and back: the same numbers as diffusers' image processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from hidiff_runtime.pipeline.image_processing import (
    control_array,
    fitted_pictures,
    image_array,
    latent_mask,
    mask_array,
    to_pictures,
)

WIDTH, HEIGHT = 48, 32
SIZE = (WIDTH, HEIGHT)
IMAGES = VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True)
CONTROLS = VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True, do_normalize=False)
MASKS = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)


def picture(size: tuple[int, int] = SIZE, mode: str = "RGB") -> Image.Image:
    colours = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    return Image.fromarray(colours).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [SIZE, (100, 40), (20, 20)], ids=["as it is", "shrunk", "enlarged"])
def test_pictures_become_the_same_numbers(size: tuple[int, int], mode: str) -> None:
    given = picture(size, mode)
    for ours, theirs in ((image_array, IMAGES), (control_array, CONTROLS)):
        expected = theirs.preprocess(given, height=HEIGHT, width=WIDTH).numpy()
        found = ours(fitted_pictures(given, SIZE, "image", resize=True))
        assert np.array_equal(found, expected)
        assert not np.array_equal(found[..., ::-1], expected)


@pytest.mark.parametrize("size", [SIZE, (100, 40)], ids=["as it is", "shrunk"])
def test_masks_become_the_same_numbers_at_both_sizes(size: tuple[int, int]) -> None:
    given = picture(size, "L")
    expected = MASKS.preprocess(given, height=HEIGHT, width=WIDTH)
    found = mask_array(fitted_pictures(given, SIZE, "mask", resize=True))
    assert np.array_equal(found, expected.numpy())
    small = torch.nn.functional.interpolate(expected, size=(HEIGHT // 8, WIDTH // 8)).numpy()
    assert np.array_equal(latent_mask(found, (4, HEIGHT // 8, WIDTH // 8)), small)
    assert not np.array_equal(latent_mask(found[..., ::-1], (4, HEIGHT // 8, WIDTH // 8)), small)


def test_arrays_become_the_same_pictures() -> None:
    images = torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    theirs, ours = IMAGES.postprocess(images), to_pictures(images.numpy())
    assert all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(ours, theirs, strict=True))
    assert not np.array_equal(np.asarray(ours[0]), np.asarray(theirs[1]))
