"""The model families: their tasks, and the configurations of their networks as published.

Everything here is data about published checkpoints; nothing imports torch.
"""

from __future__ import annotations

from enum import Enum
from typing import Any


class Family(str, Enum):
    """A checkpoint family that HiDiffusion knows how to change."""

    SD15 = "sd15"
    SD21 = "sd21"
    SDXL = "sdxl"
    SDXL_TURBO = "sdxl-turbo"
    PLAYGROUND = "playground"

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet has SDXL's architecture: three levels, pooled text embeddings and time ids."""
        return self not in (Family.SD15, Family.SD21)

    @property
    def has_large_scores(self) -> bool:
        """Whether checkpoints score keys in the thousands: SD2.1's products exceed float16's 65504."""
        return self is Family.SD21


class Task(str, Enum):
    """What the UNet is asked to do; decides its input channels, its thresholds and whether a ControlNet joins in."""

    TEXT_TO_IMAGE = "text-to-image"
    IMAGE_TO_IMAGE = "image-to-image"
    INPAINTING = "inpainting"
    CONTROLNET = "controlnet"
    CONTROLNET_IMAGE_TO_IMAGE = "controlnet-image-to-image"

    @property
    def has_control(self) -> bool:
        """Whether ControlNet residuals come in."""
        return self in (Task.CONTROLNET, Task.CONTROLNET_IMAGE_TO_IMAGE)


class Width(str, Enum):
    """How wide the networks are: as published, or a few channels on the same module layout.

    Those of ``demo`` are the demo model's, as few as can still learn to draw.
    """

    FULL = "full"
    TINY = "tiny"
    DEMO = "demo"


LATENT_CHANNELS = 4
PIXELS_PER_LATENT = 8
_INPAINTING_CHANNELS = 2 * LATENT_CHANNELS + 1  # latents, mask, latents of the masked picture

_FULL_SD = {"block_out_channels": [320, 640, 1280, 1280], "norm_num_groups": 32, "sample_size": 64}
_TINY_SD = {"block_out_channels": [32, 48, 64, 64], "norm_num_groups": 8, "sample_size": 16}
_SD_TYPES = {
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
_SDXL = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}

