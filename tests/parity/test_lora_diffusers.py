"""Fused weights beside those of diffusers: ``load_lora_weights`` and ``fuse_lora`` with PEFT on tiny pipelines.

Where diffusers makes something else of a file than its trainer defined, both are held here: that ours are the
definition's, and that diffusers' are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft.utils.other import get_pattern_key

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build, load
from hidiff_export.checkpoints.lora import Lora, factor_of, fuse, read_lora
from hidiff_export.families.family import Family, Task, Width
from tests.loras import (
    Alphas,
    Factors,
    bare_peft,
    comfy,
    factors,
    kohya,
    later_diffusers,
    networks,
    old_diffusers,
    one_trainer,
    original,
    peft,
    summed,
)
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


EVERY_FORM = r"mid_block.*(transformer_blocks|proj_in|conv1)|layers\.0"


def _base(family: Family) -> Weights:
    return {(part, name): own.state_dict[name] for part, own in _checkpoints(family).items() for name in own.state_dict}


def _further_apart(one: Weights, other: Weights) -> set[str]:
    return {name for part, name in one if float((one[part, name] - other[part, name]).abs().max()) > 1e-3}


def _is_definition(family: Family, path: Path, made: Factors, alphas: Alphas) -> bool:
    definition = summed(_base(family), made, alphas, 0.7)
    return largest_difference(our_weights(family, opened(family, [(path, 0.7)])), definition) < ROUNDING


@pytest.mark.parametrize("family", [Family.SD15, Family.SDXL])
def test_diffusers_loses_alphas_that_differ_by_layer(family: Family, tmp_path: Path) -> None:
    made = factors(family, rank=4, seed=8, only=EVERY_FORM)
    alphas = {layer: 1.0 + index % 3 for index, layer in enumerate(made)}
    path = kohya(made, tmp_path / "lora.safetensors", alpha=alphas, sgm=family is Family.SDXL)
    assert _is_definition(family, path, made, alphas)
    with pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match"):
        theirs = diffusers_weights(family, [(path, 0.7)])
    lost = _further_apart(theirs, our_weights(family, opened(family, [(path, 0.7)])))
    assert any(".to_q." in name for name in lost)
    assert any("layers.0" in name for name in lost)
    assert all(".attn" in name or "layers.0" in name for name in lost), "other layers keep theirs"


def test_diffusers_gives_layers_without_alpha_that_of_others(tmp_path: Path) -> None:
    made = factors(Family.SD15, rank=4, seed=9, only=EVERY_FORM)
    alphas = {layer: 2.0 for index, layer in enumerate(made) if index % 2}
    path = kohya(made, tmp_path / "lora.safetensors", alpha=alphas)
    assert _is_definition(Family.SD15, path, made, alphas)
    theirs = diffusers_weights(Family.SD15, [(path, 0.7)])
    lost = _further_apart(theirs, our_weights(Family.SD15, opened(Family.SD15, [(path, 0.7)])))
    without = {f"{module}.weight" for part, module in made.keys() - alphas.keys()}
    assert lost
    assert lost <= without


def test_diffusers_skips_text_attention_without_its_output_layer(tmp_path: Path) -> None:
    made = factors(Family.SD15, rank=4, seed=10, only=r"layers\.\d\.(self_attn\.[qkv]_proj|mlp)|mid_block.*attn1")
    path = kohya(made, tmp_path / "lora.safetensors", alpha=2.0)
    assert _is_definition(Family.SD15, path, made, 2.0)
    theirs = diffusers_weights(Family.SD15, [(path, 0.7)])
    lost = _further_apart(theirs, our_weights(Family.SD15, opened(Family.SD15, [(path, 0.7)])))
    assert lost == {f"{module}.weight" for _, module in made if ".self_attn." in module}
    base = _base(Family.SD15)
    assert all(torch.equal(theirs[Component.TEXT_ENCODER, name], base[Component.TEXT_ENCODER, name]) for name in lost)


UNET_ALONE = r"mid_block.*attn\d\.to_"

PASSED_OVER: Mapping[str, Callable[[Factors, Path], Path]] = {
    "OneTrainer's original format": lambda made, path: original(made, path, alpha=None, first_up=1),
    "PEFT's own": lambda made, path: bare_peft(made, path),
}


@pytest.mark.parametrize("form", PASSED_OVER)
def test_diffusers_passes_over_names_without_a_network(form: str, tmp_path: Path) -> None:
    made = factors(Family.SD15, rank=4, seed=11, only=UNET_ALONE)
    path = PASSED_OVER[form](made, tmp_path / "lora.safetensors")
    assert _is_definition(Family.SD15, path, made, None)
    assert largest_difference(diffusers_weights(Family.SD15, [(path, 0.7)]), _base(Family.SD15)) == 0


REFUSED: Mapping[str, Callable[[Factors, Path], Path]] = {
    "an alpha beside PEFT's factors": lambda made, path: peft(made, path, alpha=2.0),
    "OneTrainer's own format": lambda made, path: one_trainer(made, path, alpha=2.0),
    "OneTrainer's format for ComfyUI": lambda made, path: comfy(made, path, alpha=2.0, first_up=1),
}


@pytest.mark.parametrize("form", REFUSED)
def test_diffusers_refuses_an_alpha_behind_dotted_names(form: str, tmp_path: Path) -> None:
    made = factors(Family.SD15, rank=4, seed=12, only=UNET_ALONE)
    path = REFUSED[form](made, tmp_path / "lora.safetensors")
    assert _is_definition(Family.SD15, path, made, 2.0)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        diffusers_weights(Family.SD15, [(path, 0.7)])


def test_factors_in_the_unets_layers_are_those_of_diffusers(tmp_path: Path) -> None:
    made = factors(Family.SD15, rank=4, seed=13, only=UNET_ALONE)
    path = later_diffusers(made, tmp_path / "lora.safetensors")
    ours = our_weights(Family.SD15, opened(Family.SD15, [(path, 0.7)]))
    assert largest_difference(ours, diffusers_weights(Family.SD15, [(path, 0.7)])) < ROUNDING
    assert largest_difference(ours, _base(Family.SD15)) > 1e-2


@pytest.mark.parametrize("pattern", ["to_q", "attn1.to_q", r".*\.to_[qv]", "q", "o_q", "attn1", "to_k"])
def test_a_pattern_of_alphas_is_for_the_layers_that_it_is_for_in_peft(pattern: str) -> None:
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    alphas = {pattern: 8}
    theirs = alphas.get(get_pattern_key(list(alphas), module), 2)
    assert (
        factor_of(None, 2, {"unet.lora_alpha": 2, "unet.alpha_pattern": alphas}, Component.UNET, module) == theirs / 2
    )
