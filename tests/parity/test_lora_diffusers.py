"""Fused weights beside those of diffusers: ``load_lora_weights`` and ``fuse_lora`` with PEFT on tiny pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from hidiff_export.families import Family, Task, Width
from hidiff_export.model.component import Component
from hidiff_export.model.load import build, load
from hidiff_export.model.lora import Lora, fuse, read_lora
from tests.loras import factors, kohya, networks, old_diffusers, peft
from tests.parity.pipelines import scheduler_of

Weights = dict[tuple[Component, str], torch.Tensor]

ROUNDING = 2e-6
"""Of weights of order one, added to in another order."""

SETTINGS = {"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": {"attn2.to_k": 1}, "unet.use_rslora": False}


ATTENTION = r"mid_block.*attn\d\.to_|layers\.1\.self_attn"
EVERY_KIND = rf"{ATTENTION}|^(down_blocks\.1.*(s\.0)\.|up_blocks\.1.*(\.2|samplers)\.|conv_)|layers\.0"
"""Of layers; PEFT takes long to make room for each."""


def _kohya_sd15(folder: Path) -> Path:
    made = factors(Family.SD15, rank=4, seed=1, only=EVERY_KIND)
    return kohya(made, folder / "kohya-sd15.safetensors", alpha=1.0)


def _kohya_sdxl(folder: Path) -> Path:
    made = factors(Family.SDXL, rank=4, seed=2, only=EVERY_KIND)
    return kohya(made, folder / "kohya-sdxl.safetensors", alpha=8.0, sgm=True)


def _kohya_without_alpha(folder: Path) -> Path:
    made = factors(Family.SD15, rank=4, seed=3, only=ATTENTION)
    return kohya(made, folder / "kohya-bare.safetensors", alpha=None)


def _peft_sd15(folder: Path) -> Path:
    return peft(factors(Family.SD15, rank=3, seed=4, only=ATTENTION), folder / "peft-sd15.safetensors")


def _peft_sdxl(folder: Path) -> Path:
    return peft(factors(Family.SDXL, rank=3, seed=5, only=ATTENTION), folder / "peft-sdxl.safetensors")


def _peft_with_settings(folder: Path) -> Path:
    made = factors(Family.SD15, rank=4, seed=6, only=r"mid_block.*attn\d\.to_")
    targets = {"unet.target_modules": sorted({module for _, module in made})}
    metadata = {"lora_adapter_metadata": json.dumps({**SETTINGS, **targets})}
    return peft(made, folder / "peft-settings.safetensors", metadata)


def _old_sd15(folder: Path) -> Path:
    return old_diffusers(factors(Family.SD15, rank=4, seed=7, only=ATTENTION), folder / "old-sd15.safetensors")


KINDS: Mapping[str, Callable[[Path], Path]] = {
    "kohya's names, no alpha": _kohya_without_alpha,
    "PEFT's settings in the header": _peft_with_settings,
    "diffusers before PEFT": _old_sd15,
}


def _checkpoints(family: Family) -> dict[Component, Any]:
    task, width = Task.TEXT_TO_IMAGE, Width.TINY
    return {part: load(part, "random:0", family, task, width) for part in networks(family)}


def _pipeline(family: Family) -> Any:
    parts = {part.value: build(part, *checkpoint[:2]) for part, checkpoint in _checkpoints(family).items()}
    for part in parts.values():
        part.load_state_dict({name: value.clone() for name, value in part.state_dict().items()}, assign=True)
    none = dict.fromkeys(("vae", "tokenizer"))
    if family is Family.SDXL:
        return diffusers.StableDiffusionXLPipeline(
            **none, tokenizer_2=None, **parts, scheduler=scheduler_of(family), add_watermarker=False
        )
    return diffusers.StableDiffusionPipeline(
        **none,
        **parts,
        scheduler=scheduler_of(family),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def diffusers_weights(family: Family, files: list[tuple[Path, float]]) -> Weights:
    """What diffusers makes of the weights."""
    pipe = _pipeline(family)
    for path, scale in files:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        pipe.fuse_lora(components=[part.value for part in networks(family)], lora_scale=scale)
        pipe.unload_lora_weights()
    weights: Weights = {}
    for component in networks(family):
        for name, value in getattr(pipe, component.value).state_dict().items():
            if "lora_" not in name:
                weights[component, name.replace(".base_layer", "")] = value
    return weights


def our_weights(family: Family, loras: list[Lora]) -> Weights:
    """What this project makes of them."""
    weights: Weights = {}
    for component, checkpoint in _checkpoints(family).items():
        fused = fuse(component, checkpoint, loras).state_dict
        weights |= {(component, name): fused[name] for name in fused}
    return weights


def opened(family: Family, files: list[tuple[Path, float]]) -> list[Lora]:
    return [read_lora(path, scale, family, Task.TEXT_TO_IMAGE, Width.TINY) for path, scale in files]


def largest_difference(one: Weights, other: Weights) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_weights_are_those_of_diffusers(kind: str, tmp_path: Path) -> None:
    files = [(KINDS[kind](tmp_path), 0.7)]
    theirs = diffusers_weights(Family.SD15, files)
    (lora,) = opened(Family.SD15, files)
    assert largest_difference(our_weights(Family.SD15, [lora]), theirs) < ROUNDING
    assert largest_difference(our_weights(Family.SD15, [replace(lora, scale=0.6)]), theirs) > 1e-3


def _changed(lora: Lora, change: Callable[[Any], Any]) -> Lora:
    pairs = {part: {name: change(pair) for name, pair in pairs.items()} for part, pairs in lora.pairs.items()}
    return replace(lora, pairs=pairs)


@pytest.mark.parametrize(
    ("family", "writers"), [(Family.SD15, (_kohya_sd15, _peft_sd15)), (Family.SDXL, (_peft_sdxl, _kohya_sdxl))]
)
def test_two_loras_add_up(family: Family, writers: tuple[Callable[[Path], Path], ...], tmp_path: Path) -> None:
    files = [(write(tmp_path), scale) for write, scale in zip(writers, (0.8, -0.5), strict=True)]
    theirs = diffusers_weights(family, files)
    loras = opened(family, files)
    assert {part for lora in loras for part in lora.pairs} == networks(family).keys()
    assert largest_difference(our_weights(family, loras), theirs) < ROUNDING
    wrong = {
        "none": [],
        "the first alone": loras[:1],
        "the second alone": loras[1:],
        "scales the other way round": [
            replace(lora, scale=scale) for lora, (_, scale) in zip(loras, files[::-1], strict=True)
        ],
        "alpha ignored": [_changed(lora, lambda pair: pair._replace(factor=1.0)) for lora in loras],
        "ranks out of order": [_changed(lora, lambda pair: pair._replace(up=pair.up.flip(1))) for lora in loras],
    }
    for change, changed in wrong.items():
        assert largest_difference(our_weights(family, changed), theirs) > 1e-2, change
