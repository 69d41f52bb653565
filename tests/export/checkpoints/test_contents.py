"""What a file is that is no UNet of a family: named, so that its user knows what to give instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.contents import UNET, kind_of
from hidiff_export.families.family import Family, Task
from hidiff_runtime.format.safetensors import write
from tests.export.checkpoints.checkpoint_files import arrays, ldm_name, tiny, write_folder, write_header
from tests.export.checkpoints.loading import CONFIG, refused
from tests.export.checkpoints.loading import UNET as UNET_CLASS

MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "flux": (lambda: diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1), "a Flux transformer"),
    "chroma": (lambda: diffusers.ChromaTransformer2DModel(num_layers=1, num_single_layers=1), "a Chroma transformer"),
    "sd3": (lambda: diffusers.SD3Transformer2DModel(num_layers=2), "a Stable Diffusion 3 transformer"),
    "auraflow": (
        lambda: diffusers.AuraFlowTransformer2DModel(num_mmdit_layers=1, num_single_dit_layers=1),
        "an AuraFlow transformer",
    ),
    "pixart": (lambda: diffusers.PixArtTransformer2DModel(num_layers=1), "a PixArt transformer"),
    "qwen": (lambda: diffusers.QwenImageTransformer2DModel(num_layers=1), "a transformer"),
    "cascade": (diffusers.StableCascadeUNet, "a Stable Cascade UNet"),
    "motion": (diffusers.MotionAdapter, "an AnimateDiff motion module"),
    "svd": (diffusers.UNetSpatioTemporalConditionModel, "a video UNet"),
    "vae": (diffusers.AutoencoderKL, "a VAE alone"),
    "taesd": (diffusers.AutoencoderTiny, "a tiny VAE (TAESD)"),
    "text": (
        lambda: Component.TEXT_ENCODER.empty(tiny(Family.SD15, component=Component.TEXT_ENCODER)),
        "a text encoder",
    ),
}


def shapes_of_class(make: Callable[[], Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_another_class_is_named(tmp_path: Path, name: str) -> None:
    make, what = MODELS[name]
    message = refused(write_header(tmp_path / "model.safetensors", shapes_of_class(make)))
    assert what in message
    assert "again" not in message


@pytest.mark.parametrize(
    ("names", "what", "advice"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "a LoRA", "--lora"),
        (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], "a LoRA", "--lora"),
        (["lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"], "a LoRA", "--lora"),
        (["model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"], "a Flux transformer", "recipes"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "a Stable Diffusion 3", "recipes"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter", "before it was put in"),
        (["emb_params"], "a textual inversion", "prompt"),
        (["clip_l", "clip_g"], "a textual inversion", "prompt"),
        (["first_stage_model.quant_conv.weight", "first_stage_model.encoder.conv_in.weight"], "a VAE alone", "whole"),
        (["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"], "a text encoder", "whole"),
        (["body.0.rdb1.conv1.weight", "conv_first.weight"], "an upscaler of pictures", "recipes"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "a T5 text encoder", "recipes"),
        (["control_model.zero_convs.0.0.weight"], "a ControlNet", "the recipe's controlnet"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path: Path, names: list[str], what: str, advice: str) -> None:
    message = refused(write_header(tmp_path / "file.safetensors", dict.fromkeys(names, (2, 2))))
    assert f"no Stable Diffusion UNet2DConditionModel: it is {what}" in message
    assert advice in message
    assert "again" not in message


def test_a_file_of_ema_copies_alone_is_told(tmp_path: Path) -> None:
    path = write_header(tmp_path / "ema.safetensors", {"model_ema.diffusion_modelinput_blocks00weight": (2, 2)})
    assert "holds only EMA copies of a UNet2DConditionModel's weights" in refused(path)


def test_what_is_not_known_is_called_nothing(tmp_path: Path) -> None:
    message = refused(write_header(tmp_path / "file.safetensors", {"mystery.weight": (2, 2)}))
    assert "is no Stable Diffusion UNet2DConditionModel.\n" in message
    assert "1 tensors, mystery.weight" in message
    write(tmp_path / "empty.safetensors", {})
    assert "no tensors" in refused(tmp_path / "empty.safetensors")


@pytest.mark.parametrize("family", [Family.SD15, Family.SD21, Family.SDXL])
@pytest.mark.parametrize("task", [Task.TEXT_TO_IMAGE, Task.INPAINTING])
def test_a_familys_unet_is_nothing_else(family: Family, task: Task) -> None:
    config = tiny(family, task)
    shapes = Component.UNET.shapes(config)
    assert kind_of(shapes) is UNET
    assert kind_of([f"model.diffusion_model.{ldm_name(name, config)}" for name in shapes]) is UNET


REFINER = {"block_out_channels": [384, 768, 1536, 1536], "cross_attention_dim": 1280, "use_linear_projection": True}
UPSCALER = {"block_out_channels": [256, 512, 512, 1024], "cross_attention_dim": 1024, "in_channels": 7}


@pytest.mark.parametrize(
    ("config", "what"),
    [(REFINER, "it is SDXL's refiner"), (UPSCALER, "it is the UNet of Stable Diffusion's x4 upscaler")],
    ids=["refiner", "upscaler"],
)
def test_a_unet_of_no_family_is_named(tmp_path: Path, config: dict[str, Any], what: str) -> None:
    shapes = shapes_of_class(lambda: diffusers.UNet2DConditionModel(**config))
    assert what in refused(write_header(tmp_path / "unet.safetensors", shapes))


@pytest.mark.parametrize(("channels", "what"), [(5, "takes a depth map"), (8, "InstructPix2Pix")])
def test_what_a_unet_takes_beside_the_latents_is_named(tmp_path: Path, channels: int, what: str) -> None:
    write(tmp_path / "unet.safetensors", arrays(Component.UNET, {**CONFIG, "in_channels": channels}))
    message = refused(tmp_path / "unet.safetensors")
    assert f"{channels} input channels, 4 wanted" in message
    assert what in message
    assert "recipe's task" not in message


@pytest.mark.parametrize(
    ("name", "what", "advice"),
    [
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k_ip.weight", "1 of an IP-Adapter", "put in"),
        ("down_blocks.0.attentions.0.proj_in.lora_A.weight", "1 of a LoRA", "--lora"),
        ("down_blocks.0.motion_modules.0.proj_in.weight", "1 of an AnimateDiff motion module", "put in"),
        ("time_embedding.cond_proj.weight", "1 of an LCM's guidance embedding", "LCM's LoRA"),
        ("surprise.weight", "1 unknown", "published architecture"),
    ],
)
def test_what_was_put_into_a_unet_is_named(
    tmp_path: Path, tensors: dict[str, Any], name: str, what: str, advice: str
) -> None:
    added = {**tensors, name: np.ones((2, 2), np.float32)}
    write(tmp_path / "unet.safetensors", added)
    write_folder(tmp_path / "folder", added, CONFIG, UNET_CLASS)
    for source in ("unet.safetensors", "folder"):
        message = refused(tmp_path / source)
        assert f"{what}: {name}" in message
        assert advice in message


@pytest.mark.parametrize("name", ["lora_unet_x.lora_up.weight", "ip_adapter.1.to_k_ip.weight"])
def test_an_adapter_beside_a_whole_checkpoint_is_not_left_out(
    tmp_path: Path, tensors: dict[str, Any], name: str
) -> None:
    whole = {f"model.diffusion_model.{ldm_name(key, CONFIG)}": array for key, array in tensors.items()}
    write(tmp_path / "whole.safetensors", {**whole, name: np.ones((2, 2), np.float32)})
    message = refused(tmp_path / "whole.safetensors")
    assert "which would be left out" in message
    assert name in message


def test_what_diffusers_drops_of_an_original_unet_is_told(tmp_path: Path, tensors: dict[str, Any]) -> None:
    whole = {f"model.diffusion_model.{ldm_name(key, CONFIG)}": array for key, array in tensors.items()}
    surprise = {"model.diffusion_model.surprise.weight": np.ones(3, np.float32)}
    write(tmp_path / "whole.safetensors", {**whole, **surprise})
    assert "1 unknown: surprise.weight" in refused(tmp_path / "whole.safetensors")


def test_a_smaller_unet_is_told_what_it_lacks(tmp_path: Path, tensors: dict[str, Any]) -> None:
    fewer = {name: array for name, array in tensors.items() if not name.startswith("mid_block.")}
    write(tmp_path / "small.safetensors", fewer)
    message = refused(tmp_path / "small.safetensors")
    assert "missing: mid_block." in message
    assert "a distilled model with fewer layers cannot be built" in message
