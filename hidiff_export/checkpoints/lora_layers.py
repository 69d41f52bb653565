"""The layers of each family's UNet and text encoders, under every name that LoRA files have for them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.lora_file import PEFT_PREFIX
from hidiff_export.checkpoints.state_dict import Shapes
from hidiff_export.families.family import Family, Task, Width, text_encoder_configs

_PREFIXES = {
    Component.UNET: ("lora_unet_", "lycoris_", "lora_unet.", "unet.", "model.diffusion_model.", "diffusion_model."),
    Component.TEXT_ENCODER: (
        *("lora_te_", "lora_te1_", "lora_te.", "lora_te1.", "text_encoder."),
        *("text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer.", "clip_l.", "clip_h."),
    ),
    Component.TEXT_ENCODER_2: (
        *("lora_te2_", "lora_te2.", "text_encoder_2."),
        *("text_encoders.clip_g.transformer.", "clip_g."),
    ),
}
"""What kohya, LyCORIS, OneTrainer, diffusers and ComfyUI put before a network's layers. Behind a prefix with an
underscore at its end, layers have underscores for dots."""

_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE_BLOCKS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_LAYERS_PER_BLOCK = 2
"""Of every family's UNet."""

_TEXT_MODEL = "text_model."
_TEXT_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
"""What diffusers called a text encoder's projections before PEFT."""


class Layers:
    """A family's layers: linear ones and convolutions, whose weights a LoRA adds to.

    Args:
        shapes: of the tensors of the UNet and of each text encoder, under their libraries' names.
    """

    def __init__(self, shapes: Mapping[Component, Shapes]) -> None:
        self.shapes = shapes
        self._names = {part: _names_of_layers(part, own) for part, own in shapes.items()}

    def find(self, stem: str) -> tuple[Component, str] | None:
        """Returns the network and the weight of a layer.

        Args:
            stem: the layer's name in a file, with the network's prefix and without the factor's ending.

        Returns:
            None when no network has such a layer, or more than one.
        """
        name = stem.removeprefix(PEFT_PREFIX)
        for component, prefixes in _PREFIXES.items():
            prefix = next((one for one in prefixes if name.startswith(one)), None)
            if prefix is not None:
                return self._at(component, name.removeprefix(prefix).removeprefix(PEFT_PREFIX))
        found = [place for component in self.shapes if (place := self._at(component, name))]
        return found[0] if len(found) == 1 else None

    def is_ambiguous(self, stem: str) -> bool:
        """Returns whether more than one text encoder has the layer and its name tells neither."""
        name = stem.removeprefix(PEFT_PREFIX)
        return sum(name in names for names in self._names.values()) > 1

    def _at(self, component: Component, name: str) -> tuple[Component, str] | None:
        weight = self._names.get(component, {}).get(name)
        return None if weight is None else (component, weight)


@cache
def layers_of(family: Family, task: Task, width: Width) -> Layers:
    """Returns the layers of a family's UNet and text encoders."""
    text = [Component(name) for name in text_encoder_configs(family, width)]
    configs = {part: part.config(family, task, width) for part in (Component.UNET, *text)}
    return Layers({part: _shapes(part, json.dumps(config)) for part, config in configs.items()})


@cache
def _shapes(component: Component, config: str) -> Shapes:
    loaded: dict[str, Any] = json.loads(config)
    return component.shapes(loaded)


def _names_of_layers(component: Component, shapes: Shapes) -> dict[str, str]:
    """Returns a network's weights by each name of their layers, with dots and with underscores."""
    modules = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    names = {}
    for module in modules:
        known = _text_names(module) if component.is_text else _unet_names(module, modules)
        for name in known if len(shapes[f"{module}.weight"]) > 1 else ():
            names[name] = names[name.replace(".", "_")] = f"{module}.weight"
    return names


def _unet_names(module: str, modules: Collection[str]) -> Iterator[str]:
    yield module
    yield original_name(module, modules)
    if match := re.fullmatch(r"(.+\.attn\d)\.(to_[qkv]|to_out)(\.0)?", module):
        # diffusers' attention processors held the factors before PEFT, and knew no list of output layers
        yield f"{match[1]}.processor.{match[2]}"
        yield f"{match[1]}.{match[2]}"


def _text_names(module: str) -> Iterator[str]:
    bare = module.removeprefix(_TEXT_MODEL)  # transformers' classes differ in whether they have this prefix
    names = [bare]
    head, _, last = bare.rpartition(".")
    if last in _TEXT_ATTENTION:
        names.append(f"{head}.{_TEXT_ATTENTION[last]}")
    for name in names:
        yield name
        yield _TEXT_MODEL + name


def original_name(module: str, modules: Collection[str]) -> str:
    """Returns a module of diffusers' UNet under its name in the original layout.

    Args:
        module: as diffusers has it.
        modules: all of the UNet's.
    """
    if module in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[module]
    match = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d))?\.(\w+)\.(\d)\.(.+)", module)
    if match is None:
        raise ValueError(f"expected a module of a UNet, got {module!r}")
    side, block, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(_LAYERS_PER_BLOCK + 1) * (block + 1)}.0.op"
    if kind == "upsamplers":
        with_attention = any(name.startswith(f"up_blocks.{block}.attentions.") for name in modules)
        return f"output_blocks.{(_LAYERS_PER_BLOCK + 1) * (block + 1) - 1}.{2 if with_attention else 1}.{rest}"
    inner, within = (0, _RESIDUAL.get(rest, rest)) if kind == "resnets" else (1, rest)
    if side == "mid":
        return f"middle_block.{2 * index + inner}.{within}"
    place = (_LAYERS_PER_BLOCK + 1) * block + index
    return f"input_blocks.{place + 1}.{inner}.{within}" if side == "down" else f"output_blocks.{place}.{inner}.{within}"
