"""Names that LoRA files have for layers: the original layout's are those that diffusers converts, and no two alike."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils.state_dict_utils import DIFFUSERS_OLD_TO_PEFT

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.lora_layers import layers_of, original_name
from hidiff_export.families.family import Family, Task, Width
from tests.loras import networks


@pytest.mark.parametrize("family", [Family.SD15, Family.SD21, Family.SDXL])
def test_original_names_are_those_that_diffusers_converts(family: Family) -> None:
    names = networks(family)[Component.UNET]
    modules = {name.rpartition(".")[0] for name in names}
    originals = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        originals[f"{original_name(module, modules)}.{kind}"] = name
    assert len(originals) == len(names), "no two modules have one name"
    marked = {f"model.diffusion_model.{name}": torch.tensor(0.0) for name in originals}
    config = Component.UNET.config(family, Task.TEXT_TO_IMAGE, Width.TINY)
    converted = convert_ldm_unet_checkpoint(dict(marked), config)
    given = {id(tensor): name.removeprefix("model.diffusion_model.") for name, tensor in marked.items()}
    assert {given[id(tensor)]: name for name, tensor in converted.items()} == originals


@pytest.mark.parametrize("family", [Family.SD15, Family.SD21, Family.SDXL])
def test_underscores_make_no_two_layers_alike(family: Family) -> None:
    layers = layers_of(family, Task.TEXT_TO_IMAGE, Width.FULL)
    modules = {name.removesuffix(".weight") for name in layers.shapes[Component.UNET] if name.endswith(".weight")}
    for module in modules:
        weight = f"{module}.weight"
        expected = (Component.UNET, weight) if len(layers.shapes[Component.UNET][weight]) > 1 else None
        for name in (module, original_name(module, modules)):
            assert layers.find(f"unet.{name}") == expected
            assert layers.find(f"lora_unet_{name.replace('.', '_')}") == expected


def test_a_name_that_both_text_encoders_have_is_neithers() -> None:
    sdxl, sd15 = (layers_of(family, Task.TEXT_TO_IMAGE, Width.TINY) for family in (Family.SDXL, Family.SD15))
    name = "text_model.encoder.layers.0.mlp.fc1"
    assert sdxl.find(f"base_model.model.{name}") is None
    assert sdxl.is_ambiguous(f"base_model.model.{name}")
    assert not sd15.is_ambiguous(name)
    assert sd15.find(name) == (Component.TEXT_ENCODER, "encoder.layers.0.mlp.fc1.weight")
    assert sdxl.find(f"text_encoder_2.{name}") == (Component.TEXT_ENCODER_2, f"{name}.weight")
    assert sdxl.find("lora_te2_text_projection") == (Component.TEXT_ENCODER_2, "text_projection.weight")


def test_a_text_encoders_projections_are_those_that_diffusers_renames() -> None:
    """Before PEFT they had the UNet's names."""
    layers = layers_of(Family.SD15, Task.TEXT_TO_IMAGE, Width.TINY)
    renamed = {old: new for old, new in DIFFUSERS_OLD_TO_PEFT.items() if old.endswith("_lora.down")}
    assert len(renamed) == 4
    for old, new in renamed.items():
        stem = f"text_model.encoder.layers.0.self_attn{old.removesuffix('_lora.down')}"
        name = f"encoder.layers.0.self_attn{new.removesuffix('.lora_A')}.weight"
        assert layers.find(f"text_encoder.{stem}") == (Component.TEXT_ENCODER, name)


def test_a_name_of_no_module_of_a_unet_is_told() -> None:
    with pytest.raises(ValueError, match="expected a module of a UNet, got 'stranger'"):
        original_name("stranger", ())
