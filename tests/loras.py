"""LoRA files as trainers write them: under kohya's names, diffusers' and PEFT's, for tiny networks, made-up factors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from hidiff_export.families import Family, Task, Width, text_encoder_configs
from hidiff_export.model.component import Component

Factors = dict[tuple[Component, str], tuple[torch.Tensor, torch.Tensor]]
"""Down and up by network and module name."""

_TEXT_LAYERS = r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
_ATTENTION = r"to_(q|k|v|out\.0)"
_CONVOLUTIONS = r"conv1|conv2|conv_shortcut|(down|up)samplers\.0\.conv|time_emb_proj"
_UNET_LAYERS = rf"(.*\.)?({_ATTENTION}|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|{_CONVOLUTIONS}|conv_in|conv_out)"


def networks(family: Family, width: Width = Width.TINY) -> dict[Component, dict[str, tuple[int, ...]]]:
    """The shapes of the UNet and the text encoders."""
    text = [Component(name) for name in text_encoder_configs(family, width)]
    task = Task.TEXT_TO_IMAGE
    return {part: dict(part.shapes(part.config(family, task, width))) for part in (Component.UNET, *text)}


def factors(family: Family, *, rank: int, seed: int, width: Width = Width.TINY, only: str = "") -> Factors:
    """Factors for every layer that trainers change; ``only`` a pattern for the module names."""
    generator = torch.Generator().manual_seed(seed)
    made: Factors = {}
    for component, shapes in networks(family, width).items():
        for name, shape in shapes.items():
            module, _, kind = name.rpartition(".")
            pattern = _TEXT_LAYERS if component.is_text else _UNET_LAYERS
            if kind != "weight" or not re.fullmatch(rf"(text_model\.)?({pattern})", module):
                continue
            if re.search(only, module):
                down = torch.randn(rank, *shape[1:], generator=generator) * 0.2
                up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator) * 0.2
                made[component, module] = down, up
    return made


def kohya(given: Factors, path: Path, *, alpha: float | None, sgm: bool = False) -> Path:
    """Writes a file under kohya's names; SDXL's UNet has the original layout's (``sgm``)."""
    text = {Component.TEXT_ENCODER: "lora_te1_" if sgm else "lora_te_", Component.TEXT_ENCODER_2: "lora_te2_"}
    tensors: dict[str, torch.Tensor] = {}
    for (component, module), (down, up) in given.items():
        if component is Component.UNET:
            stem = "lora_unet_" + (_original(module) if sgm else module).replace(".", "_")
        else:
            stem = text[component] + "text_model_" + module.removeprefix("text_model.").replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return save(tensors, path)


def peft(given: Factors, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Writes a file as diffusers' ``save_lora_weights`` does today."""
    tensors: dict[str, torch.Tensor] = {}
    for (component, module), (down, up) in given.items():
        tensors |= {f"{component.value}.{module}.lora_{half}.weight": one for half, one in (("A", down), ("B", up))}
    return save(tensors, path, metadata)


def old_diffusers(given: Factors, path: Path) -> Path:
    """Writes a file as diffusers did before PEFT, for attention alone."""
    tensors: dict[str, torch.Tensor] = {}
    for (component, module), (down, up) in given.items():
        if component is Component.UNET:
            stem = "unet." + re.sub(r"\.to_(q|k|v|out)(\.0)?$", r".processor.to_\1_lora", module)
        else:
            stem = f"{component.value}.{module}.lora_linear_layer"
        tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return save(tensors, path)


def save(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Writes tensors as a safetensors file."""
    save_file(dict(tensors), path, dict(metadata or {}))
    return path


def _original(module: str) -> str:
    """A module of SDXL's UNet under its name in the original layout."""
    return next(_renamed(module))


def _renamed(module: str) -> Iterator[str]:
    inner = {"resnets": 0, "attentions": 1, "upsamplers": 2}
    if match := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv", module):
        yield f"input_blocks.{3 * int(match[1]) + 3}.0.op"
    if match := re.fullmatch(r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", module):
        yield f"input_blocks.{3 * int(match[1]) + int(match[3]) + 1}.{inner[match[2]]}.{_residual(match[4])}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", module):
        yield f"middle_block.{2 * int(match[2]) + inner[match[1]]}.{_residual(match[3])}"
    if match := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv", module):
        yield f"output_blocks.{3 * int(match[1]) + 2}.2.conv"
    if match := re.fullmatch(r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", module):
        yield f"output_blocks.{3 * int(match[1]) + int(match[3])}.{inner[match[2]]}.{_residual(match[4])}"
    yield {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}[module]


def _residual(module: str) -> str:
    names = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    return names.get(module, "skip_connection" if module == "conv_shortcut" else module)
