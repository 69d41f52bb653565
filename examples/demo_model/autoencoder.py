"""The autoencoder: pictures to latents of an eighth of their size and back, with the layout of Stable Diffusion's."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from scenes import Library, draw_scene, render
from torch import Tensor, nn
from torch.nn import functional
from training import Run, Schedule, train

from hidiff_export.families.family import Family, Width, vae_config

SIDE = 128
"""The side, in pixels, of the pictures that the model learns from."""
CROP = 64
SCHEDULE = Schedule(steps=4_500, batch=16, rate=2e-3)


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


def train_autoencoder(library: Library, run: Run) -> AutoencoderKL:
    """Trains on crops, which show in an hour what whole pictures do in four, and in every fifth step on whole ones."""
    torch.manual_seed(run.seed)
    network = run.images(new_autoencoder())

    def loss_at(step: int) -> Tensor:
        whole = step % 5 == 4
        count = SCHEDULE.batch // 4 if whole else SCHEDULE.batch
        seeds = [(run.seed, 10, step, index) for index in range(count)]
        batch = run.images(pictures(library, seeds, None if whole else CROP))
        noise = torch.Generator().manual_seed(step)
        latents = network.encode(batch).latent_dist
        drawn = network.decode(latents.sample(generator=noise)).sample
        return reconstruction_loss(drawn, batch) + 1e-6 * latents.kl().mean()

    report = grid_reporter(library, run, "autoencoder")
    return train("autoencoder", network, loss_at, SCHEDULE, run.work, report=report)


def reconstruction_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Returns the error of the pixels and, at three scales, of their differences, without which edges are soft."""
    loss = 3 * functional.l1_loss(drawn, wanted) + functional.mse_loss(drawn, wanted)
    for _ in range(3):
        for axis in (2, 3):
            loss = loss + functional.l1_loss(drawn.diff(dim=axis), wanted.diff(dim=axis))
        drawn, wanted = functional.avg_pool2d(drawn, 2), functional.avg_pool2d(wanted, 2)
    return loss


def grid_reporter(library: Library, run: Run, name: str) -> Callable[[nn.Module, int], None]:
    """Returns what prints the error on unseen scenes and writes them, above what became of them, as a PNG."""
    batch = run.images(pictures(library, [(run.seed, 11, index) for index in range(8)]))

    def report(network: nn.Module, step: int) -> None:
        with torch.no_grad():
            latents = network.encode(batch).latent_dist.mean
            drawn = network.decode(latents).sample
        error = functional.mse_loss(drawn, batch).item()
        print(f"{name} {step}: {10 * np.log10(4 / error):.2f} dB, latents' deviation {latents.std():.3f}", flush=True)
        save_grid(torch.cat([batch, drawn]), run.work / f"{name}-{step}.png")

    return report


def save_grid(batch: Tensor, path: Path, columns: int = 8) -> None:
    """Writes pictures from -1 to 1 as one PNG, `columns` in a row."""
    pixels = ((batch.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = [np.concatenate(list(pixels[at : at + columns]), 1) for at in range(0, len(pixels), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)
