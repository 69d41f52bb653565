"""Which weight each tensor of a LoRA file changes, by diffusers' own renaming of the ways such files are written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from hidiff_export.model.component import Component

_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_PEFT_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's settings in a file's header."""

_OTHERS = {
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".oft_": "OFT",
    ".boft_": "OFT",
    ".lora_mid": "LoCon in Tucker's form",
    ".w_norm": "weights of norms",
    ".b_norm": "weights of norms",
    ".diff": "whole differences of weights",
    "lora_B.bias": "biases",
    "lora_up.bias": "biases",
    ".on_input": "IA3",
}
"""What marks methods that are no low-rank addition to a weight."""


class Pair(NamedTuple):
    """The two factors for one weight.

    Args:
        down: ``[rank, inputs]``, of a convolution ``[rank, inputs, height, width]``.
        up: ``[outputs, rank]``, of a convolution ``[outputs, rank, 1, 1]``.
        factor: alpha over rank, which their product is multiplied by.
        names: of the tensors in the file.
    """

    down: torch.Tensor
    up: torch.Tensor
    factor: float
    names: tuple[str, ...]


Pairs = Mapping[tuple[Component, str], Pair]
"""By network and module name, as diffusers and transformers have them."""


def other_methods(names: Iterable[str]) -> dict[str, str]:
    """Names of tensors that belong to other methods than LoRA, and the method of each."""
    found = ((name, method) for name in names for mark, method in _OTHERS.items() if mark in name)
    return dict(found)


def pairs_of(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> tuple[Pairs, tuple[str, ...]]:
    """A file's factors by what they change.

    Args:
        tensors: under kohya's names (``lora_unet_…``), or diffusers' and PEFT's (``unet.….lora_A.weight``).
        metadata: of the file's header.

    Returns:
        The pairs, and the names of the tensors that belong to none.

    Raises ValueError where diffusers cannot rename a tensor, or PEFT's settings are no JSON; KeyError and IndexError
    are among what diffusers raises for names it half knows.
    """
    settings = json.loads(metadata.get(_PEFT_METADATA, "{}"))
    halves: dict[tuple[Component, str], dict[str, str]] = {}
    for name, target in _targets(tensors).items():
        match = re.fullmatch(r"(unet|text_encoder|text_encoder_2)\.(.+)\.lora_([AB])\.weight", target)
        if match:
            halves.setdefault((Component(match[1]), match[2]), {})[match[3]] = name
    pairs = {}
    for (component, module), names in halves.items():
        if len(names) == 2:
            pairs[component, module] = _pair(tensors, names, settings, component, module)
    used = {name for pair in pairs.values() for name in pair.names}
    return pairs, tuple(name for name in tensors if name not in used)


def _targets(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Each tensor's name in PEFT's form, ``unet.down_blocks.….to_q.lora_A.weight``, by its name in the file."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as Loader

    # Every family's UNet has two layers a block, which is all that renaming asks of the configuration. Diffusers hands
    # the tensors through, so a tensor's new name is found by the tensor itself.
    renamed, _ = Loader.lora_state_dict(dict(tensors), unet_config=SimpleNamespace(layers_per_block=2))
    own = {id(tensor): name for name, tensor in tensors.items()}
    return {own[id(tensor)]: _in_peft_form(name) for name, tensor in renamed.items()}


def _in_peft_form(name: str) -> str:
    from diffusers.utils import state_dict_utils as forms

    of_text = name.startswith("text_encoder")
    if not of_text and not name.startswith("unet."):
        name = f"unet.{name}"  # diffusers' first files held a UNet's attention alone, and did not say so
    mapping = {**forms.DIFFUSERS_OLD_TO_PEFT, **forms.DIFFUSERS_TO_PEFT} if of_text else forms.UNET_TO_DIFFUSERS
    (converted,) = forms.convert_state_dict({name: None}, mapping)
    return str(converted)


def _pair(
    tensors: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    settings: Mapping[str, Any],
    component: Component,
    module: str,
) -> Pair:
    down, up = tensors[names["A"]], tensors[names["B"]]
    rank = max(1, down.shape[0] if down.ndim else 1)
    stem, kohya, _ = names["A"].partition(".lora_down.")
    alpha = f"{stem}.alpha"
    if names["A"].startswith(_KOHYA) and kohya and alpha in tensors:
        return Pair(down, up, float(tensors[alpha]) / rank, (names["A"], names["B"], alpha))
    return Pair(down, up, _peft_factor(settings, component, module, rank), (names["A"], names["B"]))


def _peft_factor(settings: Mapping[str, Any], component: Component, module: str, rank: int) -> float:
    """What PEFT multiplies by: 1 where the file holds no settings, as diffusers takes it."""
    own = {key.removeprefix(f"{component.value}."): value for key, value in settings.items()}
    if f"{component.value}.lora_alpha" not in settings:
        return 1.0
    alpha = own["lora_alpha"]
    for pattern, value in (own.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)
