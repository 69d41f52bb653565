"""Distances of pictures and of sets: closed forms, torchmetrics as a second opinion, and what must not be 0."""

import json
import math

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from hidiff_export.quality.distances import Interval, feature_distances, psnr, set_distance, ssim


def picture(seed: int, side: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def features(seed: int, count: int = 40, shift: float = 0.0) -> torch.Tensor:
    drawn = np.random.default_rng(seed).standard_normal((count, 12)) + shift
    return torch.from_numpy(drawn.astype(np.float32))


def test_psnr_is_that_of_the_mean_squared_error():
    one = picture(0)
    other = np.where(one < 128, one + 10, one - 10).astype(np.uint8)
    assert psnr(one, other) == pytest.approx(20 * math.log10(255 / 10))


def test_equal_pictures_have_figures_that_json_can_hold():
    figures = {"psnr": psnr(picture(0), picture(0)), "ssim": ssim(picture(0), picture(0))}
    assert json.loads(json.dumps(figures, allow_nan=False)) == {"psnr": 100.0, "ssim": pytest.approx(1.0)}


def test_ssim_is_torchmetrics_own():
    from torchmetrics.functional.image import structural_similarity_index_measure

    one, other = picture(0), (picture(0) * 0.8 + picture(1) * 0.2).astype(np.uint8)
    tensors = [torch.from_numpy(each).permute(2, 0, 1)[None].double() / 255 for each in (one, other)]
    _, everywhere = structural_similarity_index_measure(*tensors, data_range=1.0, sigma=1.5, return_full_image=True)
    inside = everywhere[..., 5:-5, 5:-5]  # at the border it makes up what lies outside
    assert 0.5 < ssim(one, other) < 0.99
    assert ssim(one, other) == pytest.approx(float(inside.mean()), abs=1e-6)


def test_feature_distance_is_one_less_the_cosine():
    one = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert feature_distances(one, torch.tensor([[2.0, 0.0], [-1.0, 1.0]])) == pytest.approx([0, 1])


class TestSetDistance:
    def test_equal_sets_are_exactly_zero_apart(self):
        assert set_distance(features(0), features(0)) == Interval(0, 0, 0)

    def test_it_is_the_published_estimate_of_independent_sets(self):
        one, other = features(0), features(1, shift=0.5)
        assert set_distance(one, other).value / 1000 == pytest.approx(
            float(poly_mmd(one.double(), other.double())), rel=0.05
        )

    def test_sets_of_one_kind_are_within_the_interval_of_zero_and_others_are_not(self):
        """Ninety-five of a hundred intervals should hold 0; that chance is left room here."""
        same = [set_distance(features(2 * seed), features(2 * seed + 1)) for seed in range(60)]
        held = sum(found.low <= 0 <= found.high for found in same)
        assert held >= 50
        assert all(set_distance(features(2 * seed), features(2 * seed + 1, shift=0.8)).low > 0 for seed in range(20))

    def test_the_interval_narrows_with_more_pictures(self):
        few, many = (set_distance(features(0, count), features(1, count, 0.5)) for count in (20, 320))
        assert (many.high - many.low) < 0.5 * (few.high - few.low)
