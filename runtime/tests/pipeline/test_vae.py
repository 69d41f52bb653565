"""Decoding and encoding in tiles, by sessions of a few lines: what goes in, what comes out, what is held meanwhile."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hidiff_runtime.errors import BundleError, EngineError, InputError
from hidiff_runtime.format.specs import GraphRecord, TensorSpec, VaeRecord
from hidiff_runtime.pipeline.vae import decode, encode, preview, sample
from hidiff_runtime.sampling.torch_rng import TorchGenerator

TILE, SCALING = 8, 0.25
ROWS = ((0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5), (0.1, 0.2, 0.3), (-0.1, 0.0, 0.1))


def record(overlap: int = 16) -> VaeRecord:
    latents, moments = TensorSpec("latents", (1, 4, TILE, TILE), "float32"), (1, 8, TILE, TILE)
    image = TensorSpec("image", (1, 3, 8 * TILE, 8 * TILE), "float32")
    decoder = GraphRecord("vae/decoder.onnx", {}, (latents,), (image,))
    encoder = GraphRecord("vae/encoder.onnx", {}, (image,), (TensorSpec("moments", moments, "float32"),))
    return VaeRecord(decoder, encoder, SCALING, overlap, ROWS)


def to_image(latents: np.ndarray) -> np.ndarray:
    """Works place by place, so that tiles fit together exactly; shapes as a decoder's."""
    return np.sin(latents[:, :3] + latents[:, 3:]).repeat(8, 2).repeat(8, 3).astype(np.float32)


def to_moments(image: np.ndarray) -> np.ndarray:
    """Means and logarithms of variances that follow the picture."""
    small = image[:, :, ::8, ::8]
    mean = np.concatenate([small, small.mean(1, keepdims=True)], 1)
    return np.concatenate([mean, 2 * mean - 1], 1).astype(np.float32)


@dataclass
class Network:
    """Stands in for an open bundle: lends sessions that compute, and notes what it is given."""

    compute: Callable[[np.ndarray], np.ndarray]
    vae: VaeRecord | None = field(default_factory=record)
    seen: list[np.ndarray] = field(default_factory=list)
    lent: list[str] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return Path("bundle")

    @property
    def manifest(self) -> Any:
        return SimpleNamespace(vae=self.vae)

    @contextmanager
    def network(self, name: str) -> Any:
        self.lent.append(name)
        yield self
        self.lent.append("closed")

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert self.vae is not None
        graph = self.vae.decoder if "latents" in inputs else self.vae.encoder
        (spec,) = graph.inputs
        assert {name: (array.shape, array.dtype.name) for name, array in inputs.items()} == {
            spec.name: (spec.shape, spec.dtype)
        }
        self.seen.append(inputs[spec.name])
        return {graph.outputs[0].name: self.compute(inputs[spec.name])}


def latents(height: int = 21, width: int = 13, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 4, height, width)).astype(np.float32)


def pictures(height: int = 21, width: int = 13, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (batch, 3, 8 * height, 8 * width)).astype(np.float32)


def test_decoding_divides_by_the_scaling_factor_and_fits_tiles_together() -> None:
    network, given = Network(to_image), latents()
    found = decode(network, given)
    np.testing.assert_allclose(found, to_image(given / SCALING), atol=1e-6)
    assert found.dtype == np.float32
    assert network.lent == ["vae_decoder", "closed"]
    assert len(network.seen) == 2 * 4 * 2


def test_tiles_that_disagree_change_over_gradually() -> None:
    levels = iter([0.0, 1.0])
    network = Network(lambda _tile: np.full((1, 3, 8 * TILE, 8 * TILE), next(levels), np.float32))
    (row,) = np.unique(decode(network, latents(TILE, 14, 1)), axis=2)[0, 0]
    assert row[: 6 * 8].max() == 0
    assert row[-6 * 8 :].min() == 1
    steps = np.diff(row)
    assert steps.max() < 1.01 / 16  # two latents overlap: 16 pixels
    assert steps.min() >= 0


def test_one_tile_is_the_picture_bit_for_bit() -> None:
    given = latents(TILE, TILE, 1)
    assert np.array_equal(decode(Network(to_image, record(0)), given), to_image(given / np.float32(SCALING)))


