"""Text encoders: as transformers computes them, numerically like trained ones, and from every kind of checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import Checkpoint, build, load
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family, Task, Width, text_encoder_configs
from hidiff_export.families.graph_io import most_skipped
from hidiff_export.modules.text_encoder import TextEncoderModule, end_positions

ENCODERS = [
    (Family.SD15, Component.TEXT_ENCODER),
    (Family.SD21, Component.TEXT_ENCODER),
    (Family.SDXL, Component.TEXT_ENCODER),
    (Family.SDXL, Component.TEXT_ENCODER_2),
]
START, END = 512, 513
Tensors = dict[str, torch.Tensor]


def fabricated(family: Family, component: Component) -> Checkpoint:
    return load(component, "random:0", family, Task.TEXT_TO_IMAGE, Width.TINY)


def encoder(family: Family, component: Component, **changed: Any) -> Any:
    checkpoint = fabricated(family, component)
    return build(component, {**checkpoint.config, **changed}, checkpoint.state_dict)


def write_into(config: Path, changed: dict[str, Any]) -> None:
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))


def tokens(words: int = 9, padding: int = END, seed: int = 0) -> torch.Tensor:
    ids = torch.full((1, 77), padding, dtype=torch.int32)
    ids[0, 0], ids[0, words + 1] = START, END
    ids[0, 1 : words + 1] = torch.randint(0, 512, (words,), generator=torch.Generator().manual_seed(seed))
    return ids


@pytest.mark.parametrize(("family", "component"), ENCODERS)
def test_it_gives_the_layers_that_transformers_gives(family: Family, component: Component) -> None:
    model, penultimate = encoder(family, component), family.is_sdxl
    module, ids = TextEncoderModule(model, penultimate=penultimate), tokens(padding=0)
    with torch.no_grad():
        wanted = model(ids.long(), output_hidden_states=True)
        for skip in range(most_skipped(model.config.to_dict(), penultimate=penultimate) + 1):
            embeds, *pooled = module(ids, torch.tensor([skip], dtype=torch.int32))
            layer = wanted.hidden_states[-(skip + (2 if penultimate else 1))]
            assert torch.equal(embeds, layer if penultimate else model.final_layer_norm(layer))
        assert [spec.shape for spec in module.output_specs(1)] == [tuple(t.shape) for t in (embeds, *pooled)]
        if component is Component.TEXT_ENCODER_2:
            assert torch.equal(pooled[0], wanted.text_embeds)
        else:
            assert pooled == []


@pytest.mark.parametrize(("eos", "place"), [(2, 10), (END, 10), (7, 3)])
def test_the_pooled_token_is_found_as_transformers_finds_it(eos: int, place: int) -> None:
    ids = tokens()
    ids[0, 1:10] = torch.tensor([1, 5, 7, 2, 9, 7, 3, 1, 5])
    assert end_positions(ids, eos).tolist() == [place]
    model = encoder(Family.SDXL, Component.TEXT_ENCODER_2, eos_token_id=eos)
    with torch.no_grad():
        _, pooled = TextEncoderModule(model, penultimate=True)(ids, torch.zeros(1, dtype=torch.int32))
        assert torch.equal(pooled, model(ids.long()).text_embeds)


@pytest.mark.parametrize(("family", "component"), ENCODERS)
def test_fabricated_ones_are_numerically_like_trained_ones(family: Family, component: Component) -> None:
    model = encoder(family, component)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(tokens(60).long(), output_hidden_states=True, output_attentions=True)
    for state in found.hidden_states:
        assert 0.7 < float(state.std()) < 2
    for layer in found.attentions:
        last = layer[0, :, -1]  # it attends to all 77
        assert 1.5 / 77 < float(last.max()) < 0.9
        assert float(last.std()) > 0.5 / 77


@pytest.mark.parametrize(("family", "component"), ENCODERS)
def test_every_token_place_and_earlier_word_counts_and_later_ones_do_not(family: Family, component: Component) -> None:
    module = TextEncoderModule(encoder(family, component), penultimate=family.is_sdxl)
    skip = torch.zeros(1, dtype=torch.int32)
    ids = tokens(20)
    changed = ids.clone()
    changed[0, 8] = (ids[0, 8] + 1) % 512
    with torch.no_grad():
        difference = (module(ids, skip)[0] - module(changed, skip)[0]).abs().amax(-1)[0]
    assert not difference[:8].any()
    assert bool((difference[8:] > 1e-4).all())


def published(tensors: Tensors) -> Tensors:
    """Under the names of the published files, with the buffer of integers that they have."""
    named = {f"text_model.{name}" if not name.startswith("text_") else name: t for name, t in tensors.items()}
    return {**named, "text_model.embeddings.position_ids": torch.arange(77)[None]}


def open_clip(tensors: Tensors) -> Tensors:
    """Under OpenCLIP's names: one matrix for queries, keys and values, and the projection transposed."""
    renamed = {
        "embeddings.token_embedding": "token_embedding",
        "final_layer_norm": "ln_final",
        "encoder.layers": "transformer.resblocks",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn": "attn",
    }
    found: Tensors = {}
    for name, tensor in tensors.items():
        new = name.removeprefix("text_model.")
        for one, other in renamed.items():
            new = new.replace(one, other)
        if new == "embeddings.position_embedding.weight":
            found["positional_embedding"] = tensor
        elif new == "text_projection.weight":
            found["text_projection"] = tensor.T.contiguous()
        elif ".q_proj." in new:
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            found[new.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in new and ".v_proj." not in new:
            found[new] = tensor
    return {**found, "logit_scale": torch.ones(())}


def whole(family: Family) -> Tensors:
    """A whole original checkpoint's text encoders, and a tensor of its UNet."""
    found: Tensors = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}
    for component in (Component(name) for name in text_encoder_configs(family, Width.TINY)):
        tensors = dict(fabricated(family, component).state_dict)
        index = 0 if component is Component.TEXT_ENCODER else 1
        stem = f"conditioner.embedders.{index}." if family.is_sdxl else "cond_stage_model."
        opened = family is Family.SD21 or component is Component.TEXT_ENCODER_2
        named = open_clip(tensors) if opened else published(tensors)
        inner = "model." if opened else "transformer."
        if family is Family.SD21:
            named["text_projection"] = torch.zeros(32, 32)  # it is there, and belongs to the layer that is left out
        found |= {f"{stem}{inner}{name}": tensor for name, tensor in named.items()}
    return found


