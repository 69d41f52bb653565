"""The VAE's graphs, engines and tiles against diffusers' ``AutoencoderKL``, each with a control that must fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents

from hidiff_export.checkpoints.state_dict import LazyStateDict, shapes_of
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.families.vae_tiling import VaeTiles
from hidiff_export.recipe.field_types import Precision
from hidiff_export.reference.tolerances import TOLERANCES, Boundary
from hidiff_runtime.format.specs import GraphRecord
from hidiff_runtime.pipeline.vae import decode, decode_tiles, encode, encode_tiles
from hidiff_runtime.sampling.torch_rng import TorchGenerator
from hidiff_runtime.verification.comparison import Metrics, compare
from tests.vaes import CONFIG, TILES, WEIGHTS, Opened, network, record

DECODER = TOLERANCES[Boundary.VAE_DECODER, "float32"]
ENCODER = TOLERANCES[Boundary.VAE_ENCODER, "float32"]
SCALING = CONFIG["scaling_factor"]
ROWS, COLUMNS, OVERLAP = TILES.height // 8, TILES.width // 8, TILES.overlap // 8
HEIGHT, WIDTH = 23, 15  # in latents: three tiles by three, the first of which reach into the third
WHOLE = replace(record(), overlap=0)


@pytest.fixture(scope="module")
def vae(vae_folder: Path) -> Any:
    return network(vae_folder)


def latents(height: int = HEIGHT, width: int = WIDTH, batch: int = 1) -> np.ndarray:
    return torch.randn((batch, 4, height, width), generator=torch.Generator().manual_seed(0)).numpy()


def pictures(height: int = HEIGHT, width: int = WIDTH, batch: int = 1) -> np.ndarray:
    """Smooth ones, from -1 to 1."""
    coarse = torch.rand((batch, 3, 6, 6), generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(8 * height, 8 * width), mode="bicubic").clamp(-1, 1).numpy()


@torch.no_grad()
def decoded(vae: Any, scaled: np.ndarray) -> np.ndarray:
    return vae.decode(torch.from_numpy(scaled) / SCALING, return_dict=False)[0].numpy()


@torch.no_grad()
def moments(vae: Any, image: np.ndarray) -> np.ndarray:
    return vae.encode(torch.from_numpy(image)).latent_dist.parameters.numpy()


def psnr(found: np.ndarray, due: np.ndarray) -> float:
    """In decibels, of pictures from -1 to 1."""
    return float(10 * np.log10(4 / np.mean((found.astype(np.float64) - due) ** 2)))


def starts(length: int, tile: int) -> list[int]:
    """Written apart from the runtime: as few tiles as reach across, at equal distances."""
    count = 1
    while count * tile - (count - 1) * OVERLAP < length:
        count += 1
    return [int(place) for place in np.floor(np.arange(count) * (length - tile) / max(1, count - 1))]


def weight(begins: list[int], index: int, tile: int, scale: int) -> np.ndarray:
    """A tile's ramp along one axis, place by place: from the edge that a neighbour reaches over, up to 1."""
    begin, end = begins[index] * scale, (begins[index] + tile) * scale
    ramp = np.ones(end - begin)
    for place in range(begin, end):
        if index > 0 and place < (reach := (begins[index - 1] + tile) * scale):
            ramp[place - begin] *= min(1, (place + 0.5 - begin) / (reach - begin))
        if index + 1 < len(begins) and place >= (reach := begins[index + 1] * scale):
            ramp[place - begin] = min(ramp[place - begin], (end - place - 0.5) / (end - reach))
    return ramp


def by_tiles(
    compute: Callable[[np.ndarray], np.ndarray],
    array: np.ndarray,
    scales: tuple[int, int],
    *,
    normalize: bool = True,
    shift: int = 0,
) -> np.ndarray:
    """Tile by tile in PyTorch, blended in float64; wrong on purpose without ``normalize`` or with a ``shift``."""
    taken, made = scales
    tall, wide = starts(HEIGHT, ROWS), starts(WIDTH, COLUMNS)
    total, weights = (np.zeros((*sizes, HEIGHT * made, WIDTH * made)) for sizes in ((1, 8), ()))
    for row, top in enumerate(tall):
        for column, left in enumerate(wide):
            moved = left - shift if (row, column) == (1, 1) else left
            tile = array[:, :, top * taken : (top + ROWS) * taken, moved * taken : (moved + COLUMNS) * taken]
            result = compute(np.ascontiguousarray(tile)).astype(np.float64)
            ramp = weight(tall, row, ROWS, made)[:, None] * weight(wide, column, COLUMNS, made)
            place = (slice(top * made, (top + ROWS) * made), slice(left * made, (left + COLUMNS) * made))
            total[:, : result.shape[1], place[0], place[1]] += result * ramp
            weights[place] += ramp
    total = total[:, : result.shape[1]]
    return total / weights if normalize else total


