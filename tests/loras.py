"""LoRA files as trainers write them, for tiny networks with made-up factors, and the weights that they define."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path

import torch
from safetensors.torch import save_file

from hidiff_export.checkpoints.component import Component
from hidiff_export.families.family import Family, Task, Width, text_encoder_configs

Layer = tuple[Component, str]
"""A network and a module's name there."""

Factors = dict[Layer, tuple[torch.Tensor, torch.Tensor]]
"""Down and up by layer."""

Alphas = Mapping[Layer, float] | float | None
"""By layer, or one for all; layers that are not named have none."""

_TEXT_LAYERS = r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
_ATTENTION = r"to_(q|k|v|out\.0)"
_CONVOLUTIONS = r"conv1|conv2|conv_shortcut|(down|up)samplers\.0\.conv|time_emb_proj"
_UNET_LAYERS = rf"(.*\.)?({_ATTENTION}|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|{_CONVOLUTIONS}|conv_in|conv_out)"


@cache
def networks(family: Family, width: Width = Width.TINY) -> Mapping[Component, Mapping[str, tuple[int, ...]]]:
    """The shapes of the UNet and the text encoders."""
    text = [Component(name) for name in text_encoder_configs(family, width)]
    task = Task.TEXT_TO_IMAGE
    return {part: dict(part.shapes(part.config(family, task, width))) for part in (Component.UNET, *text)}


def factors(
    family: Family, *, rank: int | Sequence[int], seed: int, width: Width = Width.TINY, only: str = ""
) -> Factors:
    """Factors for every layer that trainers change; ``only`` a pattern for the module names.

    ``rank`` is one for all, or goes round.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = cycle([rank] if isinstance(rank, int) else rank)
    made: Factors = {}
    for component, shapes in networks(family, width).items():
        for name, shape in shapes.items():
            module, _, kind = name.rpartition(".")
            pattern = _TEXT_LAYERS if component.is_text else _UNET_LAYERS
            if kind != "weight" or not re.fullmatch(rf"(text_model\.)?({pattern})", module):
                continue
            if re.search(only, module):
                own = next(ranks)
                down = torch.randn(own, *shape[1:], generator=generator) * 0.2
                up = torch.randn(shape[0], own, *(1,) * (len(shape) - 2), generator=generator) * 0.2
                made[component, module] = down, up
    return made


def scaling(weights: Mapping[Layer, torch.Tensor], by: Mapping[Layer, float]) -> Factors:
    """Factors that multiply the weights of linear layers; the file has to come without alphas.

    Args:
        weights: of the layers, ``[out, in]``.
        by: what each layer's are multiplied by.
    """
    return {layer: (torch.eye(weights[layer].shape[1]), (factor - 1) * weights[layer]) for layer, factor in by.items()}


def summed(
    weights: Mapping[Layer, torch.Tensor], given: Factors, alphas: Alphas, scale: float
) -> dict[Layer, torch.Tensor]:
    """What kohya's trainer defines: W + scale * alpha / rank * up * down in float64, with the rank for no alpha.

    Args:
        weights: by network and tensor name.
        given: the file's.
        alphas: the file's.
        scale: of the file.
    """
    sums = dict(weights)
    for (component, module), (down, up) in given.items():
        rank = down.shape[0]
        alpha = _alpha(alphas, (component, module))
        product = torch.tensordot(up.double().reshape(-1, rank), down.double(), dims=1)
        key = component, f"{module}.weight"
        sums[key] = sums[key].double() + scale * ((rank if alpha is None else alpha) / rank) * product
    return sums


def kohya(given: Factors, path: Path, *, alpha: Alphas, sgm: bool = False) -> Path:
    """Writes a file under kohya's names; SDXL's UNet has the original layout's (``sgm``)."""

    def stem(component: Component, module: str) -> str:
        if component is Component.UNET:
            return "lora_unet_" + (_original(module, 2) if sgm else module).replace(".", "_")
        prefix = {Component.TEXT_ENCODER: "lora_te1_" if sgm else "lora_te_", Component.TEXT_ENCODER_2: "lora_te2_"}
        return prefix[component] + _text(module).replace(".", "_")

    return _write(given, path, stem, (".lora_down", ".lora_up"), alpha)


def lycoris(given: Factors, path: Path, *, alpha: Alphas) -> Path:
    """Writes a file as LyCORIS does where it wraps a UNet by itself."""
    return _write(
        given, path, lambda _, module: "lycoris_" + module.replace(".", "_"), (".lora_down", ".lora_up"), alpha
    )


def one_trainer(given: Factors, path: Path, *, alpha: Alphas) -> Path:
    """Writes a file as OneTrainer keeps it inside: kohya's factors behind diffusers' names."""
    return _write(given, path, _diffusers, (".lora_down", ".lora_up"), alpha)


