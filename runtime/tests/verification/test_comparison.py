from __future__ import annotations

import json
import math

import numpy as np
import pytest

from hidiff_runtime.errors import BundleError
from hidiff_runtime.verification.comparison import Bound, Metrics, Verdict, compare, compare_image, render

BOUND = Bound(80.0, "float32 arithmetic in another order")


def signal(seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((2, 4, 8, 8)).astype(np.float32)


def test_equal_arrays_have_an_infinite_ratio_and_pass() -> None:
    verdict = compare("a", signal(), signal(), BOUND)
    assert verdict.ok
    assert verdict.metrics == Metrics(math.inf, 0.0, 1.0)


@pytest.mark.parametrize("decibels", [20.0, 60.0, 100.0])
def test_the_ratio_is_that_of_the_noise_put_in(decibels: float) -> None:
    reference, noise = signal().astype(np.float64), signal(1).astype(np.float64)
    noise *= 10 ** (-decibels / 20) * np.linalg.norm(reference) / np.linalg.norm(noise)
    metrics = Metrics.of(reference, reference + noise)
    assert metrics.snr_db == pytest.approx(decibels, abs=1e-6)
    assert metrics.max_abs == pytest.approx(np.abs(noise).max(), rel=1e-9)


def test_cosine_is_that_of_the_angle() -> None:
    metrics = Metrics.of(np.array([1.0, 0.0]), np.array([1.0, 1.0]))
    assert metrics.cosine == pytest.approx(math.sqrt(0.5))


def test_sums_are_taken_in_float64() -> None:
    reference = np.full(1 << 20, 1e3, np.float16)
    candidate = reference.copy()
    candidate[0] += 1
    assert Metrics.of(reference, candidate).snr_db == pytest.approx(10 * math.log10(2**20 * 1e6), abs=1e-9)


@pytest.mark.parametrize(
    ("candidate", "fault"),
    [
        (None, "missing output"),
        (signal()[:1], "expected shape [2, 4, 8, 8], got [1, 4, 8, 8]"),
        (np.where(np.arange(8) == 3, np.nan, signal()), "the candidate has 64 of 512 values that are NaN or infinite"),
        (np.full_like(signal(), np.inf), "the candidate has 512 of 512 values that are NaN or infinite"),
    ],
    ids=["missing", "shape", "nan", "inf"],
)
def test_what_cannot_be_measured_fails(candidate: np.ndarray | None, fault: str) -> None:
    verdict = compare("a", signal(), candidate, Bound(-math.inf, "anything"))
    assert not verdict.ok
    assert verdict.fault == fault


def test_a_broken_reference_fails_too() -> None:
    broken = signal()
    broken[0, 0, 0, 0] = np.nan
    assert "reference" in compare("a", broken, broken, BOUND).fault
    assert compare("a", np.empty((0, 4)), np.empty((0, 4)), BOUND).fault == "nothing to compare"


def test_noise_over_silence_fails() -> None:
    verdict = compare("a", np.zeros(4), np.full(4, 1e-30), BOUND)
    assert verdict.metrics is not None
    assert verdict.metrics.snr_db == -math.inf
    assert not verdict.ok


def test_one_element_beyond_its_allowance_fails_what_the_ratio_would_pass() -> None:
    reference = np.ones(100_000)
    candidate = reference.copy()
    candidate[5] += 1e-3
    assert compare("a", reference, candidate, BOUND).ok
    strict = Bound(80.0, "one pixel matters", rtol=1e-4, atol=1e-6)
    verdict = compare("a", reference, candidate, strict)
    assert not verdict.ok
    assert verdict.metrics is not None
    assert verdict.metrics.excess == pytest.approx(1e-3 / (1e-6 + 1e-4))
    assert compare("a", reference, reference + 1e-5, strict).ok


@pytest.mark.parametrize(
    "verdict",
    [
        compare("engine against reference", signal(), signal() * 1.1, BOUND, phase="strided", step=3, steps=20),
        compare("run", signal(), signal(), Bound(60.0, "rounding adds up", rtol=1e-3, atol=0.0)),
        compare("run", signal(), None, BOUND),
        compare("run", np.zeros(3), np.ones(3), Bound(0.0, "x", rtol=0.1)),
    ],
    ids=["measured", "equal", "fault", "silence"],
)
def test_a_verdict_survives_json(verdict: Verdict) -> None:
    text = json.dumps(verdict.to_dict(), allow_nan=False)
    again = Verdict.from_dict(json.loads(text))
    assert again == verdict
    assert again.ok == verdict.ok


@pytest.mark.parametrize(("field", "value"), [("bound", None), ("metrics", {"snr_db": "many"}), ("extra", 1)])
def test_a_broken_verdict_is_refused_by_field(field: str, value: object) -> None:
    data = {**compare("a", signal(), signal(), BOUND).to_dict(), field: value}
    with pytest.raises(BundleError, match=field):
        Verdict.from_dict(data)


def test_the_table_shows_figure_bound_and_result() -> None:
    table = render(
        [
            compare("engine against reference", signal(), signal() * 1.01, BOUND, phase="pooled", step=3, steps=20),
            compare("run", signal(), None, BOUND),
        ]
    )
    heading, first, second = table.splitlines()
    assert heading.split()[:2] == ["boundary", "phase"]
    assert "pooled" in first
    assert "4/20" in first
    assert "40.0" in first
    assert ">= 80" in first
    assert first.endswith("FAILED")
    assert second.endswith("FAILED missing output")


@pytest.mark.parametrize("least", [{"psnr_db": 30.0}, {"ssim": 0.9}], ids=str)
def test_a_picture_keeps_to_its_psnr_and_ssim_too(least: dict[str, float]) -> None:
    picture = np.random.default_rng(0).random((1, 3, 32, 32)).astype(np.float32)
    noise = np.random.default_rng(1).standard_normal(picture.shape).astype(np.float32)
    bound = Bound(0.0, "the ratio alone would take both", **least)
    near, far = (compare_image("picture", picture, picture + noise * size, bound) for size in (0.001, 0.3))
    assert near.ok
    assert far.metrics is not None
    assert far.metrics.snr_db > bound.snr_db
    assert not far.ok
