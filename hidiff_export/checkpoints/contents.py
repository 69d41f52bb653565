"""What tensors are by their names, in the field's own words: a LoRA, a VAE alone, another model's UNet."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

UNET_PREFIX = "model.diffusion_model."
CONTROL_PREFIX = "control_model."
"""What whole checkpoints put before the names of a UNet and of a ControlNet."""


class TensorKind(NamedTuple):
    """What a file or a tensor is, with an article, and what to do with it."""

    what: str
    advice: str

    @property
    def is_control(self) -> bool:
        """Whether it is a form of ControlNet, or stands in the place of one."""
        return self.advice == _FULL_CONTROLNET


_SUPPORTED = "Give a checkpoint of one of the families that `hidiff-export recipes` lists."
_WHOLE = "Give a whole checkpoint or the pipeline's diffusers folder as the source."
_FULL_CONTROLNET = "Give a whole ControlNet, as diffusers' ControlNetModel or in the layout of ControlNet's own code."
_PLAIN = "Take it out, or give the checkpoint from before it was put in."
_LCM = "A UNet that takes its guidance as an input is not built: give the base model, and LCM's LoRA as --lora."

LORA = TensorKind("a LoRA", "Give it as --lora, beside a checkpoint.")
UNET = TensorKind("a UNet", "Give it as the recipe's source, and a ControlNet as its controlnet.")
CONTROLNET = TensorKind("a ControlNet", "Give it as the recipe's controlnet, and a checkpoint as its source.")
VAE = TensorKind("a VAE alone", _WHOLE)
TEXT_ENCODER = TensorKind("a text encoder alone", _WHOLE)

_CONTROL_LORA = TensorKind("a Control-LoRA, a ControlNet kept as low-rank changes of a UNet", _FULL_CONTROLNET)
_DIFFERENCE = TensorKind(
    "a difference ControlNet, whose weights are to be added to those of the UNet it was made from", _FULL_CONTROLNET
)
_UNION = TensorKind("a union ControlNet, which takes several kinds of control", _FULL_CONTROLNET)
_HALF = TensorKind("the down half of a UNet, without the layers that a ControlNet adds", _FULL_CONTROLNET)
_TRANSFORMER_CONTROLNET = TensorKind("a ControlNet for a transformer such as Flux or SD3", _FULL_CONTROLNET)

_ADAPTERS = {
    r"^lora_controlnet$": _CONTROL_LORA,
    r"^lllite_": TensorKind("a ControlNet-LLLite", _FULL_CONTROLNET),
    r"^difference$": _DIFFERENCE,
    r"ip_adapter|^image_proj|to_[kv]_ip\b|^encoder_hid_proj": TensorKind("an IP-Adapter", _PLAIN),
    r"(^|[._])lora[._]|lora_(A|B|up|down)\b|hada_w\d|lokr_w\d|dora_scale|\.oft_": LORA,
    r"motion_modules?\.|temporal_transformer\.": TensorKind("an AnimateDiff motion module", _PLAIN),
    r"^position_net\.|\.fuser\.": TensorKind("GLIGEN's layers", _PLAIN),
    r"^time_embed(ding)?\.cond_proj\.": TensorKind("an LCM's guidance embedding", _LCM),
}
"""What changes a UNet's weights, beside its own tensors or in a file of its own. The first that matches counts."""

_ADDED = {
    **_ADAPTERS,
    r"^emb_params$|^string_to_param|^clip_[lg]$|^<[^>]+>$|^bundle_emb\.": TensorKind(
        "a textual inversion", "Write the words into the prompt; embeddings are not taken."
    ),
}
"""What people add to a UNet, textual inversions included."""

