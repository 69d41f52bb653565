"""Files that cannot be fused as a LoRA are refused in words that say what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.lora import Lora, lora_fingerprint, read_lora
from hidiff_export.checkpoints.lora_file import trainer_of
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family, Task, Width
from tests import loras
from tests.loras import Factors, factors, kohya, networks, peft, save

Tensors = dict[str, torch.Tensor]

ONE_TRAINER = {"ot_branch": "master", "ss_base_model_version": "sdxl_"}
LYCORIS = {"ss_network_module": "lycoris.kohya", "ss_base_model_version": "sd_v1"}
KOHYA = {"ss_network_module": "networks.lora", "ss_base_model_version": "sdxl_base_v1-0"}


def read(path: Path, family: Family = Family.SD15) -> Lora:
    return read_lora(path, 1.0, family, Task.TEXT_TO_IMAGE, Width.TINY)


def some(family: Family = Family.SD15) -> Factors:
    return factors(family, rank=2, seed=0, only=r"mid_block.*attn\d")


def refusal(tensors: Tensors, folder: Path, metadata: dict[str, str] | None = None) -> CheckpointError:
    with pytest.raises(CheckpointError) as refused:
        read(save(tensors, folder / "style.safetensors", metadata))
    assert refused.value.exit_code == 3
    assert refused.value.advice
    return refused.value


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
DOTTED = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("names", "method"),
    [
        ([f"{STEM}.dora_scale"], "DoRA"),
        ([f"{DOTTED}.lora_magnitude_vector"], "DoRA"),
        ([f"{DOTTED}.lora_magnitude_vector.default.weight"], "DoRA"),
        ([f"{STEM}.hada_w1_a", f"{STEM}.hada_t1"], "LoHa"),
        ([f"{STEM}.lokr_w1", f"{STEM}.lokr_w2_b", f"{STEM}.lokr_t2"], "LoKr"),
        ([f"{STEM}.oft_blocks"], "OFT"),
        ([f"{STEM}.oft_R.weight"], "OFT"),
        ([f"{DOTTED}.boft_R"], "OFT"),
        ([f"{STEM}.on_input"], "IA3"),
        ([f"{DOTTED}.ia3_l"], "IA3"),
        ([f"{STEM}.a1.weight", f"{STEM}.b2.weight"], "GLoRA"),
        ([f"{DOTTED}.vera_lambda_b"], "VeRA"),
        ([f"{STEM}.lora_mid.weight"], "LoCon in Tucker's form"),
        ([f"{DOTTED}.lora_embedding_A"], "LoRA of token embeddings"),
        ([f"{DOTTED}.lora_B.bias"], "LoRA with biases"),
        (["lora_unet_mid_block_resnets_0_norm1.w_norm"], "weights of norms"),
        ([f"{STEM}.diff", f"{STEM}.diff_b"], "whole differences of weights"),
    ],
)
def test_another_method_is_named(names: list[str], method: str, tmp_path: Path) -> None:
    others = dict.fromkeys(names)
    beside_lora = load_file(kohya(some(), tmp_path / "lora.safetensors", alpha=1.0))
    for tensors, count in (({}, len(names)), (beside_lora, len(names) + len(beside_lora))):
        refused = refusal({**tensors, **{name: torch.zeros(2, 2) for name in others}}, tmp_path, LYCORIS)
        assert refused.summary == f"The file holds {method}, which cannot be fused: only plain LoRA and LoCon can."
        assert f"{len(names)} of {_tensors(count)}: {', '.join(sorted(names))}" in str(refused.given)
        assert "written by LyCORIS in kohya's trainer, for 'sd_v1' by its header" in str(refused.given)
        assert "merge it into the checkpoint" in str(refused.advice)


def test_the_family_of_another_method_is_named(tmp_path: Path) -> None:
    for stem, family in (
        ("lora_unet_output_blocks_1_1_transformer_blocks_1_attn1_to_q", "sdxl"),
        ("lora_unet_up_blocks_3_attentions_0_transformer_blocks_0_attn1_to_q", "sd15 or sd21"),
        ("lora_unet_double_blocks_0_img_attn_proj", "Flux's or HunyuanVideo's"),
    ):
        refused = refusal({f"{stem}.lokr_w1": torch.zeros(2, 2)}, tmp_path)
        assert f"under kohya's names, looks like {family}" in str(refused.given)


@pytest.mark.parametrize(
    ("names", "title", "advice"),
    [
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.quant_conv.weight"],
            "a whole checkpoint",
            "--source PATH",
        ),
        (["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"], "a whole checkpoint", "--source"),
        (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "a whole UNet", "--source PATH"),
        (["input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"], "a whole UNet", "--source PATH"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet", "--set controlnet=PATH"),
        (
            ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
            "a ControlNet",
            "controlnet=PATH",
        ),
        (["lora_controlnet", "input_hint_block.0.weight"], "a Control-LoRA", "whole ControlNet"),
        (
            ["lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight"],
            "a ControlNet-LLLite",
            "whole ControlNet",
        ),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter", "leave it out"),
        (["adapter.body.0.resnets.0.block1.weight", "adapter.conv_in.weight"], "a T2I-Adapter", "ControlNet"),
        (
            ["down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight"],
            "a motion module of AnimateDiff",
            "Leave it out",
        ),
        (["first_stage_model.decoder.up.0.block.0.conv1.weight"], "a VAE", "vae/ folder"),
        (["encoder.down_blocks.0.resnets.0.conv1.weight", "quant_conv.weight"], "a VAE", "vae/ folder"),
        (
            ["text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.bias"],
            "a text encoder",
            "text_encoder/",
        ),
        (["emb_params"], "a textual inversion embedding", "leave it out"),
        (["clip_l", "clip_g"], "a textual inversion embedding", "leave it out"),
        (["my-cat"], "a textual inversion embedding", "leave it out"),
        (["bundle_emb.cat.clip_l"], "a textual inversion embedding", "leave it out"),
        (
            ["double_blocks.0.img_attn.qkv.weight"],
            "a checkpoint, by its layers Flux's or HunyuanVideo's",
            "Stable Diffusion",
        ),
        (
            ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
            "a checkpoint, by its layers SD3's",
            "Stable Diffusion",
        ),
    ],
)
def test_what_is_no_lora_is_named(names: list[str], title: str, advice: str, tmp_path: Path) -> None:
    refused = refusal({name: torch.zeros(2, 2) for name in names}, tmp_path)
    assert refused.summary == f"The file is {title}, not a LoRA."
    assert refused.given == f"style.safetensors: {_tensors(len(names))}: {', '.join(sorted(names))}"
    assert advice in str(refused.advice)


def test_integers_of_a_whole_checkpoint_do_not_hide_what_it_is(tmp_path: Path) -> None:
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert "a whole checkpoint" in refusal({positions: torch.zeros(1, 77, dtype=torch.int64)}, tmp_path).summary


def test_a_file_that_is_nothing_known_is_refused(tmp_path: Path) -> None:
    refused = refusal({"head.weight": torch.zeros(2, 2), "stem.weight": torch.zeros(2, 2)}, tmp_path)
    assert refused.summary == "The file holds no LoRA that is known here."
    assert "2 of 2 tensors: head.weight, stem.weight" in str(refused.given)


def _stranger(tensors: Tensors) -> Tensors:
    return {**tensors, "unet.mid_block.stranger": torch.zeros(1)}


def _half(tensors: Tensors) -> Tensors:
    return dict(list(tensors.items())[:-1])


def _alpha_of_nothing(tensors: Tensors) -> Tensors:
    return {**tensors, "unet.mid_block.attentions.0.alpha": torch.zeros(())}


def _other_adapter(tensors: Tensors) -> Tensors:
    return {**tensors, **{name.replace(".weight", ".other.weight"): value * 2 for name, value in tensors.items()}}


@pytest.mark.parametrize("change", [_stranger, _half, _alpha_of_nothing, _other_adapter])
def test_a_tensor_that_changes_nothing_is_refused(change: Callable[[Tensors], Tensors], tmp_path: Path) -> None:
    before = load_file(peft(some(), tmp_path / "lora.safetensors"))
    after = change(before)
    refused = refusal(after, tmp_path)
    assert refused.summary == "The LoRA holds tensors that change no weight."
    named = [*(after.keys() - before.keys()), "lora_A"] if change is not _other_adapter else ["lora_"]
    assert named[0] in str(refused.given)
    assert f"of {len(after)} tensors" in str(refused.given)


def test_a_layer_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    first = load_file(kohya(some(), tmp_path / "a.safetensors", alpha=1.0))
    second = load_file(peft(some(), tmp_path / "b.safetensors"))
    refused = refusal({**first, **second}, tmp_path)
    assert refused.summary == "The LoRA changes weights twice, under two names."
    key = "attentions.0.transformer_blocks.0.attn1.to_k"
    twice = f"unet.mid_block.{key}.lora_A.weight (as lora_unet_mid_block_{key.replace('.', '_')}.lora_down.weight)"
    assert f"8 of 16 layers: {twice}" in str(refused.given)
    assert "a --lora of its own" in str(refused.advice)


@pytest.mark.parametrize(("own", "wanted"), [(Family.SDXL, Family.SD15), (Family.SD15, Family.SDXL)])
def test_another_familys_lora_is_recognized(own: Family, wanted: Family, tmp_path: Path) -> None:
    made = factors(own, rank=2, seed=0, only=r"(down|mid)_block.*attn\d")
    path = kohya(made, tmp_path / "lora.safetensors", alpha=1.0, sgm=own is Family.SDXL)
    save(load_file(path), path, KOHYA)
    with pytest.raises(CheckpointError, match=rf"not for {wanted.value} .* looks like .*{own.value}") as refused:
        read(path, wanted)
    given = str(refused.value.given)
    assert f"of {len(made)} layers do not fit: lora_unet_" in given
    assert "written by kohya's trainer, for 'sdxl_base_v1-0' by its header" in given
    assert "set the recipe's family to the LoRA's" in str(refused.value.advice)


def test_a_lora_of_which_most_fits_a_family_is_recognized(tmp_path: Path) -> None:
    made = factors(Family.SDXL, rank=2, seed=0, only=r"(down|mid)_block.*attn\d")
    tensors = load_file(kohya(made, tmp_path / "lora.safetensors", alpha=1.0, sgm=True))
    stranger = {f"lora_unet_stranger.lora_{half}.weight": torch.zeros(2, 2) for half in ("down", "up")}
    refused = refusal({**tensors, **stranger}, tmp_path)
    assert "it looks like sdxl, sdxl-turbo or playground at tiny width for the most part" in refused.summary


@pytest.mark.parametrize(
    ("stem", "owner"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj", "Flux's or HunyuanVideo's"),
        ("lora_unet_single_blocks_3_linear1", "Flux's or HunyuanVideo's"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "Flux's or HunyuanVideo's"),
        ("diffusion_model.double_blocks.0.img_attn.qkv", "Flux's or HunyuanVideo's"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "SD3's"),
        ("transformer.transformer_blocks.0.attn.add_k_proj", "SD3's"),
        ("transformer.transformer_blocks.0.img_mlp.net.0.proj", "Qwen-Image's"),
        ("diffusion_model.blocks.0.cross_attn.k", "Wan's"),
        ("diffusion_model.layers.0.attention.to_q", "Z-Image's or Lumina's"),
        ("lora_prior_unet_down_blocks_0_1_proj", "Stable Cascade's"),
        ("unet.down_blocks.0.motion_modules.0.temporal_transformer.proj_in", "AnimateDiff's"),
        ("diffusion_model.double_stream_blocks.0.block.attn1.to_q", "HiDream's"),
        ("base_model.model.model.layers.0.self_attn.q_proj", "a language model's"),
        ("transformer.transformer_blocks.0.attn1.to_q", "a diffusion transformer's (Flux, SD3, PixArt, …)"),
        ("lora_transformer_transformer_blocks_0_attn_to_q", "a diffusion transformer's (Flux, SD3, PixArt, …)"),
    ],
)
def test_another_architectures_lora_is_recognized(stem: str, owner: str, tmp_path: Path) -> None:
    tensors = {f"{stem}.lora_{half}.weight": torch.zeros(2, 2) for half in ("A", "B")}
    refused = refusal(tensors, tmp_path)
    assert refused.summary == f"The LoRA is not for sd15 at tiny width: it looks like {owner}."
    assert f"1 of 1 layers do not fit: {stem}.lora_A.weight (there is no such layer)" in str(refused.given)
    assert refused.advice == "Give a LoRA that was trained on sd15: bundles are made of Stable Diffusion's UNets alone."


def test_no_family_is_taken_for_another_architecture(tmp_path: Path) -> None:
    for family in (Family.SD15, Family.SDXL):
        every = {
            (part, name.removesuffix(".weight")): (torch.zeros(1), torch.zeros(1))
            for part, shapes in networks(family).items()
            for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) > 1 and "embeddings" not in name
        }
        tensors = load_file(loras.one_trainer(every, tmp_path / "lora.safetensors", alpha=None))
        refused = refusal(tensors, tmp_path)
        assert "fits no family known here" in refused.summary


def test_factors_of_another_shape_are_refused(tmp_path: Path) -> None:
    turned = {key: (up.T.contiguous(), down.T.contiguous()) for key, (down, up) in some().items()}
    refused = refusal(load_file(peft(turned, tmp_path / "lora.safetensors")), tmp_path)
    assert refused.summary == "Most layers of the LoRA fit sd15 at tiny width, but not all."
    assert "2 of 8 layers do not fit" in str(refused.given)
    assert "attn2.to_v.lora_A.weight (down [2, 64], up [32, 2] for [64, 32])" in str(refused.given)
    assert "for this very UNet" in str(refused.advice)


def test_a_text_encoder_that_is_not_named_is_refused_where_there_are_two(tmp_path: Path) -> None:
    made = factors(Family.SDXL, rank=2, seed=0, only=r"layers\.0\.mlp")
    first = {layer: pair for layer, pair in made.items() if layer[0] is Component.TEXT_ENCODER}
    with pytest.raises(CheckpointError) as refused:
        read(loras.bare_peft(first, tmp_path / "lora.safetensors"), Family.SDXL)
    assert "(of which text encoder?)" in str(refused.value.given)


@pytest.mark.parametrize(
    ("name", "metadata", "trainer"),
    [
        (f"{STEM}.alpha", ONE_TRAINER, "written by OneTrainer"),
        (f"{STEM}.alpha", LYCORIS, "written by LyCORIS in kohya's trainer"),
        (f"{STEM}.alpha", KOHYA, "written by kohya's trainer"),
        (f"{STEM}.alpha", {}, "under kohya's names"),
        (f"{DOTTED}.lora_A.weight", {}, "under PEFT's names"),
        ("lycoris_mid_block.alpha", {}, "under LyCORIS's names"),
        ("unet.mid_block.lora_A.weight", {}, "under diffusers' names"),
        ("unet.mid_block.to_q_lora.down.weight", {}, "under diffusers' names from before PEFT"),
        ("unet.mid_block.lora_linear_layer.up.weight", {}, "under diffusers' names from before PEFT"),
        ("unet.mid_block.lora_down.weight", {}, "under dotted names of its own"),
    ],
)
def test_the_trainer_is_told_from_the_header_or_the_names(name: str, metadata: dict[str, str], trainer: str) -> None:
    assert trainer_of([name], metadata) == trainer


def test_a_file_that_is_missing_or_cut_short_is_refused(tmp_path: Path) -> None:
    path = kohya(some(), tmp_path / "lora.safetensors", alpha=1.0)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-9])
    for wrong in (tmp_path / "missing.safetensors", cut):
        with pytest.raises(CheckpointError) as refused:
            read(wrong)
        assert refused.value.advice
    with pytest.raises(CheckpointError):
        lora_fingerprint(tmp_path / "missing.safetensors")
