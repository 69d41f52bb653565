"""The denoiser and the text encoder, trained together on latents: Stable Diffusion 1.5's layout, few channels."""

from pathlib import Path

import numpy as np
import torch
from autoencoder import SIDE, pictures, save_grid
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from scenes import BACKGROUNDS, Library, draw_scene, held_out, prompt_words
from torch import Tensor, nn
from training import Schedule, train
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hidiff_export.families.family import Family, Task, Width, text_encoder_configs, unet_config

POOL = 60_000
"""How many scenes are encoded ahead."""
SCHEDULE = Schedule(steps=16_000, batch=32, rate=1e-3, warmup=500, average=0.9995)
PROMPT_DROPPED = 0.1
MOST_SNR = 5.0
"""Signal-to-noise ratio from which on a timestep counts less: min-SNR weighting, arXiv 2303.09556."""


class Denoiser(nn.Module):
    """The two networks that learn together."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(**unet_config(Family.SD15, Task.TEXT_TO_IMAGE, Width.DEMO))
        # On a CPU the fused attention's backward pass in bfloat16 takes ten times as long as these matrix products.
        self.unet.set_attn_processor(AttnProcessor())
        config = text_encoder_configs(Family.SD15, Width.DEMO)["text_encoder"]
        self.text = CLIPTextModel(CLIPTextConfig(**config))

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(latents, timesteps, self.text(tokens).last_hidden_state).sample


def noise_schedule() -> DDPMScheduler:
    return DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, steps_offset=1)


def encode_pool(library: Library, autoencoder: AutoencoderKL, work: Path, seed: int) -> tuple[np.ndarray, list[str]]:
    """The latents (float16, POOL x 4 x side x side, not yet scaled) and prompts of the scenes to learn from."""
    path = work / "latents.npy"
    seeds = [(seed, 20, index) for index in range(POOL)]
    if not path.exists():
        parts = []
        for at in range(0, POOL, 50):
            batch = pictures(library, seeds[at : at + 50]).to(memory_format=torch.channels_last)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                parts.append(autoencoder.encode(batch).latent_dist.mean.half().numpy())
            if at % 5000 == 0:
                print(f"latents {at}/{POOL}", flush=True)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, np.concatenate(parts))
        partial.replace(path)
    return np.load(path, mmap_mode="r"), [draw_scene(library, seed).prompt for seed in seeds]


def train_denoiser(
    library: Library, tokenizer: CLIPTokenizer, autoencoder: AutoencoderKL, work: Path, seed: int
) -> tuple[Denoiser, float]:
    """Trains the two networks; gives them and the factor by which latents are scaled to a deviation of one."""
    latents, prompts = encode_pool(library, autoencoder, work, seed)
    scale = 1 / float(np.std(latents[:2000].astype(np.float32)))
    tokens = torch.tensor(tokenizer([*prompts, ""], padding="max_length", truncation=True).input_ids)
    alphas = noise_schedule().alphas_cumprod
    torch.manual_seed(seed)
    network = Denoiser()

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(0, POOL, (SCHEDULE.batch,), generator=generator)
        clean = torch.from_numpy(latents[rows.numpy()].astype(np.float32)) * scale
        dropped = torch.rand(SCHEDULE.batch, generator=generator) < PROMPT_DROPPED
        times = torch.randint(0, 1000, (SCHEDULE.batch,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        alpha = alphas[times].view(-1, 1, 1, 1)
        noised = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            predicted = network(noised.to(memory_format=torch.channels_last), times, tokens[rows.where(~dropped, POOL)])
        ratio = alpha / (1 - alpha)
        return (ratio.clamp(max=MOST_SNR) / ratio * (predicted.float() - noise) ** 2).mean()

    network.unet.to(memory_format=torch.channels_last)
    report = _reporter(library, tokenizer, autoencoder, scale, work)
    return train("denoiser", network, loss_at, SCHEDULE, work, report=report, every=1000), scale


def pipeline(network: Denoiser, tokenizer: CLIPTokenizer, autoencoder: AutoencoderKL, scale: float):
    """The whole model as diffusers' own pipeline."""
    from diffusers import DDIMScheduler

    autoencoder.register_to_config(scaling_factor=scale)
    scheduler = DDIMScheduler.from_config(noise_schedule().config, set_alpha_to_one=False)
    pipe = StableDiffusionPipeline(
        autoencoder, network.text, tokenizer, network.unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def held_out_prompts(library: Library) -> list[tuple[int, str]]:
    """A prompt for every subject, on the first background that it was never trained on, with the subject's number."""
    prompts = []
    for subject, name in enumerate(library.names):
        place = next(place for place in range(len(BACKGROUNDS)) if held_out(subject, place))
        prompts.append((subject, prompt_words(name, background=BACKGROUNDS[place])))
    return prompts


def _reporter(library, tokenizer, autoencoder, scale, work):
    prompts = [prompt for _, prompt in held_out_prompts(library)[::8]][:24]

    def report(network: Denoiser, step: int) -> None:
        pipe = pipeline(network, tokenizer, autoencoder, scale)
        drawn = pipe(
            prompts,
            height=SIDE,
            width=SIDE,
            num_inference_steps=20,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        save_grid(drawn * 2 - 1, work / f"denoiser-{step:06}.png")

    return report