def test_the_engines_are_diffusers_halves(vae_folder: Path, vae: Any) -> None:
    given, image = latents(ROWS, COLUMNS), pictures(ROWS, COLUMNS)
    opened = Opened(vae_folder, WHOLE)
    found = decode(opened, given)
    assert compare("decoder", decoded(vae, given), found, DECODER).ok
    with opened.network("vae_encoder") as session:
        found_moments = encode_tiles(session, WHOLE, image)
    assert compare("encoder", moments(vae, image), found_moments, ENCODER).ok
    # The controls: latents without the scaling factor, and a picture in another order of colours.
    assert not compare("decoder", decoded(vae, given * np.float32(SCALING)), found, DECODER).ok
    assert not compare("encoder", moments(vae, image[:, ::-1].copy()), found_moments, ENCODER).ok


def test_tiles_are_what_pytorch_makes_of_them_one_by_one(vae_folder: Path, vae: Any) -> None:
    given = latents()
    found = decode(Opened(vae_folder), given)
    tile = partial(decoded, vae)
    assert compare("decoder", by_tiles(tile, given, (1, 8)), found, DECODER).ok
    for wrong in (
        by_tiles(tile, given, (1, 8), normalize=False),
        by_tiles(tile, given, (1, 8), shift=1),
        by_tiles(tile, given * np.float32(SCALING), (1, 8)),
        decoded(vae, given),
    ):
        assert not compare("decoder", wrong, found, DECODER).ok


def test_encoded_tiles_are_blended_before_a_sample_is_drawn(vae_folder: Path, vae: Any) -> None:
    image = pictures()
    found = encode(Opened(vae_folder), image, TorchGenerator(3))
    blended = by_tiles(partial(moments, vae), image, (8, 1))
    noise = torch.randn((1, 4, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(3)).numpy()
    mean, deviation = blended[:, :4], np.exp(0.5 * np.clip(blended[:, 4:], -30, 20))
    assert compare("encoder", SCALING * (mean + deviation * noise), found, ENCODER).ok
    assert not compare("encoder", SCALING * mean, found, ENCODER).ok
    assert not compare("encoder", mean + deviation * noise, found, ENCODER).ok


def test_a_sample_is_the_one_that_diffusers_pipelines_draw(vae_folder: Path, vae: Any) -> None:
    image = pictures(ROWS, COLUMNS, batch=2)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        due = SCALING * retrieve_latents(vae.encode(torch.from_numpy(image)), generator, "sample").numpy()
    ours = TorchGenerator(11)
    found = encode(Opened(vae_folder, WHOLE), image, ours)
    assert compare("encoder", due, found, ENCODER).ok
    # Both streams go on from the same place.
    np.testing.assert_allclose(ours.randn((16,)), torch.randn(16, generator=generator).numpy(), atol=1e-5)
    one_by_one = np.concatenate([encode(Opened(vae_folder, WHOLE), one[None], TorchGenerator(11)) for one in image])
    assert not compare("encoder", due, one_by_one, ENCODER).ok


def test_tiles_come_nearer_to_the_whole_than_diffusers_own(vae_folder: Path, vae: Any) -> None:
    # Groups are normalized, and places attend, within a tile: no tiling gives the picture that the whole gives.
    side = TILES.height
    given = latents(48, 48)
    whole = decoded(vae, given)
    specs = (VaeTiles(side, side, 0).decoder_inputs(), VaeTiles(side, side, 0).decoder_outputs())
    square = replace(record(), decoder=GraphRecord("", {}, *specs), overlap=side // 4)
    session = SimpleNamespace(run=lambda inputs: {"image": decoded(vae, inputs["latents"] * np.float32(SCALING))})
    found = psnr(decode_tiles(session, square, given), whole)
    theirs = network(vae_folder)
    theirs.enable_tiling()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = side, side // 8
    due = psnr(decoded(theirs, given), whole)
    assert due > 20  # else nothing is compared
    assert found > due, f"{found:.1f} dB, diffusers' tiles {due:.1f} dB"


def test_memory_does_not_grow_with_the_picture(vae_folder: Path) -> None:
    sizes = []
    for height in (ROWS, 4 * ROWS):
        opened = Opened(vae_folder)
        decode(opened, latents(height, COLUMNS))
        sizes.append({array.nbytes for array in (*opened.seen, *opened.given)})
    assert sizes[0] == sizes[1] == {4 * 4 * ROWS * COLUMNS, 4 * 3 * TILES.height * TILES.width}


def test_a_decoder_that_float16_turns_black_is_none_here(vae_folder: Path, vae: Any, tmp_path: Path) -> None:
    # As SDXL's: a stream beyond float16's range, which the last normalization brings back.
    factor, grown = 1e6, ("decoder.conv_in.weight", "decoder.conv_in.bias")
    tensors = {name: tensor * factor if name in grown else tensor for name, tensor in vae.state_dict().items()}
    for name in ("decoder.onnx", "decoder.onnxruntime.onnx"):
        shutil.copy(vae_folder / name, tmp_path / name)
    WeightStore.write(LazyStateDict(shapes_of(tensors), tensors.__getitem__), tmp_path / WEIGHTS, Precision.FLOAT32)
    given, large = latents(ROWS, COLUMNS), network(tmp_path)
    found = decode(Opened(tmp_path, WHOLE), given)
    assert Metrics.of(decoded(large, given), found).snr_db >= DECODER.snr_db
    assert found.std() > 0.1
    with torch.no_grad():
        half = large.half().decode(torch.from_numpy(given).half() / SCALING).sample
    assert not torch.isfinite(half).all()
