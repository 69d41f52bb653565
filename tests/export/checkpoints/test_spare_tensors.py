"""Tensors that change no result are left out with one line, and the rest is what the libraries' own loading gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import Checkpoint, load
from hidiff_export.checkpoints.spare_tensors import MARKERS
from hidiff_export.checkpoints.synthetic import synthesize
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family, Task, Width, text_encoder_configs
from tests.export.checkpoints.checkpoint_files import ldm_name, tiny
from tests.export.modules.test_text_encoder import whole
from tests.export.modules.test_vae import original

Tensors = dict[str, torch.Tensor]
TEXT = [
    (Family.SD15, Component.TEXT_ENCODER),
    (Family.SD21, Component.TEXT_ENCODER),
    (Family.SDXL, Component.TEXT_ENCODER),
    (Family.SDXL, Component.TEXT_ENCODER_2),
]


def loaded(component: Component, source: Path, family: Family = Family.SD15) -> Checkpoint:
    return load(component, str(source), family, Task.TEXT_TO_IMAGE, Width.TINY)


def tensors_of(component: Component, family: Family = Family.SD15) -> Tensors:
    return dict(synthesize(component, tiny(family, component=component), 0))


def same(found: Any, expected: Any) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def one() -> torch.Tensor:
    return torch.ones(1)


def single(family: Family) -> Tensors:
    """A whole checkpoint in the original layout."""
    config = tiny(family)
    unet = {f"model.diffusion_model.{ldm_name(n, config)}": t for n, t in tensors_of(Component.UNET, family).items()}
    text = {n: t for n, t in whole(family).items() if not n.startswith("model.")}
    vae = original({name: tensor.numpy() for name, tensor in tensors_of(Component.VAE, family).items()})
    kept = {f"first_stage_model.{name}": torch.from_numpy(array.copy()) for name, array in vae.items()}
    return {name: tensor.contiguous() for name, tensor in {**unet, **text, **kept}.items()}


TRAINING: Tensors = {
    "global_step": torch.tensor(7),
    "betas": torch.ones(1000),
    "alphas_cumprod": torch.ones(1000),
    "sqrt_one_minus_alphas_cumprod": torch.ones(1000),
    "posterior_mean_coef1": torch.ones(1000),
    "model_ema.decay": torch.ones(()),
    "model_ema.num_updates": torch.tensor(3, dtype=torch.int32),
    "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(4),
    "denoiser.sigmas": torch.ones(1000),
    "optimizer_states.0.exp_avg": torch.ones(3),
}


@pytest.mark.parametrize("family", [Family.SD15, Family.SDXL])
def test_what_training_left_in_a_whole_file_is_told_once(tmp_path: Path, family: Family) -> None:
    save_file({**single(family), **TRAINING}, tmp_path / "a.safetensors")
    found = loaded(Component.UNET, tmp_path / "a.safetensors", family)
    assert same(found.state_dict, tensors_of(Component.UNET, family))
    names = ", ".join(sorted(TRAINING)[:4])
    assert found.notices == (f"unet: 10 tensors that change no result are left out: {names} and 6 more",)
    assert loaded(Component.VAE, tmp_path / "a.safetensors", family).notices == ()


@pytest.mark.parametrize("prefix", ["model_ema.", "ema_model.", "ema."])
def test_averaged_weights_are_a_second_copy(tmp_path: Path, prefix: str) -> None:
    save_file({**tensors_of(Component.UNET), f"{prefix}conv_in.weight": one()}, tmp_path / "a.safetensors")
    found = loaded(Component.UNET, tmp_path / "a.safetensors")
    assert same(found.state_dict, tensors_of(Component.UNET))
    assert found.notices == (f"unet: 1 tensor that changes no result is left out: {prefix}conv_in.weight",)


def test_tensors_of_no_network_are_told_apart(tmp_path: Path) -> None:
    save_file({**single(Family.SD15), "somebody.extra": one()}, tmp_path / "a.safetensors")
    assert loaded(Component.UNET, tmp_path / "a.safetensors").notices == (
        "unet: 1 tensor that belongs to no network built here is left out: somebody.extra",
    )


@pytest.mark.parametrize("family", [Family.SD15, Family.SDXL])
def test_marks_of_the_prediction_are_nobodys_extras(tmp_path: Path, family: Family) -> None:
    marks = {name: torch.tensor([]) for name in MARKERS}
    save_file({**single(family), **marks}, tmp_path / "whole.safetensors")
    save_file({**tensors_of(Component.UNET, family), **marks}, tmp_path / "unet.safetensors")
    for name in ("whole", "unet"):
        found = loaded(Component.UNET, tmp_path / f"{name}.safetensors", family)
        assert same(found.state_dict, tensors_of(Component.UNET, family))
        assert found.notices == ()
    assert loaded(Component.VAE, tmp_path / "whole.safetensors", family).notices == ()


@pytest.mark.parametrize(("family", "component"), TEXT)
def test_a_single_files_text_encoder(tmp_path: Path, family: Family, component: Component) -> None:
    root = "conditioner.embedders." if family.is_sdxl else "cond_stage_model."
    root += {Component.TEXT_ENCODER: "0.", Component.TEXT_ENCODER_2: "1."}[component] if family.is_sdxl else ""
    inner = "model." if family is Family.SD21 or component is Component.TEXT_ENCODER_2 else "transformer."
    extras = {f"{root}logit_scale": one(), f"{root}{inner}visual.proj": one(), f"{root}{inner}vision_model.x": one()}
    if component is Component.TEXT_ENCODER and inner == "transformer.":
        extras[f"{root}{inner}text_projection.weight"] = torch.ones(3, 3)
    save_file({**single(family), **extras}, tmp_path / "a.safetensors")
    found = loaded(component, tmp_path / "a.safetensors", family)
    assert same(found.state_dict, tensors_of(component, family))
    (notice,) = found.notices
    assert notice.startswith(f"{component.value}: ")
    counted = len(extras) + (2 if family is Family.SD21 else 1)  # logit_scale, position_ids, text_projection
    assert f" {counted} tensors that change no result are left out: " in notice


@pytest.mark.parametrize(("family", "component"), TEXT)
def test_what_no_text_encoder_of_a_single_file_has_is_refused(
    tmp_path: Path, family: Family, component: Component
) -> None:
    """Also where diffusers' conversion takes what it knows and drops the rest."""
    root = "cond_stage_model."
    if family.is_sdxl:
        root = f"conditioner.embedders.{int(component is Component.TEXT_ENCODER_2)}."
    inner = "model." if family is Family.SD21 or component is Component.TEXT_ENCODER_2 else "transformer."
    save_file({**single(family), f"{root}{inner}surprise": one()}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unknown: .*surprise"):
        loaded(component, tmp_path / "a.safetensors", family)


def test_the_layer_that_sd21_does_not_use_is_left_out(tmp_path: Path) -> None:
    """As diffusers leaves out layer 23 of the published files."""
    file = single(Family.SD21)
    prefix, layers = "cond_stage_model.model.transformer.resblocks.", 3
    last = {
        name.replace(f"{prefix}{layers - 1}.", f"{prefix}{layers}."): torch.zeros_like(tensor)
        for name, tensor in file.items()
        if name.startswith(f"{prefix}{layers - 1}.")
    }
    assert len(last) == 12
    save_file({**file, **last}, tmp_path / "a.safetensors")
    found = loaded(Component.TEXT_ENCODER, tmp_path / "a.safetensors", Family.SD21)
    assert same(found.state_dict, tensors_of(Component.TEXT_ENCODER, Family.SD21))
    assert "14 tensors" in found.notices[0]


def text_config(family: Family, component: Component = Component.TEXT_ENCODER) -> Any:
    return CLIPTextConfig(**text_encoder_configs(family, Width.TINY)[component.value])


@pytest.mark.parametrize("family", [Family.SD15, Family.SD21, Family.SDXL])
def test_a_text_encoder_with_projection_is_taken_without(tmp_path: Path, family: Family) -> None:
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(text_config(family))
    model.save_pretrained(tmp_path / "text_encoder")
    config = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    assert config["architectures"] == ["CLIPTextModelWithProjection"]
    found = loaded(Component.TEXT_ENCODER, tmp_path, family)
    theirs = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    assert same(found.state_dict, theirs.state_dict())
    assert found.notices == ("text_encoder: 1 tensor that changes no result is left out: text_projection.weight",)


@pytest.mark.parametrize(
    ("family", "component", "library"),
    [
        (Family.SD15, Component.TEXT_ENCODER, CLIPTextModel),
        (Family.SDXL, Component.TEXT_ENCODER_2, CLIPTextModelWithProjection),
    ],
)
def test_a_whole_clip_is_taken_for_its_text_encoder(
    tmp_path: Path, family: Family, component: Component, library: Any
) -> None:
    torch.manual_seed(0)
    text = text_config(family, component).to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=text["projection_dim"]))
    clip.save_pretrained(tmp_path / component.value)
    found = loaded(component, tmp_path, family)
    theirs = library.from_pretrained(tmp_path / component.value)
    assert same(found.state_dict, theirs.state_dict())
    assert "that change no result are left out: logit_scale" in found.notices[0]