def test_encoding_draws_once_from_the_blended_moments() -> None:
    network, given = Network(to_moments), pictures()
    generator = TorchGenerator(5)
    found = encode(network, given, generator)
    moments = to_moments(given)
    noise = TorchGenerator(5)
    due = SCALING * (moments[:, :4] + np.exp(moments[:, 4:] / 2) * noise.randn((2, 4, 21, 13)))
    np.testing.assert_allclose(found, due, atol=1e-5)
    assert np.array_equal(generator.rand(3), noise.rand(3))  # nothing else was drawn
    assert network.lent == ["vae_encoder", "closed"]


def test_a_sample_clamps_the_variance() -> None:
    moments = np.zeros((1, 8, 4, 4), np.float32)
    moments[:, 4:6], moments[:, 6:] = 1e9, -1e9
    spread = np.abs(sample(moments, TorchGenerator(0)) / TorchGenerator(0).randn((1, 4, 4, 4)))
    np.testing.assert_allclose(spread[:, :2], np.exp(10), rtol=1e-5)
    np.testing.assert_allclose(spread[:, 2:], np.exp(-15), rtol=1e-5)


@pytest.mark.parametrize("side", [64, 128])
def test_memory_is_bounded_by_the_result_and_a_few_tiles(side: int) -> None:
    network, given = Network(to_image), latents(side, side, 1)
    decode(Network(to_image), latents(TILE, TILE, 1))  # what is imported or kept once does not count
    tracemalloc.start()
    found = decode(network, given)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest_in = max(array.nbytes for array in network.seen)
    largest_out = to_image(network.seen[0]).nbytes
    assert (largest_in, largest_out) == (4 * 4 * TILE**2, 4 * 3 * (8 * TILE) ** 2)  # whatever the picture's size
    assert most < found.nbytes + 2 * given.nbytes + len(network.seen) * largest_in + 8 * largest_out


def test_progress_is_told_of_every_tile_and_can_end_the_work() -> None:
    told: list[tuple[int, int]] = []
    decode(Network(to_image), latents(), progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 16) for done in range(1, 17)]

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    network = Network(to_image)
    with pytest.raises(KeyboardInterrupt):
        decode(network, latents(), progress=stop)
    assert len(network.seen) == 1


def test_a_preview_is_one_pixel_for_each_latent() -> None:
    given = np.zeros((2, 4, 3, 5), np.float32)
    given[1, 0] = 3  # beyond white
    given[1, 3] = 1
    found = preview(record(), given)
    assert (found.shape, found.dtype) == ((2, 3, 5, 3), np.uint8)
    assert found[0, 0, 0].tolist() == [115, 128, 140]
    assert found[1, 2, 4].tolist() == [255, 153, 178]


def test_a_bundle_without_a_vae_says_how_to_get_one() -> None:
    for call in (
        lambda bundle: decode(bundle, latents()),
        lambda bundle: encode(bundle, pictures(), TorchGenerator(0)),
    ):
        with pytest.raises(BundleError, match="no VAE") as caught:
            call(Network(to_image, None))
        assert "vae: true" in caught.value.advice


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (latents()[0], r"takes \[batch, 4"),
        (latents()[:, :3], r"takes \[batch, 4"),
        (latents(4, 30), "no longer than the picture"),
    ],
    ids=["no batch", "three channels", "smaller than a tile"],
)
def test_latents_of_another_shape(array: np.ndarray, words: str) -> None:
    with pytest.raises(InputError, match=words):
        decode(Network(to_image), array)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (pictures()[0], r"takes \[batch, 3"),
        (pictures()[:, :1], r"takes \[batch, 3"),
        (pictures()[..., :-1], "multiples of 8"),
        (pictures(4, 30), "no longer than the picture"),
    ],
    ids=["no batch", "grey", "an odd side", "smaller than a tile"],
)
def test_pictures_of_another_shape(array: np.ndarray, words: str) -> None:
    with pytest.raises(InputError, match=words):
        encode(Network(to_moments), array, TorchGenerator(0))


def test_values_that_are_no_numbers_are_no_picture() -> None:
    network = Network(lambda _tile: np.full((1, 3, 8 * TILE, 8 * TILE), np.nan, np.float32))
    with pytest.raises(EngineError, match="no numbers"):
        decode(network, latents())
