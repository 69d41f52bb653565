"""The decoder alone, for longer: the encoder stands, so that it learns beside the denoiser, from the same latents."""

import numpy as np
import torch
from autoencoder import grid_reporter, pictures, reconstruction_loss
from diffusers import AutoencoderKL
from pool import SCENES, encode_pool, seed_of
from scenes import Library
from torch import Tensor
from training import Run, Schedule, train

SCHEDULE = Schedule(steps=3_000, batch=5, rate=1e-3)


def train_decoder(library: Library, autoencoder: AutoencoderKL, run: Run) -> AutoencoderKL:
    """Trains the autoencoder's second half on whole scenes: a crop of latents would lack what they say of its edges."""
    latents = encode_pool(library, autoencoder, run)
    autoencoder.requires_grad_(False)
    autoencoder.decoder.requires_grad_(True)
    autoencoder.post_quant_conv.requires_grad_(True)

    def loss_at(step: int) -> Tensor:
        numbers = np.random.default_rng((run.seed, 40, step)).integers(0, SCENES, SCHEDULE.batch)
        batch = pictures(library, [seed_of(run, int(number)) for number in numbers])
        drawn = autoencoder.decode(run.images(torch.from_numpy(latents[numbers].astype(np.float32)))).sample
        return reconstruction_loss(drawn, run.images(batch))

    run.images(autoencoder)
    report = grid_reporter(library, run, "decoder")
    return train("decoder", autoencoder, loss_at, SCHEDULE, run.work, report=report, every=1000)
