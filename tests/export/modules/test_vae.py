"""The VAE: fabricated ones behave like trained ones, every layout of a file is read, and the modules are diffusers'."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build, load
from hidiff_export.checkpoints.synthetic import synthesize
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family, Task, Width, vae_config
from hidiff_export.families.vae_tiling import VaeTiles
from hidiff_export.modules.latent_preview import fit_preview
from hidiff_export.modules.vae import VaeDecoder, VaeEncoder
from hidiff_runtime.format.safetensors import write
from hidiff_runtime.pipeline.vae import preview
from tests.export.checkpoints.checkpoint_files import STEM, Arrays, arrays, write_folder

CONFIG = vae_config(Family.SDXL, Width.TINY)
SIDE = 24


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return build(Component.VAE, CONFIG, synthesize(Component.VAE, CONFIG, 0))


@pytest.fixture(scope="module")
def tensors() -> Arrays:
    return arrays(Component.VAE, CONFIG)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def picture(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]


def loaded(source: Path, family: Family = Family.SDXL) -> Any:
    return load(Component.VAE, str(source), family, Task.TEXT_TO_IMAGE, Width.TINY)


def same(found: Any, expected: Arrays) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name].numpy(), expected[name]) for name in found
    )


@pytest.mark.parametrize("family", [Family.SD15, Family.SD21, Family.SDXL, Family.PLAYGROUND])
def test_the_published_configurations(family: Family) -> None:
    shapes = Component.VAE.shapes(vae_config(family))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 83_653_863
    config = Component.VAE.full_config(vae_config(family))
    assert (config["scaling_factor"], config["force_upcast"]) == (0.13025 if family.is_sdxl else 0.18215, True)


def test_a_fabricated_decoder_gives_a_picture_and_no_noise(vae: AutoencoderKL) -> None:
    found = picture(vae, normal(2, 4, SIDE, SIDE))
    assert 0.2 < float(found.std()) < 0.6
    assert float((found.abs() > 1).float().mean()) < 0.05
    coarse = functional.avg_pool2d(found, 4)
    assert float(coarse.std()) > 0.3 * float(found.std())
    assert float(found.std(dim=(2, 3)).min()) > 0.1
    assert float((found - picture(vae, normal(2, 4, SIDE, SIDE, seed=1))).std()) > 0.2


def test_a_fabricated_encoder_gives_latents_that_follow_the_picture(vae: AutoencoderKL) -> None:
    with torch.no_grad():
        distribution = vae.encode(picture(vae, normal(2, 4, SIDE, SIDE)).clamp(-1, 1)).latent_dist
    scaled = distribution.mean * CONFIG["scaling_factor"]
    assert 0.3 < float(scaled.std()) < 2
    assert float(distribution.std.max()) < float(distribution.mean.std())
    assert -20 < float(distribution.logvar.min()) < float(distribution.logvar.max()) < 0


def test_every_weight_of_a_fabricated_one_matters() -> None:
    network = build(Component.VAE, CONFIG, synthesize(Component.VAE, CONFIG, 0)).requires_grad_(True)
    latents = network.encode(picture(network, normal(1, 4, 8, 8))).latent_dist
    (latents.mean + latents.std + network.decode(latents.mean).sample.mean()).square().mean().backward()
    idle = {name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()}
    # A softmax is the same whatever is added to all keys.
    assert {name for name in idle if not name.endswith("to_k.bias")} == set()


@torch.no_grad()
def test_the_modules_are_the_halves_of_diffusers_network(vae: AutoencoderKL) -> None:
    tiles = VaeTiles(8 * SIDE, 64, 0)
    latents, image = normal(1, 4, SIDE, 8), normal(1, 3, 8 * SIDE, 64).clamp(-1, 1)
    decoder, encoder = VaeDecoder(vae, tiles), VaeEncoder(vae, tiles)
    assert torch.equal(decoder(latents), vae.decode(latents).sample)
    assert torch.equal(encoder(image), vae.encode(image).latent_dist.parameters)
    for module, given in ((decoder, latents), (encoder, image)):
        (taken,), (made,) = module.input_specs(1), module.output_specs(1)
        assert taken.shape == given.shape
        assert made.shape == module(given).shape


@torch.no_grad()
def test_a_module_over_bfloat16_weights_takes_and_gives_float32(vae: AutoencoderKL) -> None:
    half = build(Component.VAE, CONFIG, synthesize(Component.VAE, CONFIG, 0), torch.bfloat16)
    found, due = (VaeDecoder(network, VaeTiles(64, 64, 0))(normal(1, 4, 8, 8)) for network in (half, vae))
    assert found.dtype == torch.float32
    assert 0 < float((found - due).std()) < 0.05 * float(due.std())


def test_a_preview_follows_the_decoded_picture(vae: AutoencoderKL) -> None:
    rows = fit_preview(vae)
    assert fit_preview(vae) == rows
    latents = functional.interpolate(normal(1, 4, 6, 6, seed=7), size=(SIDE, SIDE), mode="bilinear")
    small = functional.avg_pool2d(picture(vae, latents).clamp(-1, 1), 8)[0].movedim(0, -1).numpy()

    def error(*order: int, factor: int = 1) -> float:
        record = SimpleNamespace(preview=[*(np.multiply(rows[index], factor) for index in order), rows[4]])
        return float(np.mean((preview(record, latents.numpy())[0] / 127.5 - 1 - small) ** 2))

    # A random decoder is far from linear, so that much is left; but colours alone, or of other channels, leave more.
    alone = error(0, 1, 2, 3, factor=0)
    assert error(0, 1, 2, 3) < 0.9 * alone
    assert error(3, 2, 1, 0) > alone


_ORIGINAL = (
    ("conv_norm_out", "norm_out"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
    ("mid_block.attentions.0.to_", "mid.attn_1."),
    ("conv_shortcut", "nin_shortcut"),
)


def original(tensors: Arrays) -> Arrays:
    """The names of the code that the VAE was trained with, where attention is made of convolutions."""
    found = {}
    for name, array in tensors.items():
        for ours, theirs in _ORIGINAL:
            name = name.replace(ours, theirs)
        for level in range(4):
            name = name.replace(f"down_blocks.{level}.resnets", f"down.{level}.block")
            name = name.replace(f"down_blocks.{level}.downsamplers.0", f"down.{level}.downsample")
            name = name.replace(f"up_blocks.{level}.resnets", f"up.{3 - level}.block")
            name = name.replace(f"up_blocks.{level}.upsamplers.0", f"up.{3 - level}.upsample")
        found[name] = array[:, :, None, None] if ".attn_1." in name and array.ndim == 2 else array
    return found


def earlier(tensors: Arrays) -> Arrays:
    """The names that diffusers gave the attention's parts until 2023."""
    found = {}
    for name, array in tensors.items():
        renamed = name
        for today, then in (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")):
            renamed = renamed.replace(f"attentions.0.{today}", f"attentions.0.{then}")
        found[renamed] = array
    return found


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_a_file_in_the_original_layout(tmp_path: Path, tensors: Arrays, prefix: str) -> None:
    named = {prefix + name: array for name, array in original(tensors).items()}
    assert prefix + "decoder.up.3.upsample.conv.weight" in named
    others = {"model.diffusion_model.out.2.bias": np.zeros(4, np.float32), "loss.logvar": np.zeros(1, np.float32)}
    write(tmp_path / "model.safetensors", {**named, **others})
    assert same(loaded(tmp_path / "model.safetensors").state_dict, tensors)


def test_a_folder_under_earlier_names(tmp_path: Path, tensors: Arrays) -> None:
    named = earlier(tensors)
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in named
    write_folder(tmp_path / "vae", named, CONFIG, "AutoencoderKL")
    found = loaded(tmp_path)
    assert same(found.state_dict, tensors)
    theirs = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert same(theirs.state_dict(), tensors)


def test_what_a_fine_tune_may_set_is_kept(tmp_path: Path, tensors: Arrays) -> None:
    changed = {**CONFIG, "scaling_factor": 0.2, "force_upcast": False, "sample_size": 256}
    write_folder(tmp_path / "vae", tensors, changed, "AutoencoderKL")
    assert loaded(tmp_path).config == changed


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("latents_mean", [0.0, 1.0, 2.0, 3.0], "vae has latents with a mean of their own in each channel"),
        ("latents_std", [1.0, 1.0, 2.0, 3.0], "vae has latents with a deviation of their own in each channel"),
        ("shift_factor", 0.1, "not its family's"),
        ("use_quant_conv", False, "not its family's"),
        ("use_post_quant_conv", False, "not its family's"),
        ("mid_block_add_attention", False, "not its family's"),
    ],
)
def test_what_other_vaes_do_is_refused_by_name(
    tmp_path: Path, tensors: Arrays, key: str, value: Any, match: str
) -> None:
    write_folder(tmp_path / "vae", tensors, {**CONFIG, key: value}, "AutoencoderKL")
    with pytest.raises(CheckpointError, match=match) as caught:
        loaded(tmp_path)
    assert f"{key} {value}" in str(caught.value)


def test_what_a_vae_may_say_of_itself_without_effect(tmp_path: Path, tensors: Arrays) -> None:
    said = {"latents_mean": None, "latents_std": None, "shift_factor": None, "use_quant_conv": True}
    write_folder(tmp_path / "vae", tensors, {**CONFIG, **said}, "AutoencoderKL")
    assert loaded(tmp_path).config == CONFIG


def test_a_checkpoint_without_a_vae_is_told(tmp_path: Path, tensors: Arrays) -> None:
    write(tmp_path / "unet.safetensors", {"model.diffusion_model.out.2.bias": np.zeros(4, np.float32)})
    with pytest.raises(CheckpointError, match="no VAE in this checkpoint") as caught:
        loaded(tmp_path / "unet.safetensors")
    assert "vae: false" in caught.value.advice
    del tensors["quant_conv.bias"]
    write_folder(tmp_path / "vae", tensors, CONFIG, "AutoencoderKL")
    with pytest.raises(CheckpointError, match=r"1 missing: quant_conv\.bias"):
        loaded(tmp_path)
    (tmp_path / "vae" / f"{STEM}.safetensors").unlink()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    with pytest.raises(CheckpointError):
        loaded(tmp_path)