def test_extras_of_a_text_encoders_folder(tmp_path: Path) -> None:
    model = CLIPTextModel(text_config(Family.SD15))
    model.save_pretrained(tmp_path / "text_encoder")
    path = tmp_path / "text_encoder" / "model.safetensors"
    extras = {
        "logit_scale": one(),
        "text_projection.weight": torch.ones(2, 2),
        "text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    save_file({**load_file(path), **extras}, path, {"format": "pt"})
    found = loaded(Component.TEXT_ENCODER, tmp_path)
    assert same(found.state_dict, CLIPTextModel.from_pretrained(tmp_path / "text_encoder").state_dict())
    assert found.notices == (
        "text_encoder: 3 tensors that change no result are left out: "
        "logit_scale, text_model.embeddings.position_ids, text_projection.weight",
    )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("surprise.weight", torch.ones(2), "1 unknown: surprise.weight"),
        ("encoder.layers.0.self_attn.q_proj.lora_A.weight", torch.ones(2, 2), "1 of a LoRA: encoder"),
        ("final_layer_norm.bias", torch.ones(3), "1 of another shape: final_layer_norm.bias [3] for [32]"),
    ],
)
def test_what_could_change_a_text_encoders_result_is_refused(
    tmp_path: Path, name: str, value: torch.Tensor, words: str
) -> None:
    CLIPTextModel(text_config(Family.SD15)).save_pretrained(tmp_path / "text_encoder")
    path = tmp_path / "text_encoder" / "model.safetensors"
    save_file({**load_file(path), name: value}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="not those of its CLIPTextModel") as caught:
        loaded(Component.TEXT_ENCODER, tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_vaes_discriminator_is_left_out(tmp_path: Path, prefix: str) -> None:
    tensors = tensors_of(Component.VAE)
    named = original({name: tensor.numpy() for name, tensor in tensors.items()})
    file = {prefix + name: torch.from_numpy(array.copy()) for name, array in named.items()}
    batches = f"{prefix}loss.discriminator.main.3.num_batches_tracked"
    extras = {f"{prefix}loss.logvar": one(), batches: torch.tensor(5)}
    save_file({**file, **extras}, tmp_path / "a.safetensors")
    found = loaded(Component.VAE, tmp_path / "a.safetensors")
    assert same(found.state_dict, tensors)
    assert found.notices == (f"vae: 2 tensors that change no result are left out: {batches}, {prefix}loss.logvar",)
    save_file({**file, f"{prefix}encoder.surprise": one()}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unknown: encoder\.surprise"):
        loaded(Component.VAE, tmp_path / "a.safetensors")


def test_extras_of_folders_are_left_out_as_diffusers_leaves_them(tmp_path: Path) -> None:
    for component, library in ((Component.UNET, UNet2DConditionModel), (Component.VAE, AutoencoderKL)):
        folder = tmp_path / component.value
        library(**tiny(Family.SD15, component=component)).save_pretrained(folder)
        path = folder / "diffusion_pytorch_model.safetensors"
        extras = {"model_ema.decay": one(), "global_step": torch.tensor(3)}
        save_file({**load_file(path), **extras}, path, {"format": "pt"})
        found = loaded(component, tmp_path)
        assert same(found.state_dict, library.from_pretrained(folder).state_dict())
        assert found.notices == (
            f"{component.value}: 2 tensors that change no result are left out: global_step, model_ema.decay",
        )
