"""The scenes that denoiser and decoder learn from, encoded once: the encoder is done by then."""

import numpy as np
import torch
from autoencoder import pictures
from diffusers import AutoencoderKL
from scenes import Library, Scene, draw_scene
from training import Run

SCENES = 20_000
"""How many scenes are encoded ahead."""


def seed_of(run: Run, number: int) -> tuple[int, ...]:
    """Returns the seed that the pool's scene of this number follows from."""
    return (run.seed, 20, number)


def encode_pool(library: Library, autoencoder: AutoencoderKL, run: Run) -> np.ndarray:
    """Returns the pool's latents: float16, `SCENES` x 4 x side x side, not yet scaled."""
    path = run.work / "latents.npy"
    if not path.exists():
        autoencoder = autoencoder.to(run.device)
        parts = []
        for at in range(0, SCENES, 50):
            batch = pictures(library, [seed_of(run, number) for number in range(at, at + 50)]).to(run.device)
            with torch.no_grad(), run.precision():
                parts.append(autoencoder.encode(batch).latent_dist.mean.cpu().half().numpy())
            if at % 5000 == 0:
                print(f"latents {at}/{SCENES}", flush=True)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, np.concatenate(parts))
        partial.replace(path)
    return np.load(path, mmap_mode="r")


def scenes_of(library: Library, run: Run) -> list[Scene]:
    """Returns the pool's scenes in their order."""
    return [draw_scene(library, seed_of(run, number)) for number in range(SCENES)]
