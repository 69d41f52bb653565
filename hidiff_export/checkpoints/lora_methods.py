"""What a file that was given as a LoRA is instead: of another method, for another architecture, or no LoRA at all."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hidiff_export.checkpoints.contents import TensorKind
from hidiff_export.checkpoints.state_dict import Shapes

_METHODS = {
    "DoRA": r"\.dora_scale|\.lora_magnitude_vector(\.\w+)*",
    "LoHa": r"\.hada_[wt]\d(_[ab])?(\.\w+)?",
    "LoKr": r"\.lokr_[wt]\d(_[ab])?(\.\w+)?",
    "OFT": r"\.b?oft_\w+(\.\w+)*",
    "IA3": r"\.on_input|\.ia3_l(\.\w+)?",
    "GLoRA": r"\.(a[12]|b[12]|bm)\.weight",
    "VeRA": r"\.vera_\w+(\.\w+)*",
    "LoCon in Tucker's form": r"\.lora_mid\.weight",
    "LoRA of token embeddings": r"\.lora_embedding_[AB](\.\w+)?",
    "LoRA with biases": r"\.lora_(A|B|down|up)(\.\w+)?\.bias",
    "weights of norms": r"\.[wb]_norm",
    "whole differences of weights": r"\.diff(_b)?|\.set_weight",
}
"""What the names of tensors end with that belong to no low-rank addition to a weight, by method."""

_LEAVE = "leave it out: bundles take none."
_CONTROLNET = TensorKind(
    "a ControlNet", "Give it as the recipe's controlnet: --set controlnet=PATH --set task=controlnet."
)
_SOURCE = "Give it as --source PATH (in a recipe: source)."
_CHECKPOINT = TensorKind("a whole checkpoint", _SOURCE)
_INVERSION = TensorKind("a textual inversion embedding", f"Say in the prompt what it stands for, and {_LEAVE}")
_UNET = TensorKind("a whole UNet", f"{_SOURCE[:-1]}, with text: false and vae: false where it is all there is.")

_KINDS = {
    r"lora_controlnet": TensorKind(
        "a Control-LoRA", f"Give a whole ControlNet as the recipe's controlnet, or {_LEAVE}"
    ),
    r"lllite_.*": TensorKind("a ControlNet-LLLite", f"Give a whole ControlNet as the recipe's controlnet, or {_LEAVE}"),
    r"control_model\..*": _CONTROLNET,
    r"(.*\.)?(controlnet_cond_embedding|input_hint_block|controlnet_down_blocks|zero_convs)\..*": _CONTROLNET,
    r"(image_proj|ip_adapter|image_proj_model)\..*|.*\.to_[kv]_ip\..*": TensorKind(
        "an IP-Adapter", f"Start from a picture with task image-to-image, or {_LEAVE}"
    ),
    r"(adapter\.)?body\.\d+\..*": TensorKind(
        "a T2I-Adapter", f"Give a ControlNet as the recipe's controlnet, or {_LEAVE}"
    ),
    r".*\bmotion_modules\..*": TensorKind("a motion module of AnimateDiff", _LEAVE.capitalize()),
    r"(model\.diffusion_model|cond_stage_model|conditioner)\..*": _CHECKPOINT,
    r"(unet\.|diffusion_model\.)?(down_blocks|up_blocks|mid_block|input_blocks|output_blocks)\..*": _UNET,
    r"(first_stage_model\.|vae\.)?((encoder|decoder)\.(down|up|mid)|(post_)?quant_conv)[._].*": TensorKind(
        "a VAE", "Put it into the vae/ folder of the checkpoint that --source names."
    ),
    r".*\b(token_embedding|final_layer_norm)\..*": TensorKind(
        "a text encoder", "Put it into the text_encoder/ folder of the checkpoint that --source names."
    ),
    r"emb_params|string_to_param.*|clip_[lgh](_out)?|bundle_emb\..*|<.+>": _INVERSION,
}
"""By a pattern that one of its tensors' names has in full; the first that matches tells."""

_ARCHITECTURES = {
    "HiDream's": r"double_stream_blocks",
    "Flux's or HunyuanVideo's": r"(double|single)_blocks[._]\d|single_transformer_blocks[._]\d",
    "Qwen-Image's": r"[._](img|txt)_(mlp|mod)",
    "SD3's": r"joint_(transformer_)?blocks[._]\d|[._]add_[qkv]_proj|[._]to_add_out",
    "Wan's": r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)[._]",
    "Z-Image's or Lumina's": r"(^|[._])layers[._]\d+[._](attention|feed_forward|adaLN_modulation)[._]",
    "Stable Cascade's": r"^(lora_)?prior[._]",
    "AnimateDiff's": r"motion_modules",
    "Stable Video Diffusion's": r"temporal_transformer_blocks",
    "a language model's": r"\bmodel\.layers\.\d+\.(self_attn|mlp)\.",
    "a diffusion transformer's (Flux, SD3, PixArt, …)": (
        r"^(base_model\.model\.|diffusion_model\.)*(lora_)?transformer(_blocks)?[._]"
    ),
}
"""What the names of layers hold in models that have no UNet of Stable Diffusion."""


def other_methods(names: Iterable[str]) -> dict[str, str]:
    """Names of tensors that belong to other methods than LoRA, and the method of each."""
    return {name: method for name in names for method, ending in _METHODS.items() if re.search(f"(?:{ending})$", name)}


def layer_of_method(name: str) -> str:
    """Returns the layer that another method's tensor changes, as the file calls it."""
    return re.sub(f"(?:{'|'.join(_METHODS.values())})$", "", name)


def kind_of_file(shapes: Shapes) -> TensorKind | None:
    """Returns what a file without a LoRA's factors is, None where its tensors tell nothing."""
    kind = next((kind for pattern, kind in _KINDS.items() if any(re.fullmatch(pattern, name) for name in shapes)), None)
    owner = other_architecture(shapes)
    if owner and kind in (None, _CHECKPOINT, _UNET):
        return TensorKind(f"a checkpoint, by its layers {owner}", "Bundles are made of Stable Diffusion's UNets alone.")
    if kind is None and len(shapes) == 1 and all(len(shape) <= 2 and "." not in name for name, shape in shapes.items()):
        return _INVERSION  # diffusers' hold one tensor under the word that it stands for
    return kind


def other_architecture(stems: Iterable[str]) -> str:
    """Returns whose layers these are, in the genitive, empty when they may be those of a Stable Diffusion UNet.

    Args:
        stems: the layers' names in the file.
    """
    every = tuple(stems)
    found = (owner for owner, mark in _ARCHITECTURES.items() if any(re.search(mark, stem) for stem in every))
    return next(found, "")