# diffusers calls the number of heads "attention_head_dim".
_ARCHITECTURES: dict[tuple[str, Width], dict[str, Any]] = {
    ("sd15", Width.FULL): {**_SD_TYPES, **_FULL_SD, "attention_head_dim": 8, "cross_attention_dim": 768},
    ("sd15", Width.TINY): {**_SD_TYPES, **_TINY_SD, "attention_head_dim": 4, "cross_attention_dim": 32},
    ("sd15", Width.DEMO): {
        **_SD_TYPES,
        "block_out_channels": [48, 64, 72, 72],
        "norm_num_groups": 8,
        "sample_size": 16,
        "attention_head_dim": [3, 4, 3, 3],
        "cross_attention_dim": 96,
    },
    ("sd21", Width.FULL): {
        **_SD_TYPES,
        **_FULL_SD,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    ("sd21", Width.TINY): {
        **_SD_TYPES,
        **_TINY_SD,
        "attention_head_dim": [2, 3, 4, 4],
        "cross_attention_dim": 32,
        "use_linear_projection": True,
    },
    ("sdxl", Width.FULL): {
        **_SDXL,
        "block_out_channels": [320, 640, 1280],
        "norm_num_groups": 32,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    ("sdxl", Width.TINY): {
        **_SDXL,
        "block_out_channels": [32, 48, 64],
        "norm_num_groups": 8,
        "sample_size": 16,
        "transformer_layers_per_block": [1, 2, 2],
        "attention_head_dim": [2, 3, 4],
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
}
# CLIP ViT-L; OpenCLIP ViT-H without its last layer; OpenCLIP bigG. Tiny ones have heads of 16, the least kernels take.
_CLIP = {
    "bos_token_id": 0,
    "eos_token_id": 2,  # as published; the tokenizer's own is the last token, and transformers knows this mistake
    "hidden_act": "gelu",
    "max_position_embeddings": 77,
    "pad_token_id": 1,
}
_FULL_L = {
    **_CLIP,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
_TINY_CLIP = {**_CLIP, "intermediate_size": 64, "num_hidden_layers": 3, "projection_dim": 32, "vocab_size": 514}
_TINY_XL_CLIP = {**_TINY_CLIP, "hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 4}
_TEXT_ENCODERS: dict[tuple[str, Width], dict[str, dict[str, Any]]] = {
    ("sd15", Width.FULL): {"text_encoder": _FULL_L},
    ("sd15", Width.TINY): {
        "text_encoder": {**_TINY_CLIP, "hidden_act": "quick_gelu", "hidden_size": 32, "num_attention_heads": 2}
    },
    ("sd15", Width.DEMO): {
        "text_encoder": {
            **_TINY_CLIP,
            "hidden_act": "quick_gelu",
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "projection_dim": 96,
            "vocab_size": 1634,
            "bos_token_id": 1632,
            "eos_token_id": 1633,
            "pad_token_id": 1633,
        }
    },
    ("sd21", Width.FULL): {
        "text_encoder": {
            **_FULL_L,
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
            "projection_dim": 512,
        }
    },
    ("sd21", Width.TINY): {"text_encoder": {**_TINY_CLIP, "hidden_size": 32, "num_attention_heads": 2}},
    ("sdxl", Width.FULL): {
        "text_encoder": _FULL_L,
        "text_encoder_2": {
            **_FULL_L,
            "hidden_act": "gelu",
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 20,
            "num_hidden_layers": 32,
            "projection_dim": 1280,
        },
    },
    ("sdxl", Width.TINY): {
        "text_encoder": {**_TINY_XL_CLIP, "hidden_act": "quick_gelu"},
        "text_encoder_2": _TINY_XL_CLIP,
    },
}

_VAE_BLOCKS: dict[str, Any] = {"layers_per_block": 2, "latent_channels": LATENT_CHANNELS}
_VAES: dict[Width, dict[str, Any]] = {
    Width.FULL: {**_VAE_BLOCKS, "block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32},
    Width.TINY: {**_VAE_BLOCKS, "block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
    Width.DEMO: {
        **_VAE_BLOCKS,
        "layers_per_block": 1,
        "block_out_channels": [16, 32, 64, 64],
        "norm_num_groups": 8,
    },
}
_CONDITIONING_CHANNELS = {Width.FULL: [16, 32, 96, 256], Width.TINY: [8, 8, 16, 16], Width.DEMO: [8, 8, 16, 16]}


def _architecture(family: Family, width: Width) -> dict[str, Any]:
    found = _ARCHITECTURES["sdxl" if family.is_sdxl else family.value, width]
    return {key: list(value) if isinstance(value, list) else value for key, value in found.items()}


def widths_of(family: Family) -> tuple[Width, ...]:
    """Returns the widths that a family's networks have here: the demo model is of one family."""
    return tuple(width for width in Width if width is not Width.DEMO or family is Family.SD15)


def unet_config(family: Family, task: Task, width: Width = Width.FULL) -> dict[str, Any]:
    """Returns arguments of diffusers' ``UNet2DConditionModel`` for this family; what is not named is the class default.

    At full width these are the published checkpoints' own values; tiny keeps every module in its place.
    """
    channels = _INPAINTING_CHANNELS if task is Task.INPAINTING else LATENT_CHANNELS
    return {
        "in_channels": channels,
        "out_channels": LATENT_CHANNELS,
        "layers_per_block": 2,
        **_architecture(family, width),
    }


def controlnet_config(family: Family, width: Width = Width.FULL) -> dict[str, Any]:
    """Returns arguments of diffusers' ``ControlNetModel`` for a ControlNet of this family."""
    config = _architecture(family, width)
    del config["up_block_types"], config["sample_size"]
    return {
        "in_channels": LATENT_CHANNELS,
        "layers_per_block": 2,
        "conditioning_embedding_out_channels": list(_CONDITIONING_CHANNELS[width]),
        **config,
    }


def text_encoder_configs(family: Family, width: Width = Width.FULL) -> dict[str, dict[str, Any]]:
    """Returns arguments of transformers' ``CLIPTextConfig`` for each text encoder, by its folder's name.

    They come in the order in which their embeddings are joined.
    """
    found = _TEXT_ENCODERS["sdxl" if family.is_sdxl else family.value, width]
    return {name: dict(config) for name, config in found.items()}


def vae_config(family: Family, width: Width = Width.FULL) -> dict[str, Any]:
    """Returns arguments of diffusers' ``AutoencoderKL`` for this family's VAE."""
    levels = len(_VAES[width]["block_out_channels"])
    return {
        **_VAES[width],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": 1024 if family.is_sdxl else 512,
        "scaling_factor": 0.13025 if family.is_sdxl else 0.18215,
        "force_upcast": True,
    }


_SCALED_LINEAR = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
"""What every family's configuration file says, keys for other schedulers than its own included."""


def default_scheduler(family: Family) -> tuple[str, dict[str, Any]]:
    """Returns the diffusers scheduler class and configuration that the family's checkpoints come with.

    SD2.1 is the 512-pixel base model, which predicts epsilon.
    """
    if family is Family.SDXL_TURBO:
        return "EulerAncestralDiscreteScheduler", {**_SCALED_LINEAR, "timestep_spacing": "trailing"}
    if family.is_sdxl:
        return "EulerDiscreteScheduler", {**_SCALED_LINEAR, "timestep_spacing": "leading"}
    return "PNDMScheduler", dict(_SCALED_LINEAR)
