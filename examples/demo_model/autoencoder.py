"""The autoencoder: pictures to latents of an eighth of their size and back, with the layout of Stable Diffusion's."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from scenes import Library, draw_scene, render
from torch import Tensor
from torch.nn import functional
from training import Schedule, train

from hidiff_export.families.family import Family, Width, vae_config

SIDE = 128
"""The side, in pixels, of the pictures that the model learns from."""
CROP = 64
SCHEDULE = Schedule(steps=15_000, batch=16, rate=1.5e-3)


def new_autoencoder() -> AutoencoderKL:
    """Returns the demo model's autoencoder, untrained."""
    return AutoencoderKL(**{**vae_config(Family.SD15, Width.DEMO), "sample_size": SIDE})


def pictures(library: Library, seeds: list[tuple[int, ...]], crop: int | None = None) -> Tensor:
    """The scenes of these seeds as the autoencoder takes them: float32 from -1 to 1, batch x 3 x side x side."""
    stack = []
    for seed in seeds:
        picture = render(library, draw_scene(library, seed), SIDE, seed)
        if crop is not None:
            top, left = np.random.default_rng([*seed, 2]).integers(0, SIDE - crop + 1, 2)
            picture = picture[top : top + crop, left : left + crop]
        stack.append(picture)
    return torch.from_numpy(np.stack(stack)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_autoencoder(library: Library, work: Path, seed: int) -> AutoencoderKL:
    """Trains on crops, which show in an hour what whole pictures do in four, and in every fifth step on whole ones."""
    torch.manual_seed(seed)
    network = new_autoencoder()

    def loss_at(step: int) -> Tensor:
        whole = step % 5 == 4
        count = SCHEDULE.batch // 4 if whole else SCHEDULE.batch
        seeds = [(seed, 10, step, index) for index in range(count)]
        batch = pictures(library, seeds, None if whole else CROP).to(memory_format=torch.channels_last)
        noise = torch.Generator().manual_seed(step)
        latents = network.encode(batch).latent_dist
        drawn = network.decode(latents.sample(generator=noise)).sample
        return _loss(drawn, batch) + 1e-6 * latents.kl().mean()

    network.to(memory_format=torch.channels_last)
    return train("autoencoder", network, loss_at, SCHEDULE, work, report=_reporter(library, work, seed))


def _loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Absolute error of the pixels and, at three scales, of their differences: edges matter more than shades."""
    loss = functional.l1_loss(drawn, wanted) + functional.mse_loss(drawn, wanted)
    for _ in range(3):
        for axis in (2, 3):
            loss = loss + functional.l1_loss(drawn.diff(dim=axis), wanted.diff(dim=axis))
        drawn, wanted = functional.avg_pool2d(drawn, 2), functional.avg_pool2d(wanted, 2)
    return loss


def _reporter(library, work, seed):
    batch = pictures(library, [(seed, 11, index) for index in range(8)])

    def report(network: AutoencoderKL, step: int) -> None:
        with torch.no_grad():
            latents = network.encode(batch).latent_dist.mean
            drawn = network.decode(latents).sample
        error = functional.mse_loss(drawn, batch).item()
        print(
            f"autoencoder {step}: {10 * np.log10(4 / error):.2f} dB, latents' deviation {latents.std():.3f}", flush=True
        )
        save_grid(torch.cat([batch, drawn]), work / f"autoencoder-{step}.png")

    return report


def save_grid(batch: Tensor, path: Path, columns: int = 8) -> None:
    """Writes pictures from -1 to 1 as one PNG, `columns` in a row."""
    pixels = ((batch.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(pixels[at : at + columns]), 1) for at in range(0, len(pixels), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)