@pytest.mark.parametrize(("family", "component"), ENCODERS)
def test_a_single_file_in_the_original_layout(tmp_path: Path, family: Family, component: Component) -> None:
    save_file(whole(family), tmp_path / "model.safetensors")
    wanted = fabricated(family, component)
    found = load(component, str(tmp_path / "model.safetensors"), family, Task.TEXT_TO_IMAGE, Width.TINY)
    assert found.config == wanted.config
    assert found.state_dict.keys() == wanted.state_dict.keys()
    assert all(torch.equal(tensor, wanted.state_dict[name]) for name, tensor in found.state_dict.items())


@pytest.mark.parametrize(("family", "component"), ENCODERS)
@pytest.mark.parametrize("old", [False, True], ids=["today's names", "published names"])
def test_a_diffusers_folder(tmp_path: Path, family: Family, component: Component, old: bool) -> None:
    # What fine-tunes set as they like: CLIPTextModel has no projection.
    free = {"projection_dim": 7} if component is Component.TEXT_ENCODER else {}
    model = encoder(family, component, eos_token_id=END, **free)
    folder = tmp_path / component.value
    model.save_pretrained(folder)
    if old:
        save_file(published(dict(model.state_dict())), folder / "model.safetensors", {"format": "pt"})
    config, tensors, _ = load(component, str(tmp_path), family, Task.TEXT_TO_IMAGE, Width.TINY)
    assert config["eos_token_id"] == END
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tensors.items())
    again = type(model).from_pretrained(folder)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in tensors.items())


def test_a_file_without_text_encoders_is_told(tmp_path: Path) -> None:
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no text_encoder") as caught:
        load(Component.TEXT_ENCODER, str(tmp_path / "model.safetensors"), Family.SD15, Task.TEXT_TO_IMAGE, Width.TINY)
    assert "text: false" in caught.value.advice


def test_another_familys_text_encoder_is_told(tmp_path: Path) -> None:
    model = encoder(Family.SD21, Component.TEXT_ENCODER)
    model.save_pretrained(tmp_path / "text_encoder")
    config = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    assert config["hidden_act"] == "gelu"
    with pytest.raises(CheckpointError, match="not its family's"):
        load(Component.TEXT_ENCODER, str(tmp_path), Family.SD15, Task.TEXT_TO_IMAGE, Width.TINY)


@pytest.mark.parametrize(
    "changed",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"torch_dtype": "float7"},
        {"architectures": "CLIPTextModel"},
        {"use_attention_mask": False},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_how_others_run_it_makes_no_difference(tmp_path: Path, changed: dict[str, Any]) -> None:
    encoder(Family.SD15, Component.TEXT_ENCODER).save_pretrained(tmp_path / "text_encoder")
    write_into(tmp_path / "text_encoder" / "config.json", changed)
    config = load(Component.TEXT_ENCODER, str(tmp_path), Family.SD15, Task.TEXT_TO_IMAGE, Width.TINY).config
    assert config == fabricated(Family.SD15, Component.TEXT_ENCODER).config


def test_sdxls_pipelines_do_not_look_at_the_attention_mask(tmp_path: Path) -> None:
    encoder(Family.SDXL, Component.TEXT_ENCODER).save_pretrained(tmp_path / "text_encoder")
    write_into(tmp_path / "text_encoder" / "config.json", {"use_attention_mask": True})
    assert load(Component.TEXT_ENCODER, str(tmp_path), Family.SDXL, Task.TEXT_TO_IMAGE, Width.TINY).config


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"hidden_size": "32"}, "cannot build a CLIPTextModel"),
        ({"num_attention_heads": 7}, "cannot build a CLIPTextModel"),
        ({"num_attention_heads": 0}, "cannot build a CLIPTextModel"),
        ({"layer_norm_eps": 1e-6}, "not its family's"),
        ({"architectures": 5}, "not of a CLIPTextModel"),
        ({"use_attention_mask": True}, "text_encoder masks the padding of prompts, which bundles do not do"),
    ],
    ids=["text for a number", "heads that do not divide the width", "no heads", "another epsilon", "no class", "mask"],
)
def test_a_configuration_that_is_no_familys_is_told(tmp_path: Path, changed: dict[str, Any], match: str) -> None:
    encoder(Family.SD15, Component.TEXT_ENCODER).save_pretrained(tmp_path / "text_encoder")
    write_into(tmp_path / "text_encoder" / "config.json", changed)
    with pytest.raises(CheckpointError, match=match):
        load(Component.TEXT_ENCODER, str(tmp_path), Family.SD15, Task.TEXT_TO_IMAGE, Width.TINY)