_CONTROLS = {
    r"^(task_embedding$|control_add_embedding\.|transformer_layes\.)": _UNION,
    r"ctrl_to_base|control_to_base|^enc_zero_convs_out\.": TensorKind("a ControlNet-XS", _FULL_CONTROLNET),
    r"^(controlnet_x_embedder|controlnet_mode_embedder|controlnet_blocks)\.": _TRANSFORMER_CONTROLNET,
    r"^(controlnet_cond_embedding|input_hint_block|zero_convs|controlnet_down_blocks)\.": CONTROLNET,
    r"^adapter\.|^body\.\d+\.(in_conv|resnets|block\d|body|down_opt)\b": TensorKind("a T2I-Adapter", _FULL_CONTROLNET),
}

_OTHER_MODELS = {
    r"^joint_transformer_blocks\.": TensorKind("an AuraFlow transformer", _SUPPORTED),
    r"^distilled_guidance_layer\.": TensorKind("a Chroma transformer", _SUPPORTED),
    r"^double_blocks\.\d|^single_transformer_blocks\.": TensorKind(
        "a Flux transformer, or one of its kind", _SUPPORTED
    ),
    r"^joint_blocks\.\d|norm1_context\b": TensorKind("a Stable Diffusion 3 transformer", _SUPPORTED),
    r"clip_txt(_pooled)?_mapper|effnet_mapper|\.channelwise\.": TensorKind("a Stable Cascade UNet", _SUPPORTED),
    r"adaln_single|^y_embedder\.": TensorKind("a PixArt transformer", _SUPPORTED),
    r"^(transformer_)?blocks\.\d|^layers\.\d+\.(attention|adaLN)": TensorKind("a transformer", _SUPPORTED),
    r"^encoder\.block\.\d+\.layer\.|^shared\.weight$": TensorKind("a T5 text encoder", _SUPPORTED),
    r"token_embedding\.weight$|text_model\.encoder\.": TEXT_ENCODER,
    r"^(encoder|decoder)\.layers\.\d|^taesd": TensorKind("a tiny VAE (TAESD)", _WHOLE),
    r"(^|\.)(post_)?quant_conv\.|^(encoder|decoder)\.(conv_in|mid)": VAE,
    r"\.rdb\d\.|RRDB_trunk|\.RDB\d\.": TensorKind("an upscaler of pictures (ESRGAN)", _SUPPORTED),
}

_FIRST = ("conv_in.weight", "input_blocks.0.0.weight")
_DOWNWARD = ("down_blocks.", "input_blocks.1.")
_UPWARD = ("up_blocks.", "output_blocks.")


def kind_of(names: Collection[str]) -> TensorKind | None:
    """Returns what a file is by its tensors' names, or None if it is unknown.

    A UNet is one whatever else was put into it; so is a ControlNet, unless it is of a kind with a name of its own.
    """
    names = {name.removeprefix(UNET_PREFIX).removeprefix(CONTROL_PREFIX) for name in names}
    begins = any(first in names for first in _FIRST)
    if begins and any(name.startswith(_UPWARD) for name in names):
        return UNET
    controls = _first_match(_CONTROLS, names)
    added = _first_match(_ADDED, names)
    if controls is not None and added not in (_CONTROL_LORA, _DIFFERENCE):
        return controls
    half = _HALF if begins and any(name.startswith(_DOWNWARD) for name in names) else None
    return added or _first_match(_OTHER_MODELS, names) or half


def changing_kind(names: Collection[str]) -> TensorKind | None:
    """Returns which adapter is among tensors that a network has no place for; None where none changes weights."""
    return _first_match(_ADAPTERS, names)


def added_kind(name: str) -> TensorKind | None:
    """Returns what a tensor belongs to that is none of a network's own: an adapter of one kind or another, or None."""
    return _first_match({**_ADDED, **_CONTROLS}, (name,))


def listed(items: Iterable[str], limit: int = 4) -> str:
    """Returns the first few of a list, and how many more there are."""
    shown = list(items)
    rest = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _first_match(kinds: Mapping[str, TensorKind], names: Collection[str]) -> TensorKind | None:
    return next((kind for pattern, kind in kinds.items() if any(re.search(pattern, name) for name in names)), None)
