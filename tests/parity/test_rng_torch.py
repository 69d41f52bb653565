"""The generator against torch's own, draw by draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hidiff_runtime.sampling.torch_rng import SEED_MAX, SEED_MIN, TorchGenerator, draw_window_shifts

SEEDS = st.integers(SEED_MIN, SEED_MAX)
DRAWS = st.lists(st.tuples(st.sampled_from(["rand", "randn"]), st.integers(0, 70)), min_size=1, max_size=8)

# Without AVX2 torch takes another road through the same formula.
ATOL = 5e-7 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else 3e-6


def torch_generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, draws=DRAWS)
def test_any_sequence_of_draws_from_any_seed(seed: int, draws: list[tuple[str, int]]) -> None:
    ours, theirs = TorchGenerator(seed), torch_generator(seed)
    for kind, size in draws:
        got = getattr(ours, kind)(size)
        expected = getattr(torch, kind)(size, generator=theirs).numpy()
        if kind == "rand":
            assert np.array_equal(got, expected)
        else:
            np.testing.assert_allclose(got, expected, rtol=0, atol=ATOL)


def test_a_million_normals_and_the_stream_after_them() -> None:
    ours, theirs = TorchGenerator(3), torch_generator(3)
    shape = (1, 4, 512, 512)
    np.testing.assert_allclose(ours.randn(shape), torch.randn(shape, generator=theirs).numpy(), rtol=0, atol=ATOL)
    assert np.array_equal(ours.rand(9), torch.rand(9, generator=theirs).numpy())


def test_torchs_global_generator_gives_the_same_stream() -> None:
    torch.manual_seed(-7)
    assert np.array_equal(TorchGenerator(-7).rand(100), torch.rand(100).numpy())


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_shifts_equal_one_rand_a_block(seed: int) -> None:
    theirs = torch_generator(seed)
    rolls = [torch.rand(1, generator=theirs).item() for _ in range(10)]
    expected = [0 if r <= 0.25 else 1 if r <= 0.5 else 2 if r <= 0.75 else 3 for r in rolls]
    assert draw_window_shifts(TorchGenerator(seed), 10).tolist() == expected


def test_another_seed_or_a_draw_too_many_is_noticed() -> None:
    expected = torch.randn(64, generator=torch_generator(1)).numpy()
    assert np.abs(TorchGenerator(2).randn(64) - expected).max() > 0.1
    late = TorchGenerator(1)
    late.rand(1)
    assert np.abs(late.randn(64) - expected).max() > 0.1


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_torch_refuses_the_seeds_that_are_refused_here(seed: int) -> None:
    with pytest.raises(ValueError, match="Overflow"):
        torch_generator(seed)
