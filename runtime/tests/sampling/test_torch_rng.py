"""The generator against values that torch 2.13 gave, and the rules that need no torch."""

from __future__ import annotations

import numpy as np
import pytest

from hidiff_runtime.errors import InputError
from hidiff_runtime.sampling.torch_rng import TorchGenerator, draw_window_shifts

# One stream a seed: rand(3), randn(3) (one by one), randn(18)[[0, 1, 2, 15, 16, 17]] (blocks, with a remainder),
# randn(2), of which the first is the normal that randn(3) left over.
DRAWN = {
    0: (
        [0.49625659, 0.768221796, 0.0884774327],
        [0.364338189, 0.13439633, 0.16421625],
        [-0.204101726, -0.0885314271, 0.87438184, -0.289667696, 0.0525074862, 0.522860467],
        [0.305761009, 0.851165295],
    ),
    -1: (
        [0.993799388, 0.571306348, 0.570008039],
        [-1.72701275, 1.32179046, 0.315195173],
        [0.219066009, 1.87585175, 0.245612696, 0.681817651, -1.10060334, 1.56224072],
        [1.59724474, 1.66618967],
    ),
    2**32 + 7: (
        [0.53492254, 0.198803186, 0.659211695],
        [-0.0325519741, 1.0110544, 1.77149379],
        [0.98611182, 0.609473467, 0.0874783769, 1.64093328, -1.05668414, -0.261586726],
        [0.429908127, -1.1137557],
    ),
}


@pytest.mark.parametrize("seed", DRAWN)
def test_mixed_draws_from_one_stream_are_torchs(seed: int) -> None:
    uniforms, singles, blocks, left_over = DRAWN[seed]
    generator = TorchGenerator(seed)
    assert np.array_equal(generator.rand(3), np.array(uniforms, dtype=np.float32))
    np.testing.assert_allclose(generator.randn(3), singles, rtol=0, atol=5e-7)
    np.testing.assert_allclose(generator.randn(18)[[0, 1, 2, 15, 16, 17]], blocks, rtol=0, atol=5e-7)
    np.testing.assert_allclose(generator.randn((2,)), left_over, rtol=0, atol=5e-7)


@pytest.mark.parametrize("shape", [(), 0, 5, (0, 4), (2, 3), (1, 4, 8, 8)])
@pytest.mark.parametrize("draw", ["rand", "randn"])
def test_shape_and_dtype(draw: str, shape: int | tuple[int, ...]) -> None:
    drawn = getattr(TorchGenerator(1), draw)(shape)
    assert drawn.dtype == np.float32
    assert drawn.shape == ((shape,) if isinstance(shape, int) else shape)


def test_only_the_lowest_32_bits_of_a_seed_count() -> None:
    assert np.array_equal(TorchGenerator(2**63).rand(4), TorchGenerator(0).rand(4))
    assert np.array_equal(TorchGenerator(2**64 - 1).rand(4), TorchGenerator(-1).rand(4))
    assert np.array_equal(TorchGenerator(np.int64(3)).rand(4), TorchGenerator(3).rand(4))
    assert not np.array_equal(TorchGenerator(1).rand(4), TorchGenerator(0).rand(4))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.0, "1", None, True])
def test_a_seed_torch_refuses_is_refused(seed: object) -> None:
    with pytest.raises(InputError, match="not a seed") as caught:
        TorchGenerator(seed)  # type: ignore[arg-type]
    assert repr(seed) in str(caught.value)


def test_shifts_take_one_uniform_each() -> None:
    generator, uniforms = TorchGenerator(9), TorchGenerator(9).rand(500)
    shifts = draw_window_shifts(generator, 500)
    assert shifts.dtype == np.int32
    assert shifts.shape == (500,)
    assert set(shifts.tolist()) == {0, 1, 2, 3}
    expected = [0 if r <= 0.25 else 1 if r <= 0.5 else 2 if r <= 0.75 else 3 for r in uniforms.tolist()]
    assert shifts.tolist() == expected
    assert np.array_equal(generator.rand(2), TorchGenerator(9).rand(502)[-2:])


def test_a_shift_at_an_edge_is_the_lower_one() -> None:
    class Edges(TorchGenerator):
        def rand(self, shape: int | tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            return np.array([0, 0.25, 0.5, 0.75, np.nextafter(np.float32(0.25), 1)], dtype=np.float32).reshape(shape)

    assert draw_window_shifts(Edges(0), 5).tolist() == [0, 0, 1, 2, 1]