def dotted_kohya(given: Factors, path: Path, *, alpha: Alphas, first_up: int = 2) -> Path:
    """Writes a file under the original layout's names with dots, behind kohya's prefixes with dots."""
    prefix = {Component.UNET: "lora_unet", Component.TEXT_ENCODER: "lora_te1", Component.TEXT_ENCODER_2: "lora_te2"}

    def stem(component: Component, module: str) -> str:
        name = _text(module) if component.is_text else _original(module, first_up)
        return f"{prefix[component]}.{name}"

    return _write(given, path, stem, (".lora_down", ".lora_up"), alpha)


def comfy(given: Factors, path: Path, *, alpha: Alphas, first_up: int = 2) -> Path:
    """Writes a file as OneTrainer does for ComfyUI: the original layout's names, ``.alpha`` beside PEFT's factors."""
    prefix = {Component.TEXT_ENCODER: "clip_l", Component.TEXT_ENCODER_2: "clip_g"}

    def stem(component: Component, module: str) -> str:
        if component is Component.UNET:
            return "diffusion_model." + _original(module, first_up)
        return f"text_encoders.{prefix[component]}.transformer.{_text(module)}"

    return _write(given, path, stem, (".lora_A", ".lora_B"), alpha)


def original(given: Factors, path: Path, *, alpha: Alphas, first_up: int = 2) -> Path:
    """Writes a UNet's file as OneTrainer does in its original format: no prefix at all."""
    return _write(given, path, lambda _, module: _original(module, first_up), (".lora_A", ".lora_B"), alpha)


def peft(
    given: Factors, path: Path, metadata: Mapping[str, str] | None = None, *, alpha: Alphas = None, prefix: str = ""
) -> Path:
    """Writes a file as diffusers' ``save_lora_weights`` does today; ``prefix`` goes before the networks' names."""

    def stem(component: Component, module: str) -> str:
        return prefix + _diffusers(component, module)

    return _write(given, path, stem, (".lora_A", ".lora_B"), alpha, metadata)


def bare_peft(given: Factors, path: Path, *, alpha: Alphas = None, adapter: str = "") -> Path:
    """Writes a file as PEFT's own ``save_pretrained`` does for a wrapped UNet or text encoder."""

    def stem(component: Component, module: str) -> str:
        return "base_model.model." + (_text(module) if component.is_text else module)

    return _write(given, path, stem, (f".lora_A{adapter}", f".lora_B{adapter}"), alpha)


def old_diffusers(given: Factors, path: Path, *, alpha: Alphas = None) -> Path:
    """Writes a file as diffusers did before PEFT: attention processors, and linear layers of the text encoder."""

    def stem(component: Component, module: str) -> str:
        if component is Component.UNET:
            return "unet." + re.sub(r"\.to_(q|k|v|out)(\.0)?$", r".processor.to_\1_lora", module)
        return f"{component.value}.{module}.lora_linear_layer"

    return _write(given, path, stem, (".down", ".up"), alpha)


def later_diffusers(given: Factors, path: Path, *, alpha: Alphas = None) -> Path:
    """Writes a file as diffusers did after that, when a UNet's layers held their factors themselves."""
    return _write(given, path, _diffusers, (".lora.down", ".lora.up"), alpha)


def save(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Writes tensors as a safetensors file."""
    save_file(dict(tensors), path, dict(metadata or {}))
    return path


def _write(
    given: Factors,
    path: Path,
    stem: Callable[[Component, str], str],
    ends: tuple[str, str],
    alphas: Alphas,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    tensors: dict[str, torch.Tensor] = {}
    for layer, (down, up) in given.items():
        name = stem(*layer)
        tensors |= {f"{name}{ends[0]}.weight": down, f"{name}{ends[1]}.weight": up}
        alpha = _alpha(alphas, layer)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return save(tensors, path, metadata)


def _alpha(alphas: Alphas, layer: Layer) -> float | None:
    return alphas.get(layer) if isinstance(alphas, Mapping) else alphas


def _diffusers(component: Component, module: str) -> str:
    return f"{component.value}.{_text(module) if component.is_text else module}"


def _text(module: str) -> str:
    return "text_model." + module.removeprefix("text_model.")


def _original(module: str, first_up: int) -> str:
    """A module of a UNet under its name in the original layout; the upsampler of the first up block is its part."""
    return next(_renamed(module, first_up))


def _renamed(module: str, first_up: int) -> Iterator[str]:
    inner = {"resnets": 0, "attentions": 1}
    if match := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv", module):
        yield f"input_blocks.{3 * int(match[1]) + 3}.0.op"
    if match := re.fullmatch(r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", module):
        yield f"input_blocks.{3 * int(match[1]) + int(match[3]) + 1}.{inner[match[2]]}.{_residual(match[4])}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", module):
        yield f"middle_block.{2 * int(match[2]) + inner[match[1]]}.{_residual(match[3])}"
    if match := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv", module):
        yield f"output_blocks.{3 * int(match[1]) + 2}.{first_up if match[1] == '0' else 2}.conv"
    if match := re.fullmatch(r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", module):
        yield f"output_blocks.{3 * int(match[1]) + int(match[3])}.{inner[match[2]]}.{_residual(match[4])}"
    yield {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}[module]


def _residual(module: str) -> str:
    names = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    return names.get(module, "skip_connection" if module == "conv_shortcut" else module)
