"""The denoiser and the text encoder, trained together on latents: Stable Diffusion 1.5's layout, few channels."""

import numpy as np
import torch
from autoencoder import SIDE, save_grid
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from pool import SCENES, encode_pool, scenes_of
from scenes import BACKGROUNDS, SIZES, Library, held_out, prompt_words
from torch import Tensor, nn
from torch.nn import functional
from training import Run, Schedule, train
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hidiff_export.families.family import Family, Task, Width, text_encoder_configs, unet_config

SCHEDULE = Schedule(steps=5_400, batch=64, rate=1.5e-3, warmup=200, average=0.999)
PROMPT_DROPPED = 0.1
NOISY = 400
"""Half of a batch is at this timestep or a noisier one, where a subject's shape is decided."""


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
    """Stable Diffusion 1.5's, but for what is predicted: v (arXiv 2202.00512), which learns from noisy latents too.

    Where there is little but noise, predicting noise says next to nothing of the prompt.
    """
    # By name: what is given by place, diffusers takes for a default, which another class's `from_config` leaves out.
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def train_denoiser(
    library: Library,
    tokenizer: CLIPTokenizer,
    autoencoder: AutoencoderKL,
    run: Run,
    trained: StableDiffusionPipeline | None = None,
) -> tuple[Denoiser, float]:
    """Trains the two networks, from nothing or on from those of a `trained` model.

    Half of what they see are large subjects, which lie in the center: there a shape is learned in a fraction of the
    steps.

    Gives them and the factor by which latents are scaled to a deviation of one.
    """
    latents = encode_pool(library, autoencoder, run)
    scale = 1 / float(np.std(latents[:2000].astype(np.float32)))
    scenes = scenes_of(library, run)
    large = torch.tensor([number for number, scene in enumerate(scenes) if scene.size >= SIZES["large"][0]])
    prompts = [*(scene.prompt for scene in scenes), ""]
    tokens = torch.tensor(tokenizer(prompts, padding="max_length", truncation=True).input_ids)
    alphas = noise_schedule().alphas_cumprod
    torch.manual_seed(run.seed)
    network = Denoiser()
    if trained is not None:
        network.unet.load_state_dict(trained.unet.state_dict())
        network.text.load_state_dict(trained.text_encoder.state_dict())
    network.to(run.device)
    run.images(network.unet)
    predict = run.fast(network)

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
        rows = torch.randint(0, SCENES, (SCHEDULE.batch,), generator=generator)
        rows[: SCHEDULE.batch // 2] = large[rows[: SCHEDULE.batch // 2] % len(large)]
        clean = torch.from_numpy(latents[rows.numpy()].astype(np.float32)) * scale
        dropped = torch.rand(SCHEDULE.batch, generator=generator) < PROMPT_DROPPED
        times = torch.randint(0, 1000, (SCHEDULE.batch,), generator=generator)
        times[::2] = NOISY + times[::2] * (1000 - NOISY) // 1000
        noise = torch.randn(clean.shape, generator=generator)
        alpha = alphas[times].view(-1, 1, 1, 1)
        noised = run.images(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise)
        told = tokens[rows.where(~dropped, SCENES)]
        with run.precision():
            predicted = predict(noised, times.to(run.device), told.to(run.device))
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        return functional.mse_loss(predicted.float(), run.images(velocity))

    report = _reporter(library, tokenizer, autoencoder, scale, run.work)
    return train("denoiser", network, loss_at, SCHEDULE, run.work, report=report, every=500), scale


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
    """A prompt for every subject with its number: large, on the first background that it was never trained on."""
    prompts = []
    for subject, name in enumerate(library.names):
        place = next(place for place in range(len(BACKGROUNDS)) if held_out(subject, place))
        prompts.append((subject, prompt_words(name, size="large", background=BACKGROUNDS[place])))
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
